"""torchmetrics classes: the score matrix, and the continual-learning metrics that follow from it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from agcl.errors import AgclError
from agcl.metrics import functional
from agcl.metrics.figure import plot_score_matrix


class ScoreMatrix(Metric):
    r"""Scores of all tasks before any training and after each task.

    .. math:: a_{t,i} = \text{score on task } i \text{ after learning } t \text{ tasks}

    As input to ``update`` the metric takes the number of tasks ``learned`` so far (int in [0, T]), the 0-based index
    of the ``task`` scored (int), its ``score`` (scalar) and a ``weight`` (for instance the number of rows behind the
    score, where ranks score different rows). A cell is the weighted mean of its updates, over all ranks.

    As output of ``compute`` it returns a float64 tensor of shape ``(T + 1, T)``, NaN where nothing was measured.

    Args:
        num_tasks: Number of tasks T in the sequence.
        kwargs: Further arguments of ``torchmetrics.Metric``.

    Raises:
        AgclError: If ``num_tasks`` is below 1; on update, if an index is out of range or the score is not finite.

    Example:
        >>> matrix = ScoreMatrix(num_tasks=2)
        >>> matrix.update(learned=1, task=0, score=0.75)
        >>> matrix.compute()
        tensor([[   nan,    nan],
                [0.7500,    nan],
                [   nan,    nan]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False

    weighted_scores: Tensor
    weights: Tensor

    def __init__(self, num_tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1:
            raise AgclError(f"`num_tasks` is {num_tasks}; a sequence has at least one task.")
        self.num_tasks = num_tasks
        empty = torch.zeros(num_tasks + 1, num_tasks, dtype=torch.float64)
        # Persistent, unlike torchmetrics' default: the matrix is the result of hours and must survive resuming.
        self.add_state("weighted_scores", empty.clone(), dist_reduce_fx="sum", persistent=True)
        self.add_state("weights", empty.clone(), dist_reduce_fx="sum", persistent=True)

    def update(self, learned: int, task: int, score: Tensor | float, weight: float = 1.0) -> None:
        """Enter the score of one task."""
        if not 0 <= learned <= self.num_tasks:
            raise AgclError(f"`learned` is {learned}; with {self.num_tasks} tasks it lies in [0, {self.num_tasks}].")
        if not 0 <= task < self.num_tasks:
            raise AgclError(f"`task` is {task}; with {self.num_tasks} tasks it lies in [0, {self.num_tasks - 1}].")
        value = float(score)
        if value != value or abs(value) == float("inf"):
            raise AgclError(f"The score of task {task} after {learned} tasks is {value}; it must be finite.")
        self.weighted_scores[learned, task] += value * weight
        self.weights[learned, task] += weight

    def compute(self) -> Tensor:
        """The matrix so far."""
        return self.weighted_scores / self.weights  # 0 / 0 is NaN: not measured

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the matrix as an annotated heat map.

        Args:
            val: A matrix to draw; the present one if left out.
            ax: Matplotlib axes to draw on; a new figure if left out.

        Returns:
            Figure and axes.
        """
        names = [f"task {index + 1}" for index in range(self.num_tasks)]
        return plot_score_matrix(self.compute() if val is None else val, names, ax=ax)


class _TransferMetric(ScoreMatrix):
    """A number that follows from the score matrix; all of them share one state in a ``MetricCollection``."""

    _function: Callable[[Tensor], Tensor]

    def compute(self) -> Tensor:
        """The metric for the tasks learned so far; NaN where undefined."""
        return type(self)._function(super().compute())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or a sequence of values over the tasks; returns figure and axes."""
        return self._plot(val, ax)


class AveragePerformance(_TransferMetric):
    r"""Mean score on the tasks learned so far.

    .. math:: \text{AP} = \frac{1}{t} \sum_{i \le t} a_{t,i}

    Input and arguments as for :class:`ScoreMatrix`; ``compute`` returns a float64 scalar.

    Example:
        >>> metric = AveragePerformance(num_tasks=2)
        >>> metric.update(learned=1, task=0, score=0.5)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    _function = staticmethod(functional.average_performance)


class BackwardTransfer(_TransferMetric):
    r"""Mean change of the earlier tasks' scores since they were learned; negative values mean forgetting.

    .. math:: \text{BWT} = \frac{1}{t-1} \sum_{i < t} (a_{t,i} - a_{i,i})

    Input and arguments as for :class:`ScoreMatrix`; ``compute`` returns a float64 scalar, NaN before the second task.

    Example:
        >>> metric = BackwardTransfer(num_tasks=2)
        >>> for learned, task, score in [(1, 0, 1.0), (2, 0, 0.25), (2, 1, 1.0)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(-0.7500, dtype=torch.float64)
    """

    _function = staticmethod(functional.backward_transfer)


class Forgetting(_TransferMetric):
    r"""Mean drop of the earlier tasks' scores from the best one they had since training began.

    .. math:: F = \frac{1}{t-1} \sum_{i < t} (\max_{1 \le s < t} a_{s,i} - a_{t,i})

    Input and arguments as for :class:`ScoreMatrix`; ``compute`` returns a float64 scalar, NaN before the second task.

    Example:
        >>> metric = Forgetting(num_tasks=2)
        >>> for learned, task, score in [(1, 0, 1.0), (2, 0, 0.25), (2, 1, 1.0)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = False
    _function = staticmethod(functional.forgetting)


class ForwardTransfer(_TransferMetric):
    r"""Mean gain of the tasks' scores, before they are learned themselves, from learning the tasks before them.

    .. math:: \text{FWT} = \frac{1}{t-1} \sum_{1 < i \le t} (a_{i-1,i} - a_{0,i})

    Input and arguments as for :class:`ScoreMatrix`; ``compute`` returns a float64 scalar, NaN before the second task
    and where the scores before any training were not measured.

    Example:
        >>> metric = ForwardTransfer(num_tasks=2)
        >>> for learned, task, score in [(0, 1, 0.0), (1, 1, 0.25), (2, 1, 1.0)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    _function = staticmethod(functional.forward_transfer)


class LearningAccuracy(_TransferMetric):
    r"""Mean score that each task had right after it was learned.

    .. math:: \text{LA} = \frac{1}{t} \sum_{i \le t} a_{i,i}

    Input and arguments as for :class:`ScoreMatrix`; ``compute`` returns a float64 scalar.

    Example:
        >>> metric = LearningAccuracy(num_tasks=2)
        >>> for learned, task, score in [(1, 0, 1.0), (2, 0, 0.25), (2, 1, 0.5)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    _function = staticmethod(functional.learning_accuracy)
