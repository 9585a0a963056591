"""The LightningModule that learns one task after another and scores all of them at each task boundary."""

import math
from collections.abc import Callable
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MetricCollection

from agcl.answers import AnswerRecord
from agcl.data.sequence import TaskSequence
from agcl.data.tasks import IGNORED_LABEL
from agcl.errors import AgclError
from agcl.metrics import (
    AveragePerformance,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    ScoreMatrix,
)
from agcl.models import (
    load_model,
    load_tokenizer,
    put_adapter_on,
    save_model,
    shard_model,
    with_quantised,
    without_quantised,
)
from agcl.ranks import Ranks
from agcl.schedules import WarmupDecay
from agcl.scoring import TaskScorer, answer_logits, token_nll

SCORE, NLL = "score", "nll"
# Of a batch, its answer logits (batch, length, vocabulary) and targets (batch, length; -100: no answer), a scalar.
LossTerm = Callable[[dict[str, Any], Tensor, Tensor], Tensor]


class ContinualLM(LightningModule):
    """A causal language model that learns a sequence of tasks in one ``Trainer.fit``.

    Each task starts with a fresh optimizer state and learning-rate schedule. All tasks are scored before any training
    and at the end of each task, in Lightning's validation loop; ``score_matrices`` holds the results. Where the data
    module's regime is ``joint``, "each task" is the whole run.

    Args:
        model_name_or_path: Hub name, local folder, or ``builtin:smollm2-135m-instruct``.
        gguf_file: GGUF file in that folder or repository, if any.
        adapter: A PEFT configuration (``{peft_type: LORA, r: 8, ...}``); all weights are trained if left out.
        optimizer: Any ``torch.optim`` class with its arguments.
        lr_scheduler: A torch scheduler that watches no metric, stepped once per optimizer step, begun anew with each
            task.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        attn_implementation: As in transformers; attribution needs ``sdpa`` or ``eager``.
        trust_remote_code: Run model code that comes with the checkpoint. Off unless you trust its author.
        quantization_config: As in transformers: quantise the weights of linear maps on loading, to train an ``adapter``
            on them (QLoRA). ``{load_in_4bit: true, ...}`` needs bitsandbytes.
        compiled: Train through a forward pass that ``torch.compile`` has made of the model's, over the same weights.
            Scoring, attribution and saving use the model as it is.
    """

    def __init__(
        self,
        model_name_or_path: str = "builtin:smollm2-135m-instruct",
        gguf_file: str | None = None,
        adapter: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable = WarmupDecay,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = "sdpa",
        trust_remote_code: bool = False,
        quantization_config: dict[str, Any] | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model_name_or_path, (str, PathLike)):
            raise AgclError(
                f"ContinualLM takes the name or folder of a model, not a {type(model_name_or_path).__name__}; for a "
                "model that is there already see agcl.compute_importance and agcl.gate."
            )
        model_name_or_path = str(model_name_or_path)
        # `ContinualMonitor` logs the hyper-parameters of the whole run: a table of TensorBoard takes them once.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"], logger=False)
        self.model_name_or_path = model_name_or_path
        self.gguf_file = gguf_file
        self.adapter = adapter
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.quantization_config = quantization_config
        self.compiled = compiled
        self.model: Any = None
        self._run: Callable[..., Any] | None = None  # the compiled forward pass
        # In plain containers, thus not submodules: they are saved with the run's state, not with the weights.
        self.score_matrices: dict[str, ScoreMatrix] = {}
        self.loss_terms: dict[str, LossTerm] = {}
        """Terms that methods add to the training loss, by the name they are logged under."""
        self.model_changes: list[Callable[[], None]] = []
        """Called when the language model has been loaded: what methods change before there is an optimizer."""
        self.checkpoint_changes: list[Callable[[dict[str, Any]], None]] = []
        """Called with a checkpoint before it is loaded: the model that methods expect to find in it."""
        self.late_measurements: list[Callable[[], None]] = []
        """Called once when training starts, after all callbacks: what a resumed run has yet to measure."""
        self.num_answers = 0
        """Rows of each task whose answers are kept in ``answers`` at each scoring; ``ContinualReport`` sets it."""
        self.answers = AnswerRecord()
        self._transfer: list[MetricCollection] = []
        self._scorers: list[TaskScorer] = []
        self._task_begun: int | None = None
        self._scored_late: int | None = None
        self._random_states: list[dict[str, Tensor]] = []  # by rank
        self._fresh_states: tuple[dict[str, Any], dict[str, Any]] | None = None

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Prepare the score matrices: one for scores, one for losses, and two for each kind of probe."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        probes = dict.fromkeys(probe for _, probe in self._data.evaluations)
        names = [matrix_name(kind, probe) for probe in probes for kind in (SCORE, NLL)]
        # Every rank enters scores that were synchronised already.
        self.score_matrices = {name: ScoreMatrix(len(self.tasks), sync_on_compute=False) for name in names}
        self._transfer = [transfer_metrics(len(self.tasks))]
        self.answers = AnswerRecord()

    def configure_model(self) -> None:
        """Load the language model; Lightning calls this after the data has been checked."""
        if self.model is not None:
            return
        if self.compiled and self.device_mesh is not None:
            raise AgclError(
                "`compiled` is not tried with weights that are split over processes (ModelParallelStrategy): leave it "
                "out, or take `strategy: ddp`."
            )
        self.tokenizer = load_tokenizer(
            self.model_name_or_path, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
        )
        model: Any = load_model(
            self.model_name_or_path,
            gguf_file=self.gguf_file,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            quantization_config=self.quantization_config,
            is_trained_whole=self.adapter is None,
        )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.adapter is not None:
            if self.gradient_checkpointing:
                model.enable_input_require_grads()
            model = put_adapter_on(model, self.adapter)
        self.model = model.train()
        for change in self.model_changes:
            change()
        if self.device_mesh is not None:
            shard_model(self.model, self.device_mesh)
        if self.compiled:
            # Of the weights that are there at each call: not a module, so that names and checkpoints stay.
            self._run = torch.compile(lambda **inputs: model(**inputs), dynamic=True)

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler, stepped together; their fresh states are kept for the tasks to come."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        if not trainable:
            raise AgclError(
                "All parameters are frozen, so nothing can be learned: leave `adapter` out, or `inference_mode` of it."
            )
        try:
            optimizer = self.optimizer(trainable)
            scheduler = self.lr_scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise AgclError(f"`optimizer` or `lr_scheduler` cannot be used: {error}. Mend its `init_args`.") from error
        self._fresh_states = (deepcopy(optimizer.state_dict()), deepcopy(scheduler.state_dict()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def tasks(self) -> TaskSequence:
        """The tasks of the data module that this module is trained on."""
        return self._data.tasks

    @property
    def _data(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(getattr(datamodule, "tasks", None), TaskSequence):
            raise AgclError(
                "ContinualLM learns from a ContinualDataModule: pass it as `trainer.fit(model, datamodule=...)`."
            )
        return datamodule

    # ---------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        """Check that rows were made into this model's tokens, and that gradients can be clipped if they are to be.

        Raises:
            AgclError: If not.
        """
        if self.trainer.gradient_clip_val and unscales_in_its_step(self.trainer):
            raise AgclError(
                "Under 16-mixed precision a fused optimizer unscales gradients inside of its step, so that they cannot "
                "be clipped before: set `fused: false`, or precision bf16-mixed."
            )
        other = self._data.model_name_or_path
        if other != self.model_name_or_path and self._data.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise AgclError(
                f"The rows are in tokens of `{other}`, but the model is `{self.model_name_or_path}`, which has others: "
                "give ContinualDataModule and ContinualLM the same `model_name_or_path`."
            )

    def on_train_start(self) -> None:
        """On resuming: go on with the random numbers (dropout), and make up for scoring that did not take place."""
        self._restore_random_numbers()
        completed = self.tasks.num_completed(self.trainer.current_epoch)
        if completed and self.score_matrices[SCORE].compute()[completed].isnan().all():
            # From a checkpoint of an epoch's last batch, Lightning goes on with the next epoch without validating.
            self._score_late(completed)
        while self.late_measurements:
            self.late_measurements.pop(0)()

    def on_train_epoch_start(self) -> None:
        """Begin the task, if it is its first epoch."""
        self._begin_epoch()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Begin the epoch where Lightning, resuming from a checkpoint inside of one, left its start out."""
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """A task starts with a fresh optimizer and schedule; only its last epoch ends with scoring."""
        if self._task_begun != self.task_index:
            self._restart_optimizer()
            self._task_begun = self.task_index
        epoch = self.trainer.current_epoch
        # Lightning validates where `epoch + 1` is a multiple of this.
        self.trainer.check_val_every_n_epoch = 1 if self.tasks.ends_at(epoch) else epoch + 2

    def _restart_optimizer(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        scheduler = self.lr_schedulers()
        if not isinstance(optimizer, Optimizer) or self._fresh_states is None:
            raise AgclError("ContinualLM trains with exactly one optimizer.")
        optimizer_state, scheduler_state = deepcopy(self._fresh_states)
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)  # type: ignore[union-attr]
        if isinstance(scheduler, WarmupDecay):
            # The last batch of an epoch always ends in a step, also where it does not fill an accumulation.
            steps = [
                math.ceil(self._data.num_batches(epoch) / self.trainer.accumulate_grad_batches)
                for epoch in self.tasks.segment(self.trainer.current_epoch)
            ]
            scheduler.start(sum(steps))

    def _diverged(self, task: str, what: str) -> AgclError:
        return AgclError(
            f"Task `{task}`: {what} at step {self.trainer.global_step} (epoch {self.trainer.current_epoch}), so "
            "nothing more is learned or saved. Lower the learning rate, set `trainer.gradient_clip_val`, or take more "
            "precision (bf16-mixed, 32-true), then go on from an earlier checkpoint."
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, under bf16-mixed also before fused optimizers: nothing is scaled there."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Score no task that is stopped in the midst of its last epoch, as a time limit does; Lightning would."""
        if self.trainer.should_stop and not self.trainer.is_last_batch:
            self.trainer.check_val_every_n_epoch = self.trainer.current_epoch + 2

    def on_train_epoch_end(self) -> None:
        """Have it saved where a limit ends the training: ModelCheckpoint, whose turn is next, saves where is scored."""
        trainer = self.trainer
        if not trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
            trainer.check_val_every_n_epoch = 1

    @property
    def ends_task(self) -> bool:
        """At an epoch's end: whether it is the last one before a task boundary, and none that a limit has cut short."""
        return self.tasks.ends_at(self.trainer.current_epoch) and self.trainer.is_last_batch

    @property
    def unlearned(self) -> list[str]:
        """At the end of training: the tasks that were not learned to their ends."""
        passed = self.trainer.current_epoch - (not self.trainer.is_last_batch)  # Lightning counts a cut epoch, too
        return [task.name for task in self.tasks][self.tasks.num_completed(passed) :]

    @property
    def task_index(self) -> int:
        """0-based index of the task being learned; under ``joint``, of the first one."""
        return self.tasks.index_at(self.trainer.current_epoch)

    def forward(self, **inputs: Any) -> Any:
        """Run the wrapped language model."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the batch's answer tokens, in nats, and the methods' ``loss_terms``."""
        logits, targets = answer_logits(self.model, batch, self._run)
        loss = token_nll(logits, targets).sum() / (targets != IGNORED_LABEL).sum()
        task = self.tasks.name_at(self.trainer.current_epoch)
        self._check_finite(task, "loss", loss)
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        self.log(f"train/{task}/loss", loss.detach())
        self.log(f"train/{task}/learning_rate", optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        for name, term in self.loss_terms.items():
            value = term(batch, logits, targets)
            self._check_finite(task, f"term `{name}` of the loss", value)
            self.log(f"train/{task}/{name}", value.detach())
            loss = loss + value
        return loss

    def _check_finite(self, task: str, what: str, value: Tensor) -> None:
        """Before the weights, and with them the next checkpoint, are spoiled."""
        if not value.isfinite():
            raise self._diverged(task, f"the {what} is {value.item()}")

    def on_train_end(self) -> None:
        """Say which tasks were not learned, if something ended the training before (early stopping, a time limit)."""
        left = self.unlearned
        if left and self.tasks.regime == "sequential" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"Training has ended before {', '.join(f'`{name}`' for name in left)} was learned to its end: what "
                "stops the Trainer (EarlyStopping, max_steps, max_time) stops the whole sequence, not a task."
            )

    # ----------------------------------------------------------------- scoring

    def on_validation_epoch_start(self) -> None:
        """Begin a scorer for each evaluation set."""
        self._scorers = [
            TaskScorer(
                self.tasks[index],
                self._data.label_candidates(index),
                self._data.max_answer_tokens(evaluation),
                0 if probe else self.num_answers,
                self._data.end_token_id,
            ).to(self.device)
            for evaluation, (index, probe) in enumerate(self._data.evaluations)
        ]

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of one evaluation set."""
        self._scorers[dataloader_idx].update(self.model, self.tokenizer, batch)

    def on_validation_epoch_end(self) -> None:
        """Enter the scores in the matrices and log them with the continual metrics that follow."""
        values: dict[str, Tensor] = {}
        for (index, probe), scorer in zip(self._data.evaluations, self._scorers, strict=True):
            task = self.tasks[index]
            for kind, value in scorer.compute().items():
                if not value.isfinite():
                    raise self._diverged(task.name, f"its {kind} is {value.item()}")
                name = task.metric if kind == SCORE else kind
                values["/".join(("eval", task.name, *([probe] if probe else []), name))] = value
                if self.trainer.state.fn == TrainerFn.FITTING:
                    self._enter(matrix_name(kind, probe), self.num_learned, index, value)
            if self.trainer.state.fn == TrainerFn.FITTING:
                self.answers.enter(task.name, self.num_learned, scorer.answers)
        if self.trainer.state.fn == TrainerFn.FITTING:
            values |= {f"transfer/{name}": value for name, value in self.transfer().items()}
        self._log_scores({name: value for name, value in values.items() if not value.isnan()})

    def _score_late(self, num_learned: int) -> None:
        """Score all tasks outside of Lightning's validation loop, which cannot be run at the start of training."""
        self._scored_late = num_learned
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.on_validation_epoch_start()
            for index, loader in enumerate(self._data.val_dataloader()):
                for batch_idx, batch in enumerate(loader):
                    self.validation_step(self.transfer_batch_to_device(batch, self.device, index), batch_idx, index)
            self.on_validation_epoch_end()
        self.train()
        self._scored_late = None

    def _log_scores(self, values: dict[str, Tensor]) -> None:
        if self.trainer.sanity_checking:  # scoring before any training; Lightning drops what is logged then
            for logger in self.trainer.loggers:
                logger.log_metrics({name: value.item() for name, value in values.items()}, step=0)
        else:
            self.log_dict({name: value.float() for name, value in values.items()})

    @property
    def num_learned(self) -> int:
        """Number of tasks learned when the present scoring takes place: 0 before any training."""
        if self.trainer.sanity_checking:
            return 0
        return self._scored_late or self.tasks.num_completed(self.trainer.current_epoch + 1)

    def transfer(self) -> dict[str, Tensor]:
        """The five continual-learning metrics of the scores so far (scalars; NaN where undefined)."""
        return self._transfer[0].compute()

    def _enter(self, matrix: str, num_learned: int, task_index: int, value: Tensor) -> None:
        self.score_matrices[matrix].update(num_learned, task_index, value)
        if matrix == SCORE:
            self._transfer[0].update(num_learned, task_index, value)

    # ------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the score matrices, each process's random-number state, and what identifies model and tasks.

        Quantised weights are left out: they are made from the model's again.
        """
        checkpoint["state_dict"] = without_quantised(self, checkpoint.get("state_dict", {}))
        checkpoint["agcl"] = {
            "scores": {name: matrix.compute().cpu() for name, matrix in self.score_matrices.items()},
            "random": Ranks.of_this_run().collected(self._random_numbers()),  # on all ranks
            "shapes": self._shapes(),
            "tasks": self._task_epochs(),
            "regime": self.tasks.regime,
            "task_begun": self._task_begun,
            "answers": self.answers.as_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits; within a run, restore the score matrices.

        Raises:
            AgclError: If the checkpoint is not agcl's, of another model or, within a run, of other tasks.
        """
        saved = checkpoint.get("agcl")
        if saved is None:
            raise AgclError("This checkpoint was not written by agcl: it holds no score matrix.")
        for change in self.checkpoint_changes:
            change(checkpoint)
        checkpoint["state_dict"] = with_quantised(self, checkpoint.get("state_dict", {}))
        ours = self._shapes()
        for name in sorted(saved["shapes"].keys() | ours.keys()):
            if saved["shapes"].get(name) != ours.get(name):
                raise AgclError(
                    f"The checkpoint is of another model: `{name}` is {saved['shapes'].get(name, 'absent')} there and "
                    f"{ours.get(name, 'absent')} in `{self.model_name_or_path}`. Resume with the configuration that it "
                    "was saved with."
                )
        if not self.score_matrices:  # the weights are loaded outside a run
            return
        _reopen_epoch(checkpoint)
        if saved["tasks"] != self._task_epochs():
            raise AgclError(
                f"The checkpoint was saved while learning the tasks {saved['tasks']} (name, epochs), but the "
                f"configuration declares {self._task_epochs()}. Resume with the configuration that it was saved with."
            )
        regime = saved.get("regime", "sequential")
        if regime != self.tasks.regime:
            raise AgclError(
                f"The checkpoint was saved with `regime: {regime}`, but the configuration says "
                f"`{self.tasks.regime}`. Resume with the configuration that it was saved with."
            )
        if missing := saved["scores"].keys() ^ self.score_matrices.keys():
            raise AgclError(
                "The checkpoint was saved with other `probes` than the configuration declares "
                f"({', '.join(sorted(missing))}). Resume with the configuration that it was saved with."
            )
        for name, scores in saved["scores"].items():
            for num_learned, task_index in scores.isfinite().nonzero().tolist():
                self._enter(name, num_learned, task_index, scores[num_learned, task_index])
        self._task_begun = saved["task_begun"]
        self.answers = AnswerRecord.from_dict(saved.get("answers", {}))
        self._random_states = saved["random"]
        self.trainer.num_sanity_val_steps = 0  # the scores before any training are among those restored

    def _random_numbers(self) -> dict[str, Tensor]:
        """The state of this process's generators."""
        on_device = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **on_device}

    def _restore_random_numbers(self) -> None:
        """Go on with those of this process; on another number of processes there is nothing to go on with."""
        states, self._random_states = self._random_states, []
        ranks = Ranks.of_this_run()
        if len(states) == ranks.size:
            torch.set_rng_state(states[ranks.rank]["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in states[ranks.rank]:
                torch.cuda.set_rng_state(states[ranks.rank]["cuda"].cpu(), self.device)

    def _task_epochs(self) -> list[list[Any]]:
        return [[task.name, task.epochs] for task in self.tasks]

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.named_parameters() if p.is_floating_point()}

    def save_pretrained(self, folder: str | Path, is_writer: bool = True) -> None:
        """Write the language model (or its adapters, as one) and tokenizer in Hugging Face format.

        Args:
            folder: Made if missing.
            is_writer: Whether this process writes; where weights are split over processes, all call this, one writes.
        """
        save_model(self.model, folder, is_writer)
        if is_writer:
            self.tokenizer.save_pretrained(folder)


def matrix_name(kind: str, probe: str | None) -> str:
    """Key of a score matrix: ``score`` or ``nll``, followed by the probe's name where it is one's."""
    return kind if probe is None else f"{kind}/{probe}"


def unscales_in_its_step(trainer: Trainer) -> bool:
    """Whether gradients are still scaled when the optimizer's step begins: a fused one under 16-mixed precision."""
    is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return is_scaled and any(group.get("fused") for group in trainer.optimizers[0].param_groups)


def _reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a resumed run go on within an epoch that a limit of the Trainer (max_steps, max_time) has cut short.

    Lightning counts such an epoch as passed, and would leave out the rest of it.
    """
    loop = checkpoint["loops"]["fit_loop"]
    counts = loop["epoch_progress"].values()  # of this run, and in total
    is_passed = all(0 < count["started"] == count["processed"] for count in counts)
    if is_passed and not loop["epoch_loop.batch_progress"]["is_last_batch"]:
        for count in counts:
            count["processed"] = count["completed"] = count["started"] - 1


def transfer_metrics(num_tasks: int) -> MetricCollection:
    """The continual-learning metrics, over one shared score matrix."""
    return MetricCollection(
        {
            "average_performance": AveragePerformance(num_tasks, sync_on_compute=False),
            "backward_transfer": BackwardTransfer(num_tasks, sync_on_compute=False),
            "forgetting": Forgetting(num_tasks, sync_on_compute=False),
            "forward_transfer": ForwardTransfer(num_tasks, sync_on_compute=False),
            "learning_accuracy": LearningAccuracy(num_tasks, sync_on_compute=False),
        }
    )
