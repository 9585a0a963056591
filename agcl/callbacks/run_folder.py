"""Where a run leaves its files, whatever logs it."""

import os
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """Folder of the run's own files; to be called on all ranks, since the first one's is broadcast.

    It is the first logger's own folder for TensorBoard and CSV. Of other loggers Lightning knows only the folder that
    all runs share: there it is ``name/version`` below it, where Lightning puts the checkpoints too.

    Args:
        trainer: The trainer.

    Returns:
        A folder, which need not exist; ``default_root_dir`` without a logger, or with one that saves nowhere. Under
        ``fast_dev_run`` one for temporary files, since such a run is to leave nothing.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        own = Path(tempfile.gettempdir(), f"agcl_fast_dev_run_{os.getpid()}")
        return Path(trainer.strategy.broadcast(str(own)))
    shared = trainer.log_dir
    if shared is None:
        return Path(trainer.default_root_dir)
    if not trainer.loggers or isinstance(trainer.loggers[0], (TensorBoardLogger, CSVLogger)):
        return Path(shared)
    name, version = trainer.loggers[0].name, trainer.loggers[0].version
    parts = [str(name or ""), f"version_{version}" if isinstance(version, int) else str(version or "")]
    return Path(trainer.strategy.broadcast(str(Path(shared, *parts))))
