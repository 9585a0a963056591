"""What the methods share: acting once at each task's start, also in resumed runs, and saying what they keep."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn


class TaskMethod(Callback, ABC):
    """A continual-learning method that does something when a task begins."""

    def __init__(self) -> None:
        self.task_begun: int | None = None
        """0-based index of the task being learned; None before training."""

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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each of its modules back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
