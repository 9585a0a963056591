"""Callbacks that measure something whenever the tasks are scored."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class BesideScoring(Callback):
    """Measures once before training and once after each task, also where a run is resumed."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what a former run measured."""

    @abstractmethod
    def _has_measured(self, num_learned: int) -> bool:
        """Whether the measurement after so many tasks has taken place."""

    @abstractmethod
    def _measure(self, trainer: Trainer, pl_module: Any, num_learned: int) -> None:
        """Measure; the model is in evaluation mode."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure beside the scoring of the tasks."""
        if trainer.state.fn == TrainerFn.FITTING:
            if trainer.sanity_checking:  # before any training
                self._forget()
            self._measure(trainer, pl_module, pl_module.num_learned)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming: have a measurement made up for that did not take place, once a gate has closed the task."""
        completed = pl_module.tasks.num_completed(trainer.current_epoch)
        if completed and not self._has_measured(completed):
            # From a checkpoint of an epoch's last batch, Lightning goes on with the next epoch without validating.
            pl_module.late_measurements.append(lambda: self._measure_late(trainer, pl_module, completed))

    def _measure_late(self, trainer: Trainer, pl_module: Any, num_learned: int) -> None:
        pl_module.eval()
        self._measure(trainer, pl_module, num_learned)
        pl_module.train()
