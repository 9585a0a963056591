"""Ending a run early without losing a step: Ctrl-C, and the notice that batch systems give before they kill."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from agcl.callbacks.run_folder import run_folder
from agcl.checkpoints import begin_writing_over

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
FILE_NAME = "interrupted.ckpt"


class StopOnSignal(Callback):
    """On SIGTERM or SIGINT (Ctrl-C), finishes the step, saves a checkpoint, and exits with status 128 + signal.

    Lightning leaves the loop where a signal happens to find it: SIGINT anywhere, even within an optimizer's step, and
    SIGTERM also halfway through scoring, from where no run can be gone on with bit for bit; and it saves nothing by
    itself. Here a signal is only noted. What it waits for is the next optimizer step, also where tasks are being scored
    or attributed. A second Ctrl-C ends the run at once, without a checkpoint.

    The checkpoint is ``interrupted.ckpt`` beside those of the first ``ModelCheckpoint``, or else in ``checkpoints/`` of
    the run's folder. It is taken away when a run in the same folder has come to its end. Over several processes, a
    signal to any one of them stops all at the same step, for which they exchange one byte a step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that ends the run, if there was one."""
        self.path: Path | None = None
        """Where the checkpoint goes; known from the start of fitting on."""
        self._former: dict[signal.Signals, Any] = {}
        self._last_step = 0

    @property
    def exit_status(self) -> int | None:
        """128 + signal, as shells have it; None where no signal was received."""
        return None if self.received is None else 128 + self.received

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget an earlier run. Listening waits: after this, the Trainer sets handlers of its own."""
        self.received = None
        self.path = stop_path(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen already while the tasks are scored before training."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen; a signal that came while a resumed run made up for a task boundary counts too."""
        self._listen()
        if trainer.received_sigterm:
            self.received = signal.SIGTERM
        self._last_step = trainer.global_step

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Before training there is nothing to save; processes that score other numbers of batches go on to a step."""
        if trainer.sanity_checking and trainer.world_size == 1 and self.received is not None:
            rank_zero_info(f"Stopped by {self._name()} before the first step.")
            raise SystemExit(self.exit_status)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and exit, if a signal has come and no gradient is being accumulated, which would be lost."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._must_stop(trainer) and self.path is not None:
            if trainer.is_global_zero:
                begin_writing_over(self.path)
            trainer.strategy.barrier()
            trainer.save_checkpoint(self.path)
            rank_zero_info(
                f"Stopped by {self._name()} after step {trainer.global_step} and saved {self.path}: the same command "
                "with `--resume auto` goes on from there."
            )
            raise SystemExit(self.exit_status)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen no more."""
        self._listen_no_more()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Listen no more; Lightning does not call the end-of-fit hooks on errors."""
        self._listen_no_more()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the checkpoint of an earlier interruption away, once the run has come to its end."""
        is_at_end = trainer.current_epoch == trainer.max_epochs and trainer.is_last_batch  # not at a limit
        if is_at_end and self.path is not None and self.path.exists():
            trainer.strategy.remove_checkpoint(self.path)

    def _must_stop(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        is_agreed = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if is_agreed and self.received is None:
            self.received = signal.SIGTERM  # another process received one
        return is_agreed

    def _name(self) -> str:
        return "a signal" if self.received is None else self.received.name

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread alone
        for number in _SIGNALS:
            if signal.getsignal(number) != self._note:
                self._former[number] = signal.signal(number, self._note)

    def _listen_no_more(self) -> None:
        for number, former in self._former.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, former)
        self._former = {}

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received is not None:
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number)
        if number == signal.SIGINT:  # past Python's streams, which may be in the midst of a line
            os.write(2, b"\nStopping after the next step; Ctrl-C again stops at once, without a checkpoint.\n")


def stop_path(trainer: Trainer) -> Path:
    """Where a stopped run's checkpoint goes; to be asked on all processes."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    folder = Path(folders[0]) if folders else run_folder(trainer) / "checkpoints"
    return folder / FILE_NAME
