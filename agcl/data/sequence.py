"""The tasks of a run in the order of learning, and which of its epochs each takes part in."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

from agcl.data.tasks import Task
from agcl.errors import AgclError, check_choice, raise_any

Regime = Literal["sequential", "joint"]


class TaskSequence(Sequence[Task]):
    """Tasks in the order of learning, with the epochs of training that each takes part in.

    A task boundary is the end of an epoch after which more tasks count as learned than before it. Under ``sequential``
    each task owns a contiguous range of epochs, with its boundary at the end. Under ``joint`` all tasks begin with
    epoch 0, one with ``epochs: e`` takes part in the first ``e``, and the only boundary is the end of the run: each
    row is passed as often as under ``sequential``.

    Args:
        tasks: The tasks.
        regime: One after another, or all together.

    Raises:
        AgclError: If there is no task, or two share a name.
    """

    def __init__(self, tasks: Sequence[Task], regime: Regime = "sequential") -> None:
        if not tasks:
            raise AgclError("`tasks` is empty: declare at least one task.")
        check_choice("regime", regime, Regime)
        names = [task.name for task in tasks]
        raise_any(
            f"Two tasks are named `{name}`: task names must differ."
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        )
        self._tasks = list(tasks)
        self.regime = regime
        epochs = [task.epochs for task in tasks]
        # Number of epochs after which each task counts as learned.
        self._ends = [max(epochs)] * len(epochs) if regime == "joint" else list(accumulate(epochs))

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: Any) -> Any:
        return self._tasks[index]

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run: the Trainer's ``max_epochs``."""
        return self._ends[-1]

    def index_at(self, epoch: int) -> int:
        """0-based index of the task that training epoch ``epoch`` (0-based) belongs to; beyond the end, the last.

        Under ``joint``, where an epoch belongs to no single task, the first one's until the end of training.
        """
        return min(self.num_completed(epoch), len(self) - 1)

    def indices_at(self, epoch: int) -> list[int]:
        """0-based indices of the tasks whose rows are trained on in an epoch."""
        if self.regime == "joint":
            return [index for index, task in enumerate(self) if task.epochs > epoch]
        return [self.index_at(epoch)]

    def name_at(self, epoch: int) -> str:
        """What is learned in an epoch, as tags and displays call it: the task's name, or ``joint``."""
        return "joint" if self.regime == "joint" else self[self.index_at(epoch)].name

    def segment(self, epoch: int) -> range:
        """The epochs from one task boundary to the next that ``epoch`` lies in; beyond the end, the last ones.

        Optimizer and learning-rate schedule begin afresh with each segment.
        """
        stop = self._ends[self.index_at(epoch)]
        return range(max((end for end in self._ends if end < stop), default=0), stop)

    def epoch_in_task(self, epoch: int) -> int:
        """0-based epoch within its segment, which is its task's under ``sequential``."""
        return epoch - self.segment(epoch).start

    def starts_at(self, epoch: int) -> bool:
        """Whether ``epoch`` is the first one of a segment."""
        return self.epoch_in_task(epoch) == 0

    def num_completed(self, epoch: int) -> int:
        """Number of tasks that count as learned before ``epoch``."""
        return bisect_right(self._ends, epoch)

    def ends_at(self, epoch: int) -> bool:
        """Whether ``epoch`` is the last one before a task boundary."""
        return epoch + 1 in self._ends


def in_order(tasks: Sequence[Task], order: Sequence[str]) -> list[Task]:
    """The tasks, rearranged.

    Args:
        tasks: The tasks.
        order: The names of all of them.

    Raises:
        AgclError: If a name is unknown, missing, or there twice.
    """
    by_name = {task.name: task for task in tasks}
    raise_any(order_problems(list(by_name), order))
    return [by_name[name] for name in order]


def order_problems(declared: Sequence[str], order: Sequence[str]) -> Iterator[str]:
    """What is wrong with an order of learning, given the names of all tasks."""
    for name in dict.fromkeys(order):
        if name not in declared:
            yield f"`order` names `{name}`, which is no task; declared are {', '.join(declared)}."
        elif list(order).count(name) > 1:
            yield f"`order` names `{name}` more than once."
    missing = [name for name in declared if name not in order]
    if missing:
        yield f"`order` leaves out {', '.join(missing)}: it must name every declared task once."
