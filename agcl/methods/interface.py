"""What the methods share: acting once at each task's start, also in resumed runs, and saying what they keep."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from agcl.errors import AgclError


class TaskMethod(Callback, ABC):
    """A continual-learning method that does something when a task begins."""

    def __init__(self) -> None:
        self.task_begun: int | None = None
        """0-based index of the task being learned; None before training."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse runs that it cannot work in; forget an earlier run (what is resumed is loaded after this)."""
        check_sequence(self, pl_module)
        check_whole(self, trainer)
        self.task_begun = None

    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """Called once for each task, before its first training step.

        Args:
            trainer: The trainer.
            pl_module: The ``ContinualLM``, with the weights that the task starts from.
            task_index: 0-based.
        """

    @abstractmethod
    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond what plain fine-tuning keeps."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the task at its first batch: resuming inside of an epoch, Lightning leaves the epoch's start out."""
        if self.task_begun != pl_module.task_index:
            self.begin_task(trainer, pl_module, pl_module.task_index)
            self.task_begun = pl_module.task_index

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing behind; Lightning does not call the end-of-fit hooks on errors."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"task_begun": self.task_begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.task_begun = state_dict["task_begun"]


def check_sequence(method: Callback, pl_module: Any) -> None:
    """Refuse a method that acts between tasks where all are learned together.

    Raises:
        AgclError: Under ``regime: joint``.
    """
    if pl_module.tasks.regime == "joint":
        raise AgclError(
            f"{type(method).__name__} acts between tasks; under `regime: joint` there is one stretch of training. "
            "Leave one of the two out."
        )


def check_whole(method: Callback, trainer: Trainer) -> None:
    """Refuse a method that looks at whole weights or gradients where they are split over processes.

    Raises:
        AgclError: Under FSDP2.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise AgclError(
            f"{type(method).__name__} looks at whole weights, which are split over processes here "
            "(ModelParallelStrategy); take `strategy: ddp`."
        )
