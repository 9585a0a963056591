"""Importance of every weight at each task boundary, and the gate that protects it while the next task is learned."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm

from agcl.attribution.artefact import check_importance, save_importance
from agcl.attribution.estimators import LRP, Estimator, Evidence
from agcl.attribution.fingerprints import fingerprint
from agcl.attribution.importance import ImportanceConfig, normalise
from agcl.attribution.merging import How, RunningMerge
from agcl.attribution.passes import Sample
from agcl.data.tasks import IGNORED_LABEL
from agcl.errors import AgclError
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate, flattened, shuffled


class AttributionCallback(Callback):
    """Attribution-guided continual learning (arXiv 2605.05285) on a ``ContinualLM`` and a ``ContinualDataModule``.

    At each task boundary every weight is scored on correctly answered training rows; the scores become the task's
    importance in [0, 1], which is written to ``importance/`` in the run's folder and merged with the earlier
    tasks'. While the next task is learned, each weight moves by ``(1 - importance) ** strength`` of what it would
    have.

    Args:
        gate: ``gradient`` rescales gradients by backward hooks (the paper; cancelled by Adam-like optimizers),
            ``update`` rescales the optimizer's whole step, ``auto`` picks what protects under the optimizer in use.
        estimator: What scores the weights, from ``agcl.attribution.estimators``: ``LRP`` (the paper's; the default),
            ``GradientWeight``, ``Fisher``, ``EmpiricalFisher``, ``MAS``, ``SPG``, ``Wanda``, ``Magnitude``, ``Change``,
            ``Random``, or one's own.
        num_samples: Rows, answered correctly, that each task's importance is computed from.
        batch_size: Rows that are run together; None means as many as in training.
        per_sample: Whether each row counts as one draw, or the sum over a batch does, which is cheaper.
        importance: How scores over samples become importance: sign, normalisation and its scope, K, alpha.
        merge: Over tasks: ``maximum`` (the paper), ``mean`` or ``probabilistic_or``.
        strength: Exponent of the plasticity; 1 is the paper's linear gate, 0 no gate.
        parameters: Regular expression; only parameters whose name it is found in are attributed and gated.
        control: ``shuffled`` permutes the importance within each tensor, ``flattened`` makes it uniform: gates of equal
            mean without attribution, to compare with.
        seed: Choice of the rows; permutation of the shuffled control.

    Raises:
        AgclError: On set-up or at the start of fitting, before any training: settings that cannot work, or a model that
            attribution cannot see into.
    """

    def __init__(
        self,
        gate: Literal["auto", "gradient", "update"] = "auto",
        estimator: Estimator | None = None,
        num_samples: int = 16,
        batch_size: int | None = None,
        per_sample: bool = True,
        importance: ImportanceConfig = ImportanceConfig(),  # noqa: B008 (immutable)
        merge: How = "maximum",
        strength: float = 1.0,
        parameters: str = "",
        control: Literal["none", "shuffled", "flattened"] = "none",
        seed: int = 0,
    ) -> None:
        if num_samples < 1:
            raise AgclError(f"`num_samples` is {num_samples}; importance needs at least one row.")
        if batch_size is not None and batch_size < 1:
            raise AgclError(f"`batch_size` is {batch_size}; choose 1 or more, or leave it out.")
        if strength < 0:
            raise AgclError(f"`strength` is {strength}; choose 0 (no gate) or more.")
        try:
            self._pattern = re.compile(parameters)
        except re.error as error:
            raise AgclError(f"`parameters` is not a regular expression: {parameters!r} ({error}).") from error
        self.gate = gate
        self.estimator = LRP() if estimator is None else estimator
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.per_sample = per_sample
        self.config = importance
        self.strength = strength
        self.control = control
        self.seed = seed
        self._merged = RunningMerge(merge)
        self.files: dict[str, str] = {}
        """Task name -> file with that task's own importance."""
        self.num_boundaries = 0
        """Number of task boundaries passed, those included where nothing was answered correctly."""
        self._attached: GradientGate | UpdateGate | None = None

    @property
    def importance(self) -> dict[str, Tensor]:
        """Merged importance of the tasks learned: parameter name -> uint8 fixed point (value / 255)."""
        return self._merged.importance()

    # --------------------------------------------------------------- life cycle

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check regime, optimizer, parameters and architecture before anything is trained."""
        if pl_module.tasks.regime == "joint":
            raise AgclError(
                "AttributionCallback protects old tasks from new ones; `regime: joint` has neither. Leave it out."
            )
        optimizer = self._optimizer(trainer)
        if self.gate == "gradient" and cancels_gradient_gate(optimizer):
            rank_zero_warn(
                f"gate: gradient protects nothing under {type(optimizer).__name__}, whose step does not change when a "
                "gradient entry is scaled by a constant. Use gate: update (or auto), or SGD."
            )
        names = self._parameter_names(pl_module)
        if not names:
            raise AgclError(f"`parameters` {self._pattern.pattern!r} matches no trainable parameter of the model.")
        with trainer.precision_plugin.forward_context():
            self.estimator.check(self._model(pl_module), names, next(self._samples(trainer, pl_module, 0)))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming: bring along the earlier tasks' files, make up for a task boundary, gate again."""
        check_importance(self.importance, self._model(pl_module).named_parameters())
        self._collect_files(trainer)
        completed = pl_module.tasks.num_completed(trainer.current_epoch)
        if completed:
            # From a checkpoint of an epoch's last batch, Lightning goes on without that epoch's end.
            self._pass_boundary(trainer, pl_module, completed - 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task's first epoch: let the estimator see the weights that the task starts from."""
        if pl_module.tasks.starts_at(trainer.current_epoch):
            self.estimator.begin_task(self._model(pl_module), self._parameter_names(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task boundary: importance of the task just learned, running maximum, new gate."""
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self._pass_boundary(trainer, pl_module, pl_module.tasks.index_at(trainer.current_epoch))

    def _pass_boundary(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        # On resuming, Lightning may run an epoch's end again, or never have run it: what is there is kept.
        if self.num_boundaries <= index:
            self._learn_importance(trainer, pl_module, index)
            self.num_boundaries = index + 1
        if self.files:
            self._attach_gate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave no hook behind."""
        self._detach_gate()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind; Lightning does not call the end-of-fit hooks on errors."""
        self._detach_gate()

    def state_dict(self) -> dict[str, Any]:
        """Merged importance (uint8), task counter and the tasks' files: what resuming needs."""
        return {
            "merged": self._merged.state_dict(),
            "estimator": self.estimator.state_dict(),
            "num_boundaries": self.num_boundaries,
            "files": dict(self.files),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._merged.load_state_dict(state_dict["merged"])
        self.estimator.load_state_dict(state_dict["estimator"])
        self.num_boundaries = state_dict["num_boundaries"]
        self.files = dict(state_dict["files"])

    # --------------------------------------------------------------- importance

    def _learn_importance(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        task = pl_module.tasks[index].name
        start = time.perf_counter()
        scores, num_used = self._scores(trainer, pl_module, index)
        if not scores:
            rank_zero_warn(
                f"Task `{task}`: no training row is answered correctly, so it has no importance and the following "
                "tasks are free to overwrite it. Train it longer or with a higher learning rate."
            )
            return
        importance = normalise(scores, self.config)
        path = Path(trainer.log_dir or trainer.default_root_dir) / "importance" / f"{index:02d}_{task}.safetensors"
        if trainer.is_global_zero:
            save_importance(path, importance, self._metadata(pl_module, task, num_used))
        self.files[task] = str(path)
        self._merged.update(importance)
        seconds = time.perf_counter() - start
        for logger in trainer.loggers:  # not self.log, which the start of a resumed run does not allow
            values = {"attribution/seconds": seconds, "attribution/samples": float(num_used)}
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(f"Importance of task `{task}` from {num_used} rows in {seconds:.0f} s: {path}")

    def _scores(self, trainer: Trainer, pl_module: Any, index: int) -> tuple[dict[str, Tensor], int]:
        bar = tqdm(
            total=self.num_samples,
            desc=f"Attribution of {pl_module.tasks[index].name}",
            unit="row",
            disable=trainer.progress_bar_callback is None or not trainer.is_global_zero,
            dynamic_ncols=True,
        )
        with bar, trainer.precision_plugin.forward_context():
            evidence = Evidence(
                self._model(pl_module),
                self._parameter_names(pl_module),
                self._samples(trainer, pl_module, index),
                self.num_samples,
                batch_size=self.batch_size or trainer.datamodule.batch_size,  # type: ignore[attr-defined]
                per_sample=self.per_sample,
                config=self.config,
                seed=self.seed,
                on_progress=bar.update,
            )
            return self.estimator.scores(evidence), evidence.num_used

    def _samples(self, trainer: Trainer, pl_module: Any, index: int) -> Iterator[Sample]:
        """A task's training rows in a fixed random order."""
        rows = trainer.datamodule.training_rows(index)  # type: ignore[attr-defined]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        for row in order.tolist():
            input_ids, labels = (
                torch.tensor(rows[row][key], device=pl_module.device) for key in ("input_ids", "labels")
            )
            answer = (labels != IGNORED_LABEL).nonzero().flatten()
            # The logits at one position predict the next token.
            yield Sample(input_ids, positions=answer - 1, targets=labels[answer])

    def _parameter_names(self, pl_module: Any) -> list[str]:
        named = self._model(pl_module).named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and self._pattern.search(name)]

    def _metadata(self, pl_module: Any, task: str, num_samples: int) -> dict[str, str]:
        settings = {
            "task": task,
            "model": pl_module.model_name_or_path,
            "fingerprint": fingerprint(self._model(pl_module).named_parameters()),
            "num_samples": num_samples,
            **self.estimator.describe(),
            **vars(self.config),
        }
        return {key: str(value) for key, value in settings.items()}

    def _collect_files(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "importance"
        for task, path in self.files.items():
            copy = folder / Path(path).name
            if copy.exists():
                continue
            if not Path(path).exists():
                rank_zero_warn(
                    f"The importance file of task `{task}` is gone: {path}. The run itself does not need it."
                )
            elif trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)

    # --------------------------------------------------------------------- gate

    def _attach_gate(self, trainer: Trainer, pl_module: Any) -> None:
        self._detach_gate()
        importance = self.importance
        if self.control == "shuffled":
            importance = shuffled(importance, self.seed)
        elif self.control == "flattened":
            importance = flattened(importance)
        optimizer = self._optimizer(trainer)
        kind = choose_gate(optimizer) if self.gate == "auto" else self.gate
        gate_class = GradientGate if kind == "gradient" else UpdateGate
        gate = gate_class(self._model(pl_module).named_parameters(), importance, self.strength)
        self._attached = gate.attach(optimizer)

    def _detach_gate(self) -> None:
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    def plasticity(self) -> dict[str, float]:
        """Mean remaining plasticity of each gated parameter, in [0, 1]; empty before the first task boundary."""
        return {} if self._attached is None else self._attached.plasticity()

    @staticmethod
    def _model(pl_module: Any) -> nn.Module:
        return pl_module.model

    @staticmethod
    def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
        if len(trainer.optimizers) != 1:
            raise AgclError(
                f"AttributionCallback gates exactly one optimizer; the module has {len(trainer.optimizers)}."
            )
        return trainer.optimizers[0]
