"""What an estimator of importance is: from a model and samples of a task to one score per weight."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from agcl.attribution.importance import ImportanceConfig
from agcl.attribution.passes import Sample, selected_parameters
from agcl.attribution.uses import Use
from agcl.ranks import ALONE, Ranks


@dataclass
class Evidence:
    """What an estimator may look at when a task has been learned.

    Attributes:
        model: The model that has learned the task.
        parameters: Names of the parameters to score.
        samples: The task's training rows in a fixed random order.
        num_samples: Number of rows to use.
        batch_size: Rows that are run together.
        per_sample: Whether each row of a batch counts as one draw, or the batch's sum does.
        config: How scores are aggregated over samples.
        seed: For estimators that draw random numbers.
        only_correct: Whether rows that the model answers wrongly are skipped, and not counted.
        ranks: The processes that share the samples; all have the same ones.
        on_progress: Called with the number of further samples that were used.
        observe: As for :func:`agcl.attribution.attribute_batch`, for those who want to know more of the same passes.
            Estimators made of each sample's gradient see to it, in one process and with ``per_sample``.
        num_used: Set by the estimator: number of samples that the scores rest on.
    """

    model: nn.Module
    parameters: Sequence[str]
    samples: Iterable[Sample]
    num_samples: int
    batch_size: int = 1
    per_sample: bool = True
    config: ImportanceConfig = field(default_factory=ImportanceConfig)
    seed: int = 0
    only_correct: bool = True
    ranks: Ranks = ALONE
    on_progress: Callable[[int], None] = lambda count: None
    observe: Callable[[str, Use, Tensor], None] | None = None
    num_used: int = 0

    @property
    def num_draws(self) -> int:
        """How many draws the scores will be aggregated over, if nothing is answered wrongly."""
        return self.num_samples if self.per_sample else math.ceil(self.num_samples / self.batch_size)

    def batches(self) -> Iterator[list[Sample]]:
        """Rows to be run together by all processes, until ``num_used``, set meanwhile, says that enough were used."""
        samples = iter(self.samples)
        while missing := max(self.num_samples - self.num_used, 0):
            batch = list(itertools.islice(samples, min(self.batch_size * self.ranks.size, missing)))
            if not batch:
                return
            yield batch

    def selected(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of those to score, in the model's order."""
        return selected_parameters(self.model, self.parameters)


class Estimator(ABC):
    """One score per weight and task. A subclass implements `scores`; its constructor's arguments are its options.

    Attributes:
        uses_samples: Whether the scores depend on the task's rows.
        shares_samples: Whether several processes share the samples (``Evidence.ranks``); each then scores its part of
            every tensor.
        scores_shards: Whether it scores weights that are split over processes (FSDP2).
    """

    uses_samples: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = False
    scores_shards: ClassVar[bool] = False

    def check(self, model: nn.Module, parameters: Sequence[str], sample: Sample) -> None:  # noqa: B027 (a hook)
        """Called before anything is trained: raise if `scores` could not see into this model.

        Args:
            model: The model.
            parameters: Names of the parameters to score.
            sample: One of the first task's, answered right or wrong.

        Raises:
            UnsupportedModelError: With the remedy.
        """

    def begin_task(self, model: nn.Module, parameters: Sequence[str]) -> None:  # noqa: B027 (a hook, not abstract)
        """Called before a task is trained.

        Args:
            model: The model as the task will find it.
            parameters: Names of the parameters to score.
        """

    @abstractmethod
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score every weight for the task just learned.

        Args:
            evidence: Model, samples and settings; ``num_used`` is set.

        Returns:
            Name -> score >= 0, float32, the parameter's shape, or of several ``evidence.ranks`` this one's part of it;
            empty if no sample is used (none is answered correctly).
        """

    def state_dict(self) -> dict[str, Any]:
        """What resuming in the middle of a task needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Restore what `state_dict` gave."""

    def describe(self) -> dict[str, str]:
        """Name and options, for the metadata of importance files."""
        options = {key: str(value) for key, value in vars(self).items() if not key.startswith("_")}
        return {"estimator": type(self).__name__, **options}
