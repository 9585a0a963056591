"""Is an old task forgotten, or only the form of its answers lost? Two measurements that tell these apart."""

from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor

from agcl.callbacks.beside_scoring import BesideScoring
from agcl.data.tasks import IGNORED_LABEL, collate
from agcl.errors import AgclError
from agcl.scoring import TaskScorer, answer_logits, token_nll
from agcl.shards import has_shards


class RecoveryProbe(BesideScoring):
    """Measures how far old tasks' answers have moved, and how much of a lost score a few rows bring back.

    - **Divergence**, after each task: KL(then || now) between what the model predicted for an old task's answer tokens
      right after learning it and what it predicts now, in nats per token, given the prompt and the answer's tokens
      before. It is logged as ``divergence/TASK``.
    - **Recovery**, after the last task: a copy of the weights takes a few steps of AdamW on a few of an old task's
      training rows; then the task's other scored rows are scored. What a lost answer format took away comes back so;
      what was forgotten does not. The weights are then as they were.

    ``scores.json`` gets ``recovery``, a list for each with an entry for each task, null for the last: ``divergence``,
    ``score`` and ``recovered_score`` of the rows that are not used for recovery (null if there are none). Nothing of
    this reaches the training; under ``regime: joint`` there is nothing to measure. Memory at the end: one more copy of
    the trained weights, and AdamW's state of them. That and its time are part of what the run reports of itself. Every
    process measures all of it.

    Args:
        num_rows: Training rows of each old task to recover with.
        num_steps: Steps of AdamW on all of these rows together.
        learning_rate: Of these steps.
        divergence_rows: Scored rows of each task, the first ones, to measure the divergence on; their predictions are
            kept as float16: 2 bytes for each answer token and entry of the vocabulary, in checkpoints too.

    Raises:
        AgclError: If a number is too small; at the start of fitting, if weights are split over processes.
    """

    def __init__(
        self, num_rows: int = 8, num_steps: int = 4, learning_rate: float = 1e-4, divergence_rows: int = 32
    ) -> None:
        for name, value in (("num_rows", num_rows), ("num_steps", num_steps), ("divergence_rows", divergence_rows)):
            if value < 1:
                raise AgclError(f"`{name}` is {value}; give at least 1.")
        if not learning_rate > 0:
            raise AgclError(f"`learning_rate` is {learning_rate}; give a number above 0.")
        self.num_rows = num_rows
        self.num_steps = num_steps
        self.learning_rate = learning_rate
        self.divergence_rows = divergence_rows
        self._num_tasks = 0
        self._predictions: dict[int, list[Tensor]] = {}
        """Task index -> log-probabilities of each batch's answer tokens when it was learned, (tokens, vocabulary)."""
        self._found: dict[str, list[float | None]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check that whole weights are here."""
        if has_shards(pl_module.model):
            raise AgclError(
                "RecoveryProbe takes steps on a copy of the weights, which are split over processes here "
                "(ModelParallelStrategy); leave it out, or take `strategy: ddp`."
            )
        self._num_tasks = len(pl_module.tasks)

    def _forget(self) -> None:
        self._predictions, self._found = {}, {}

    def _has_measured(self, num_learned: int) -> bool:
        return num_learned - 1 in self._predictions

    def _measure(self, trainer: Trainer, pl_module: Any, num_learned: int) -> None:
        if pl_module.tasks.regime == "joint" or not num_learned:
            return
        last = num_learned - 1
        # Steps are taken here, which Lightning's validation does not let gradients into.
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            divergence = [self._divergence(trainer, pl_module, index) for index in range(last)]
            self._predictions[last] = [p.half().cpu() for p in self._predict(trainer, pl_module, last)]
            if num_learned == self._num_tasks:
                pairs = [self._recover(trainer, pl_module, index) for index in range(last)]
                self._found = {
                    "divergence": [*divergence, None],
                    "score": [*(before for before, _ in pairs), None],
                    "recovered_score": [*(after for _, after in pairs), None],
                }
        values = {f"divergence/{pl_module.tasks[index].name}": value for index, value in enumerate(divergence)}
        for logger in trainer.loggers:  # not self.log, which a resumed run's start does not allow
            logger.log_metrics(values, step=trainer.global_step)

    # --------------------------------------------------------------- divergence

    def _predict(self, trainer: Trainer, pl_module: Any, index: int) -> list[Tensor]:
        rows = trainer.datamodule.scored_rows(index)  # type: ignore[attr-defined]
        predictions = []
        for batch in _batches(pl_module, rows.select(range(min(len(rows), self.divergence_rows)))):
            logits, targets = answer_logits(pl_module.model, batch)
            predictions.append(logits[targets != IGNORED_LABEL].float().log_softmax(dim=-1))
        return predictions

    def _divergence(self, trainer: Trainer, pl_module: Any, index: int) -> float:
        """KL(then || now), nats per answer token."""
        total = tokens = 0.0
        now = self._predict(trainer, pl_module, index)
        for before, after in zip(self._predictions[index], now, strict=True):
            then = before.to(after.device).float().log_softmax(dim=-1)  # of what float16 has made of them
            total += float(torch.nn.functional.kl_div(after, then, reduction="sum", log_target=True))
            tokens += len(after)
        return total / tokens

    # ----------------------------------------------------------------- recovery

    def _recover(self, trainer: Trainer, pl_module: Any, index: int) -> tuple[float | None, float | None]:
        """Scores of the rows that are not used, before and after recovery."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        used = data.kept_rows(index, self.num_rows)
        taken = {tuple(ids) for ids in used["input_ids"]}
        scored = data.scored_rows(index)
        others = scored.select([place for place, ids in enumerate(scored["input_ids"]) if tuple(ids) not in taken])
        if not len(others):
            return None, None
        before = _score(trainer, pl_module, index, others)
        trained = [parameter for parameter in pl_module.model.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in trained]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        (batch,) = _batches(pl_module, used, len(used))
        for _ in range(self.num_steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                logits, targets = answer_logits(pl_module.model, batch)
                loss = token_nll(logits, targets).sum() / (targets != IGNORED_LABEL).sum()
            # As in training, backward is outside of autocast: what hooks make of gradients keeps their type.
            with torch.autocast(pl_module.device.type, enabled=False):
                loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        after = _score(trainer, pl_module, index, others)
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
        return before, after

    def results(self) -> dict[str, Any]:
        """``recovery`` for the run's results, once the last task is learned."""
        return {"recovery": self._found} if self._found else {}

    def state_dict(self) -> dict[str, Any]:
        """What the tasks were answered like when they were learned, and what has been found."""
        return {"predictions": dict(self._predictions), "found": dict(self._found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._predictions, self._found = dict(state_dict["predictions"]), dict(state_dict["found"])


def _batches(pl_module: Any, rows: Dataset, size: int | None = None) -> list[dict[str, Any]]:
    """Rows, collated, on the module's device; as many together as scoring takes unless said."""
    data = pl_module.trainer.datamodule
    size = size or data.eval_batch_size
    batches = (
        collate(list(rows.select(range(first, min(first + size, len(rows))))), int(pl_module.tokenizer.pad_token_id))
        for first in range(0, len(rows), size)
    )
    return [pl_module.transfer_batch_to_device(batch, pl_module.device, 0) for batch in batches]


def _score(trainer: Trainer, pl_module: Any, index: int, rows: Dataset) -> float:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    limit = data.max_answer_tokens(data.evaluations.index((index, None)))
    task, labels = pl_module.tasks[index], data.label_candidates(index)
    scorer = TaskScorer(task, labels, limit, end_token_id=data.end_token_id).to(pl_module.device)
    for batch in _batches(pl_module, rows):
        scorer.update(pl_module.model, pl_module.tokenizer, batch)
    return float(scorer.compute()["score"])
