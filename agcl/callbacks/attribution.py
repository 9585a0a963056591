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

from agcl.attribution import attribute_sample
from agcl.attribution.artefact import check_importance, save_importance
from agcl.attribution.importance import ImportanceConfig, SampleAggregator, normalise
from agcl.attribution.merging import merge_maximum
from agcl.attribution.relevance import GradientRule
from agcl.data.tasks import IGNORED_LABEL
from agcl.errors import AgclError
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate, flattened, shuffled


class AttributionCallback(Callback):
    """Attribution-guided continual learning (arXiv 2605.05285) on a ``ContinualLM`` and a ``ContinualDataModule``.

    At each task boundary the relevance of every weight for correctly answered training rows is aggregated to the task's
    importance in [0, 1], written to ``importance/`` in the run's folder, and merged into the running maximum over the
    tasks. While the next task is learned, each weight moves by ``(1 - importance) ** strength`` of what it would have.

    Args:
        gate: ``gradient`` rescales gradients by backward hooks (the paper; cancelled by Adam-like optimizers),
            ``update`` rescales the optimizer's whole step, ``auto`` picks what protects under the optimizer in use.
        rule: ``attnlrp``, ``cplrp``, or ``none``: the plain gradient without LRP rules.
        score: ``relevance``: weight times gradient, as in the paper. ``sensitivity``: the squared gradient, that is the
            squared relevance per unit of weight; it suits optimizers like Adam, whose step hardly depends on the
            weight's size.
        num_samples: Rows, answered correctly, that each task's importance is computed from.
        importance: How relevance over samples becomes importance: sign, normalisation and its scope, K, alpha.
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
        rule: GradientRule = "attnlrp",
        score: Literal["relevance", "sensitivity"] = "relevance",
        num_samples: int = 16,
        importance: ImportanceConfig = ImportanceConfig(),  # noqa: B008 (immutable)
        strength: float = 1.0,
        parameters: str = "",
        control: Literal["none", "shuffled", "flattened"] = "none",
        seed: int = 0,
    ) -> None:
        if num_samples < 1:
            raise AgclError(f"`num_samples` is {num_samples}; importance needs at least one row.")
        if strength < 0:
            raise AgclError(f"`strength` is {strength}; choose 0 (no gate) or more.")
        try:
            self._pattern = re.compile(parameters)
        except re.error as error:
            raise AgclError(f"`parameters` is not a regular expression: {parameters!r} ({error}).") from error
        self.gate = gate
        self.rule: GradientRule = rule
        self.score = score
        self.num_samples = num_samples
        self.config = importance
        self.strength = strength
        self.control = control
        self.seed = seed
        self.importance: dict[str, Tensor] = {}
        """Running maximum over the tasks learned: parameter name -> uint8 fixed point (value / 255)."""
        self.files: dict[str, str] = {}
        """Task name -> file with that task's own importance."""
        self.num_boundaries = 0
        """Number of task boundaries passed, those included where nothing was answered correctly."""
        self._attached: GradientGate | UpdateGate | None = None

    # --------------------------------------------------------------- life cycle

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check optimizer, parameters and architecture before anything is trained."""
        optimizer = self._optimizer(trainer)
        if self.gate == "gradient" and cancels_gradient_gate(optimizer):
            rank_zero_warn(
                f"gate: gradient protects nothing under {type(optimizer).__name__}, whose step does not change when a "
                "gradient entry is scaled by a constant. Use gate: update (or auto), or SGD."
            )
        if not self._parameter_names(pl_module):
            raise AgclError(f"`parameters` {self._pattern.pattern!r} matches no trainable parameter of the model.")
        self._attribute(trainer, pl_module, next(self._samples(trainer, 0)), lambda *_: None, only_correct=False)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming: bring along the earlier tasks' files, make up for a task boundary, gate again."""
        check_importance(self.importance, self._model(pl_module).named_parameters())
        self._collect_files(trainer)
        completed = pl_module.tasks.num_completed(trainer.current_epoch)
        if completed:
            # From a checkpoint of an epoch's last batch, Lightning goes on without that epoch's end.
            self._pass_boundary(trainer, pl_module, completed - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task boundary: importance of the task just learned, running maximum, new gate."""
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self._pass_boundary(trainer, pl_module, pl_module.tasks.index_at(trainer.current_epoch))

    def _pass_boundary(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        # On resuming, Lightning may run an epoch's end again, or never have run it: what is there is kept.
        if self.num_boundaries <= index:
            self._learn_importance(trainer, pl_module, index)
            self.num_boundaries = index + 1
        if self.importance:
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
            "importance": dict(self.importance),
            "num_boundaries": self.num_boundaries,
            "files": dict(self.files),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.importance = dict(state_dict["importance"])
        self.num_boundaries = state_dict["num_boundaries"]
        self.files = dict(state_dict["files"])

    # --------------------------------------------------------------- importance

    def _learn_importance(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        task = pl_module.tasks[index].name
        start = time.perf_counter()
        aggregator = self._aggregate(trainer, pl_module, index)
        if aggregator.num_samples == 0:
            rank_zero_warn(
                f"Task `{task}`: no training row is answered correctly, so it has no importance and the following "
                "tasks are free to overwrite it. Train it longer or with a higher learning rate."
            )
            return
        importance = normalise(aggregator.aggregate(), self.config)
        path = Path(trainer.log_dir or trainer.default_root_dir) / "importance" / f"{index:02d}_{task}.safetensors"
        if trainer.is_global_zero:
            save_importance(path, importance, self._metadata(pl_module, task, aggregator.num_samples))
        self.files[task] = str(path)
        # Clipping negative parts (Eq. 12) is done by the aggregator, so the maximum is all that is left.
        self.importance = merge_maximum(self.importance, importance)
        seconds = time.perf_counter() - start
        for logger in trainer.loggers:  # not self.log, which the start of a resumed run does not allow
            values = {"attribution/seconds": seconds, "attribution/samples": float(aggregator.num_samples)}
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(f"Importance of task `{task}` from {aggregator.num_samples} rows in {seconds:.0f} s: {path}")

    def _aggregate(self, trainer: Trainer, pl_module: Any, index: int) -> SampleAggregator:
        aggregator = SampleAggregator(self.config)

        def consume(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
            is_relevance = self.score == "relevance"
            aggregator.update(name, gradient.mul_(parameter.detach()) if is_relevance else gradient.square_())

        bar = tqdm(
            total=self.num_samples,
            desc=f"Attribution of {pl_module.tasks[index].name}",
            unit="row",
            disable=trainer.progress_bar_callback is None or not trainer.is_global_zero,
            dynamic_ncols=True,
        )
        with bar:
            for sample in self._samples(trainer, index):
                bar.update(int(self._attribute(trainer, pl_module, sample, consume, only_correct=True)))
                if bar.n == self.num_samples or aggregator.num_samples == self.num_samples:
                    break
        return aggregator

    def _attribute(
        self, trainer: Trainer, pl_module: Any, labelled: tuple[Tensor, Tensor], consume: Any, **kwargs: Any
    ) -> bool:
        input_ids, labels = (tensor.to(pl_module.device) for tensor in labelled)
        answer = (labels != IGNORED_LABEL).nonzero().flatten()
        with trainer.precision_plugin.forward_context():
            return attribute_sample(
                self._model(pl_module),
                input_ids[None],
                positions=answer - 1,  # the logits at one position predict the next token
                targets=labels[answer],
                consume=consume,
                rule=self.rule,
                parameters=self._parameter_names(pl_module),
                **kwargs,
            )

    def _samples(self, trainer: Trainer, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and labels of a task's training rows in a fixed random order."""
        rows = trainer.datamodule.training_rows(index)  # type: ignore[attr-defined]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        for row in order.tolist():
            yield torch.tensor(rows[row]["input_ids"]), torch.tensor(rows[row]["labels"])

    def _parameter_names(self, pl_module: Any) -> list[str]:
        named = self._model(pl_module).named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and self._pattern.search(name)]

    def _metadata(self, pl_module: Any, task: str, num_samples: int) -> dict[str, str]:
        settings = {"rule": self.rule, "score": self.score, "num_samples": num_samples, **vars(self.config)}
        return {"task": task, "model": pl_module.model_name_or_path, **{k: str(v) for k, v in settings.items()}}

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
