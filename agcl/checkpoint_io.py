"""Checkpoints are written so that a crash leaves the old one or the new one."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from agcl.checkpoints import checked
from agcl.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place, synced, and renamed.

    Lightning's own are written in the system's folder for temporary files and moved from there, which is a copy, not
    atomic, where that is another disk; they are not synced, and are held in memory a second time on the way. Other
    places than local files are left to Lightning.

    ``agcl fit`` uses it; elsewhere: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint whole, or leave what was there.

        Raises:
            OSError: With the file's name, if it cannot be written, for instance on a full disk.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer, which wants to close the file that cannot be written
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            AgclError: If it is there, but damaged or something else.
        """
        return checked(path, partial(super().load_checkpoint, path, *args, **kwargs))
