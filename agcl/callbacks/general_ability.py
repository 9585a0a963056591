"""What learning the tasks does to what the model could do before: its likelihood of ordinary text."""

import math
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from agcl.architectures import context_tokens
from agcl.callbacks.beside_scoring import BesideScoring
from agcl.data.tasks import IGNORED_LABEL
from agcl.data.text import load_text, text_windows
from agcl.errors import AgclError
from agcl.scoring import answer_logits, token_nll


class GeneralAbility(BesideScoring):
    """Measures the mean negative log-likelihood per token of ordinary text, whenever the tasks are scored.

    That is before any training and after each task. It is logged as ``general/nll`` (nats) and ``general/perplexity``
    (its exponential). ``scores.json`` gets ``general_ability``: ``nll`` in the order of the score matrix's rows;
    ``forgetting``, the last one minus the one before training: more is worse; and its ``standard_error`` with the
    windows as a sample, s / sqrt(n) with s the standard deviation of their n changes. Methods that read the same
    windows are compared more precisely on these. Every process measures all of it, at the cost of a forward pass of
    ``num_windows * window_tokens`` tokens each time: 8192 by default, which takes a small model seconds on a CPU.

    Args:
        source: ``builtin:text/alice`` ("Alice's Adventures in Wonderland"), or a text file of one's own in UTF-8.
        num_windows: Number of windows, spread evenly over the text. Each is read without what stands before it.
        window_tokens: Tokens of text in a window.
        batch_size: Windows that are run together.

    Raises:
        AgclError: At the start of fitting, before any training: no such text, one that is too short, or windows longer
            than the model's context.
    """

    def __init__(
        self,
        source: str = "builtin:text/alice",
        num_windows: int = 32,
        window_tokens: int = 256,
        batch_size: int = 4,
    ) -> None:
        for name, value, least in (
            ("num_windows", num_windows, 1),
            ("window_tokens", window_tokens, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise AgclError(f"`{name}` is {value}; give at least {least}.")
        self.source = source
        self.num_windows = num_windows
        self.window_tokens = window_tokens
        self.batch_size = batch_size
        self._num_tasks = 0
        self._nll: dict[int, list[float]] = {}
        """Number of tasks learned -> each window's nats per token."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Read the text and cut it into windows."""
        self._num_tasks = len(pl_module.tasks)
        self._windows = text_windows(load_text(self.source), pl_module.tokenizer, self.num_windows, self.window_tokens)
        length = self._windows.shape[1]
        context = context_tokens(pl_module.model.config)
        if context is not None and length > context:
            raise AgclError(
                f"GeneralAbility: windows of {length} tokens are longer than the model's context, which has {context}: "
                "choose a lower `window_tokens`."
            )

    def _forget(self) -> None:
        self._nll = {}

    def _has_measured(self, num_learned: int) -> bool:
        return num_learned in self._nll

    def _measure(self, trainer: Trainer, pl_module: Any, num_learned: int) -> None:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            windows = window_nll(pl_module.model, self._windows.to(pl_module.device), self.batch_size)
        self._nll[num_learned] = windows.tolist()
        nll = fmean(self._nll[num_learned])
        for logger in trainer.loggers:  # not self.log, which neither sanity checking nor a resumed run's start allows
            perplexity = torch.tensor(nll).exp().item()
            logger.log_metrics({"general/nll": nll, "general/perplexity": perplexity}, step=trainer.global_step)

    def results(self) -> dict[str, Any]:
        """``general_ability`` for the run's results; null is what was not measured."""
        nll = [fmean(self._nll[learned]) if learned in self._nll else None for learned in range(self._num_tasks + 1)]
        forgetting = standard_error = None
        if len(self._nll) > 1 and 0 in self._nll:
            changes = [after - before for before, after in zip(self._nll[0], self._nll[max(self._nll)], strict=True)]
            forgetting = fmean(changes)
            standard_error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
        return {"general_ability": {"nll": nll, "forgetting": forgetting, "standard_error": standard_error}}

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {"nll": dict(self._nll)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._nll = dict(state_dict["nll"])


def window_nll(model: Any, windows: Tensor, batch_size: int) -> Tensor:
    """Each window's mean negative log-likelihood of its tokens but the first, given those before them in the window.

    Args:
        model: A causal language model, or a PEFT model around one, in evaluation mode.
        windows: Token ids, int64, shape ``(num_windows, length)``, on the model's device.
        batch_size: Windows that are run together.

    Returns:
        Nats per token, float64 on the CPU, shape ``(num_windows,)``.
    """
    means = []
    for input_ids in windows.split(batch_size):
        labels = input_ids.clone()
        labels[:, 0] = IGNORED_LABEL
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        means.append(token_nll(*answer_logits(model, batch)).double().mean(dim=1).cpu())
    return torch.cat(means)
