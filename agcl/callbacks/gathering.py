"""From a task that a model has learned to the task's importance, and what is noted beside it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor, nn

from agcl.attribution.estimators import Estimator, Evidence
from agcl.attribution.fingerprints import fingerprint
from agcl.attribution.importance import ImportanceConfig, normalise
from agcl.attribution.levels import DTYPES, Bits
from agcl.attribution.passes import Sample
from agcl.callbacks.progress import activity
from agcl.data.samples import as_samples, resolve_seed, training_samples
from agcl.errors import AgclError


@dataclass
class Gathered:
    """A task's importance.

    Attributes:
        importance: Parameter name to fixed point, uint8 or uint16, on the model's device.
        num_used: Rows, answered correctly, that it rests on.
        metadata: What its file says about it (see :mod:`agcl.attribution.artefact`).
    """

    importance: dict[str, Tensor]
    num_used: int
    metadata: dict[str, str]


@dataclass
class Gatherer:
    """Scores a model on a task's rows and turns the scores into importance; the options are ``AttributionCallback``'s.

    Raises:
        AgclError: If an option has a value that is not allowed.
    """

    estimator: Estimator
    num_samples: int
    batch_size: int | None
    per_sample: bool
    config: ImportanceConfig
    bits: Bits
    parameters: str
    seed: int | None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise AgclError(f"`num_samples` is {self.num_samples}; importance needs at least one row.")
        if self.batch_size is not None and self.batch_size < 1:
            raise AgclError(f"`batch_size` is {self.batch_size}; choose 1 or more, or leave it out.")
        if self.bits not in DTYPES:
            raise AgclError(f"`importance_bits` is {self.bits}; choose 8 or 16.")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise AgclError(f"`parameters` is not a regular expression: {self.parameters!r} ({error}).") from error

    def check(self, trainer: Trainer, pl_module: Any) -> None:
        """Check, before anything is trained, that there are parameters to score and the estimator sees into the model.

        Raises:
            AgclError: If ``parameters`` matches none.
            UnsupportedModelError: From the estimator.
        """
        names = self.parameter_names(pl_module.model)
        if not names:
            raise AgclError(f"`parameters` {self.parameters!r} matches no trainable parameter of the model.")
        with trainer.precision_plugin.forward_context():
            self.estimator.check(pl_module.model, names, next(self._samples(trainer, pl_module, 0)))

    def begin_task(self, model: nn.Module) -> None:
        """Let the estimator see the weights that a task starts from."""
        self.estimator.begin_task(model, self.parameter_names(model))

    def gather(self, trainer: Trainer, pl_module: Any, task_index: int, kept: Dataset | None = None) -> Gathered | None:
        """Importance of a task on the model as it is now.

        Args:
            trainer: Whose precision, data module and progress bar are used.
            pl_module: The module around the model.
            task_index: 0-based, in the trainer's data module.
            kept: Rows of the task to use, all of them; None: of its training rows ``num_samples`` in a fixed random
                order. Either way, rows answered wrongly are left out.

        Returns:
            None if no row is answered correctly.
        """
        task = pl_module.tasks[task_index].name
        if kept is None:
            samples = self._samples(trainer, pl_module, task_index)
            num_rows = len(trainer.datamodule.training_rows(task_index))  # type: ignore[attr-defined]
            num_samples = min(self.num_samples, num_rows)
        else:
            samples, num_samples = as_samples(kept, pl_module.device), len(kept)
        shown = activity(trainer, f"Attribution of {task}", num_samples, "rows")
        with shown as advance, trainer.precision_plugin.forward_context():
            evidence = Evidence(
                pl_module.model,
                self.parameter_names(pl_module.model),
                samples,
                num_samples,
                batch_size=self.batch_size or trainer.datamodule.batch_size,  # type: ignore[attr-defined]
                per_sample=self.per_sample,
                config=self.config,
                seed=resolve_seed(self.seed, trainer.datamodule),  # type: ignore[attr-defined]
                on_progress=advance,
            )
            scores = self.estimator.scores(evidence)
        if not scores:
            return None
        metadata = self._metadata(pl_module, task, evidence.num_used)
        return Gathered(normalise(scores, self.config, self.bits), evidence.num_used, metadata)

    def parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters to score and gate."""
        named = model.named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and re.search(self.parameters, name)]

    def _samples(self, trainer: Trainer, pl_module: Any, task_index: int) -> Iterator[Sample]:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        return training_samples(datamodule, task_index, seed=self.seed, device=pl_module.device)

    def _metadata(self, pl_module: Any, task: str, num_samples: int) -> dict[str, str]:
        settings = {
            "task": task,
            "model": pl_module.model_name_or_path,
            "fingerprint": fingerprint(pl_module.model.named_parameters()),
            "num_samples": num_samples,
            **self.estimator.describe(),
            **vars(self.config),
        }
        return {key: str(value) for key, value in settings.items()}
