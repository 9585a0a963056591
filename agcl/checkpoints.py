"""Checkpoints on the disk: written so that a crash leaves the old one or the new one, and looked into before use."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from agcl.errors import AgclError
from agcl.files import is_whole_zip, replacing, sync_folder

SUFFIX = ".ckpt"
_SHARDED = "meta.pt"
"""In a folder of shards, as Lightning's sharding strategies write it: the file that comes last."""


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
        try:
            content = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises many types for what is not right
            raise _unusable(path, error) from error
        _check_ours(path, content)
        return content


def look_into(path: Path, tensors: Literal["meta", "cpu"] = "meta") -> dict[str, Any]:
    """Check a checkpoint, and give what it says. It runs no code.

    Args:
        path: A file, or a folder of shards.
        tensors: ``meta``: of tensors only shapes; ``cpu``: what they hold, too, mapped from the file. In a folder of
            shards, the weights are in other files.

    Returns:
        The checkpoint.

    Raises:
        AgclError: If it is not there, not whole by its checksums, or not one of agcl.
    """
    if not path.exists():
        raise AgclError(f"The checkpoint {path} does not exist.")
    file = _described_in(path)
    if not is_whole_zip(file):
        raise AgclError(f"{path} is not a checkpoint, or not a whole one: take an earlier one.")
    try:
        content = torch.load(file, map_location=tensors, mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types for what is not right
        raise _unusable(path, error) from error
    _check_ours(path, content)
    return content


def begin_writing_over(path: Path) -> None:
    """Let a folder of shards no longer count as a whole one; another checkpoint is replaced at once, when it is ready.

    For one process to call; the others begin to write when it has.
    """
    if path.is_dir():
        (path / _SHARDED).unlink(missing_ok=True)
        sync_folder(path)


def newest(folders: list[Path]) -> list[Path]:
    """The checkpoints that lie in these folders, the last written first."""
    found = {path.resolve(): path for folder in folders for path in folder.glob(f"*{SUFFIX}") if path.exists()}
    return sorted(found.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def last_whole(folders: list[Path]) -> Path | None:
    """The last written of the checkpoints in these folders that is whole."""
    return next((path for path in newest(folders) if is_whole_zip(_described_in(path))), None)


def _described_in(path: Path) -> Path:
    return path / _SHARDED if path.is_dir() else path


def _check_ours(path: str | Path, content: Any) -> None:
    if not isinstance(content, dict) or "agcl" not in content:
        raise AgclError(f"{path} was not written by agcl: it holds no score matrix. Take a checkpoint of this run.")


def _unusable(path: str | Path, error: Exception) -> AgclError:
    reason = " ".join(str(error).split())[:300]
    return AgclError(f"The checkpoint {path} cannot be read ({reason}): take an earlier one.")
