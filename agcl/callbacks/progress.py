"""Progress of the whole run: the task being learned, its epoch, what is scored or attributed, and the time left."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from time import monotonic
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tqdm.auto import tqdm

from agcl.errors import AgclError


class TaskProgressBar(ProgressBar):
    """One bar for all tasks together, with the present task and epoch, the loss, and the time left of the whole run.

    A second one shows what is being scored or attributed. The time left supposes that the batches to come take as long
    as those so far, with the scoring and the attribution between them. Where the output is no terminal, a plain line
    says the same at the start of each task, and now and then.

    Args:
        refresh_rate: How often the bars are drawn anew, per second; 0 shows nothing.
        seconds_between_lines: Least time from one plain line to the next, but for those at the start of a task.

    Raises:
        AgclError: If one of them is negative.
    """

    def __init__(self, refresh_rate: float = 4.0, seconds_between_lines: float = 30.0) -> None:
        super().__init__()
        for option, value in (("refresh_rate", refresh_rate), ("seconds_between_lines", seconds_between_lines)):
            if value < 0:
                raise AgclError(f"`{option}` is {value}; give 0 or more.")
        self.refresh_rate = refresh_rate
        self.seconds_between_lines = seconds_between_lines
        self._enabled = refresh_rate > 0
        self._display: Display | None = None
        self._epoch_ends: list[int] = []  # in batches since the start of the run
        self._begun = 0.0
        self._first_batch: int | None = None

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show what there is to show again."""
        self._enabled = self.refresh_rate > 0

    @contextmanager
    def showing(self, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show something that goes on meanwhile; gives a function to call with the number of steps just made."""
        if self._display is None:
            yield lambda count: None
            return
        self._display.begin(description, total, unit)
        try:
            yield self._display.advance
        finally:
            self._display.end()

    # -------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the batches of all epochs, and start the clock."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._epoch_ends = list(accumulate(data.num_batches(epoch) for epoch in range(trainer.max_epochs or 0)))
        self._begun, self._first_batch = monotonic(), None
        self._open(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the task and its epoch (resuming, Lightning may leave out an epoch's start)."""
        done = self._epoch_ends[trainer.current_epoch] - self._batches_in(trainer.current_epoch) + batch_idx
        is_first = self._first_batch is None
        if is_first:
            self._first_batch = done
        if is_first or batch_idx == 0:
            starts = is_first or pl_module.tasks.starts_at(trainer.current_epoch)
            self._show(trainer, done, is_important=starts)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One batch more."""
        epoch = trainer.current_epoch
        self._show(trainer, self._epoch_ends[epoch] - self._batches_in(epoch) + batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the bar as it is, before the results are printed."""
        self._close()

    def _batches_in(self, epoch: int) -> int:
        return self._epoch_ends[epoch] - (self._epoch_ends[epoch - 1] if epoch else 0)

    def _show(self, trainer: Trainer, done: int, is_important: bool = False) -> None:
        if self._display is None:
            return
        total, made = self._epoch_ends[-1], done - (self._first_batch or 0)
        left = (monotonic() - self._begun) / made * (total - done) if made else None
        metrics = ", ".join(f"{name} {value:.3g}" for name, value in trainer.progress_bar_metrics.items())
        self._display.run(position(trainer), done, total, left, metrics, is_important)

    # --------------------------------------------------------------------- scoring

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Scoring may come before any training, or alone."""
        self._open(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the task, and the probe, that is scored."""
        if self.has_dataloader_changed(dataloader_idx) and self._display is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            index, probe = data.evaluations[dataloader_idx]
            name = f"Scoring {data.tasks[index].name}" + (f" ({probe})" if probe else "")
            self._display.begin(name, int(self.total_val_batches_current_dataloader), "batches")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """One batch more."""
        if self._display is not None:
            self._display.advance(1)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """All is scored."""
        self.reset_dataloader_idx_tracker()
        if self._display is not None:
            self._display.end()

    # ------------------------------------------------------------------- the display

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def _open(self, trainer: Trainer) -> None:
        if self._enabled and self._display is None:
            self._display = Display(Console(stderr=True), self.refresh_rate, self.seconds_between_lines)

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None


@contextmanager
def activity(trainer: Trainer, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show something that takes a while beside the trainer's progress bar, whichever that is.

    Args:
        trainer: Nothing is shown if it has no progress bar.
        description: What is done.
        total: Number of steps.
        unit: What a step is, in the plural.

    Yields:
        A function to call with the number of steps just made.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TaskProgressBar):
        with bar.showing(description, total, unit) as advance:
            yield advance
        return
    is_shown = bar is not None and trainer.is_global_zero
    with tqdm(total=total, desc=description, unit=unit, disable=not is_shown, dynamic_ncols=True) as other:
        yield other.update


def position(trainer: Trainer) -> str:
    """The task being learned and its epoch, such as ``Task 2/4 finnish, epoch 3/12``."""
    tasks, epoch = trainer.datamodule.tasks, trainer.current_epoch  # type: ignore[attr-defined]
    if tasks.regime == "joint":
        what = f"{len(tasks)} tasks together"
    else:
        what = f"Task {tasks.index_at(epoch) + 1}/{len(tasks)} {tasks.name_at(epoch)}"
    return f"{what}, epoch {tasks.epoch_in_task(epoch) + 1}/{len(tasks.segment(epoch))}"


class Display:
    """Two bars on a terminal, else plain lines: the whole run, and what goes on meanwhile.

    Args:
        console: Where to show it.
        refresh_rate: Per second.
        seconds_between_lines: Least time between plain lines that are not important.
    """

    def __init__(self, console: Console, refresh_rate: float, seconds_between_lines: float) -> None:
        self._console = console
        self._seconds_between_lines = seconds_between_lines
        self._last_line = -seconds_between_lines
        self._run: TaskID | None = None
        self._meanwhile: TaskID | None = None
        self._progress: Progress | None = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        if console.is_terminal or console.is_jupyter:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._progress = Progress(*columns, console=console, refresh_per_second=refresh_rate)
            self._progress.start()
            self._redirect_logs()

    def run(
        self, description: str, done: int, total: int, seconds_left: float | None, metrics: str, is_important: bool
    ) -> None:
        """Show how far the run is."""
        left = None if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
        note = ", ".join(part for part in (left, metrics) if part)
        if self._progress is None:
            self._line(f"{description}, batch {done}/{total}" + (f", {note}" if note else ""), is_important)
            return
        if self._run is None:
            self._run = self._progress.add_task(description, total=total, unit="batches", note=note)
        self._progress.update(self._run, description=description, completed=done, note=note)

    def begin(self, description: str, total: int, unit: str) -> None:
        """Show that something else begins; what went on before it has ended."""
        self.end()
        if self._progress is None:
            self._line(f"{description}: {total} {unit}", is_important=False)
        else:
            self._meanwhile = self._progress.add_task(description, total=total, unit=unit, note="")

    def advance(self, count: int) -> None:
        """Some steps more of it."""
        if self._progress is not None and self._meanwhile is not None:
            self._progress.advance(self._meanwhile, count)

    def end(self) -> None:
        """It has ended."""
        if self._progress is not None and self._meanwhile is not None:
            self._progress.remove_task(self._meanwhile)
            self._meanwhile = None

    def close(self) -> None:
        """Leave the last state on the terminal."""
        self.end()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        if self._progress is not None:
            self._progress.stop()

    def _line(self, text: str, is_important: bool) -> None:
        now = monotonic()
        if is_important or now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _redirect_logs(self) -> None:
        """Print Lightning's messages above the bars: its handler has held the terminal since it was imported."""
        for handler in logging.getLogger("lightning.pytorch").handlers:
            if isinstance(handler, logging.StreamHandler):
                self._handlers.append((handler, handler.setStream(sys.stderr) or handler.stream))
