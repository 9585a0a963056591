"""From a task that a model has learned to the task's importance, and what is noted beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor, nn

from agcl.attribution.computing import importance_metadata
from agcl.attribution.estimators import Estimator, Evidence
from agcl.attribution.importance import ImportanceConfig, Parts, normalise
from agcl.attribution.levels import DTYPES, Bits
from agcl.attribution.naming import check_pattern, matching_parameters
from agcl.attribution.passes import Sample
from agcl.attribution.relevance import Observer
from agcl.callbacks.progress import activity
from agcl.data.samples import training_samples
from agcl.errors import AgclError
from agcl.evidence import task_evidence
from agcl.ranks import ALONE, Ranks
from agcl.results import shown_name
from agcl.shards import check_layout, has_shards


@dataclass
class Gathered:
    """A task's importance.

    Attributes:
        importance: Parameter name to fixed point, uint8 or uint16, on the model's device; where the model's weights are
            split over processes, this one's rows.
        num_used: Rows, answered correctly, that it rests on.
        metadata: What its file says about it (see :mod:`agcl.attribution.artefact`).
        shapes: Of the whole tensors.
    """

    importance: dict[str, Tensor]
    num_used: int
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


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
        if self.config.top_k is not None and self.config.top_k > self.num_samples:
            raise AgclError(
                f"`importance.top_k` is {self.config.top_k}, but there are only {self.num_samples} samples "
                "(`num_samples`): lower the one or raise the other."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise AgclError(f"`batch_size` is {self.batch_size}; choose 1 or more, or leave it out.")
        if self.bits not in DTYPES:
            raise AgclError(f"`importance_bits` is {self.bits}; choose 8 or 16.")
        check_pattern(self.parameters)

    def check(self, model: nn.Module, sample: Sample) -> None:
        """Check, before anything is trained, that there are parameters to score and the estimator sees into the model.

        Args:
            model: The model.
            sample: One of the first task's, answered right or wrong.

        Raises:
            AgclError: If ``parameters`` matches none.
            UnsupportedModelError: From the estimator.
        """
        names = self.names(model)
        if has_shards(model):
            check_layout(model)
            if not self.estimator.scores_shards:
                raise AgclError(
                    f"The estimator {type(self.estimator).__name__} does not score weights that are split over "
                    "processes (ModelParallelStrategy); take LRP, GradientWeight, Fisher, EmpiricalFisher, MAS, SPG, "
                    "Magnitude or Random, or `strategy: ddp`."
                )
        self.estimator.check(model, names, sample)

    def begin_task(self, model: nn.Module) -> None:
        """Let the estimator see the weights that a task starts from."""
        self.estimator.begin_task(model, self.names(model))

    def gather(
        self,
        trainer: Trainer,
        pl_module: Any,
        task_index: int,
        kept: Dataset | None = None,
        observe: Observer | None = None,
    ) -> Gathered | None:
        """Importance of a task on the model as it is now.

        Args:
            trainer: Whose precision, data module and progress bar are used.
            pl_module: The module around the model.
            task_index: 0-based, in the trainer's data module.
            kept: Rows of the task to use, all of them; None: of its training rows ``num_samples`` in a fixed random
                order. Either way, rows answered wrongly are left out.
            observe: See :class:`Evidence`.

        Returns:
            None if no row is answered correctly.
        """
        ranks = Ranks.of_this_run() if self.estimator.shares_samples else ALONE
        task = pl_module.tasks[task_index].name
        rows = trainer.datamodule.training_rows(task_index) if kept is None else kept  # type: ignore[attr-defined]
        num_samples = min(self.num_samples, len(rows)) if kept is None else len(kept)
        shown = activity(trainer, f"Attribution of {task}", num_samples, "rows")
        with shown as advance, trainer.precision_plugin.forward_context():
            evidence = self.evidence(
                trainer,
                pl_module,
                task_index,
                num_samples,
                rows=kept,
                ranks=ranks,
                on_progress=advance,
                observe=observe,
            )
            scores = self.estimator.scores(evidence)
        if not scores:
            return None
        is_sharded = has_shards(pl_module.model)
        shapes = {name: tuple(p.shape) for name, p in pl_module.model.named_parameters() if name in scores}
        parts = Parts(Ranks.of_this_run() if is_sharded else ranks, shapes, keeps_whole=not is_sharded)
        metadata = self._metadata(pl_module, task, evidence.num_used)
        return Gathered(normalise(scores, self.config, self.bits, parts), evidence.num_used, metadata, shapes)

    def evidence(
        self, trainer: Trainer, pl_module: Any, task_index: int, num_samples: int | None = None, **options: Any
    ) -> Evidence:
        """The rows that a task is scored on, and the parameters."""
        return task_evidence(
            trainer,
            pl_module,
            task_index,
            self.parameters,
            num_samples or self.num_samples,
            seed=self.seed,
            batch_size=self.batch_size,
            per_sample=self.per_sample,
            config=self.config,
            **options,
        )

    def text_evidence(
        self, trainer: Trainer, pl_module: Any, pieces: Sequence[Sample], on_progress: Callable[[int], None]
    ) -> Evidence:
        """Text of no task, and the parameters."""
        return Evidence(
            pl_module.model,
            self.names(pl_module.model),
            pieces,
            len(pieces),
            batch_size=self.batch_size or trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            config=self.config,
            only_correct=False,  # what was drawn is seldom the likeliest
            on_progress=on_progress,
        )

    def names(self, model: nn.Module) -> list[str]:
        """Of the parameters that are scored."""
        return matching_parameters(model, self.parameters)

    def samples(self, trainer: Trainer, pl_module: Any, task_index: int) -> Iterator[Sample]:
        """A task's training rows in a fixed random order, as samples."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        return training_samples(datamodule, task_index, seed=self.seed, device=pl_module.device)

    def _metadata(self, pl_module: Any, task: str, num_samples: int) -> dict[str, str]:
        settings = importance_metadata(pl_module.model, task, num_samples, self.estimator, self.config)
        settings["model"] = shown_name(pl_module.model_name_or_path)
        return {key: str(value) for key, value in settings.items()}
