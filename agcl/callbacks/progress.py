"""Progress bars that say which task is being learned and which one is being scored."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class TaskProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the task's name in place of the bare epoch."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the task and its epoch."""
        super().on_train_epoch_start(trainer, *args)
        tasks, epoch = trainer.datamodule.tasks, trainer.current_epoch  # type: ignore[attr-defined]
        if tasks.regime == "joint":
            what = f"{len(tasks)} tasks together"
        else:
            what = f"Task {tasks.index_at(epoch) + 1}/{len(tasks)} {tasks.name_at(epoch)}"
        self.train_progress_bar.set_description(
            f"{what}, epoch {tasks.epoch_in_task(epoch) + 1}/{len(tasks.segment(epoch))}"
        )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the task, and the probe, that is scored."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index, probe = data.evaluations[dataloader_idx]
        self.val_progress_bar.set_description(f"Scoring {data.tasks[index].name}" + (f" ({probe})" if probe else ""))
