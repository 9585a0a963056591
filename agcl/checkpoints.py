"""Checkpoints on the disk: which there are, which are whole, and what they say."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from agcl.errors import AgclError, one_line
from agcl.files import is_whole_zip, sync_folder

SUFFIX = ".ckpt"
_MODEL = "model."  # what ContinualLM's language model is called
_SHARDED = "meta.pt"
"""In a folder of shards, as Lightning's sharding strategies write it: the file that comes last."""


def look_into(path: Path, tensors: Literal["meta", "cpu"] = "meta", checksums: bool = True) -> dict[str, Any]:
    """Check a checkpoint, and give what it says. It runs no code.

    Args:
        path: A file, or a folder of shards.
        tensors: ``meta``: of tensors only shapes; ``cpu``: what they hold, too, mapped from the file. In a folder of
            shards, the weights are in other files.
        checksums: Read the whole file to check them; without, only its end, which is missing from a file cut short.

    Returns:
        The checkpoint.

    Raises:
        AgclError: If it is not there, not whole by its checksums, or not one of agcl.
    """
    if not path.exists():
        raise AgclError(f"The checkpoint {path} does not exist.")
    file = _described_in(path)
    if not (is_whole_zip(file) if checksums else zipfile.is_zipfile(file)):
        raise AgclError(f"{path} is not a checkpoint, or not a whole one: take an earlier one.")
    return checked(path, lambda: torch.load(file, map_location=tensors, mmap=True, weights_only=True))


def checked(path: str | Path, load: Callable[[], Any]) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        path: Where it is.
        load: Loads it.

    Raises:
        AgclError: If it is there, but damaged or something else.
    """
    try:
        content = load()
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types for what is not right
        reason = one_line(error)
        raise AgclError(f"The checkpoint {path} cannot be read ({reason}): take an earlier one.") from error
    if not isinstance(content, dict) or "agcl" not in content:
        raise AgclError(f"{path} was not written by agcl: it holds no score matrix. Take a checkpoint of this run.")
    return content


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The language model's weights in a checkpoint, by the names that they have in it; none, if they are in shards."""
    saved = checkpoint.get("state_dict", {}).items()
    return {name.removeprefix(_MODEL): weight for name, weight in saved if name.startswith(_MODEL)}


def attribution_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the ``AttributionCallback`` in a checkpoint; None without one, of which there cannot be two."""
    states = checkpoint.get("callbacks", {}).values()
    return next((state for state in states if isinstance(state, dict) and "so_far" in state), None)


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
