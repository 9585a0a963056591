"""Files of input moments, so that a task's directions outlive the process that found them.

A safetensors file holds each matrix's ``A`` (:mod:`agcl.attribution.directions`), float32 of shape (in, in), named as
in ``named_parameters``: 4 bytes times the squared input width of each. Metadata are strings; ``format``
(``agcl-input-moments``), ``format_version`` and ``transposed`` (a JSON list of the matrices that are used as ``x W``)
are added here, the others by whoever computes the moments.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AgclError
from ..files import MAKE_ROOM, partial_of, sync_folder
from .directions import InputMoments

FORMAT, FORMAT_VERSION = "agcl-input-moments", "1"


def save_input_moments(path: str | Path, moments: InputMoments, metadata: Mapping[str, str] | None = None) -> None:
    """Write moments to a file; one that is there already is replaced when the new one is complete.

    Args:
        path: Of the file; its folder is made if missing.
        moments: Of one task, or of several added up.
        metadata: What is to be known of them, such as model and task.

    Raises:
        AgclError: If it cannot be written, for instance on a full disk; what was there before is left.
    """
    path = Path(path)
    partial = partial_of(path)
    transposed = json.dumps([name for name, is_transposed in moments.transposed.items() if is_transposed])
    header = {**(metadata or {}), "format": FORMAT, "format_version": FORMAT_VERSION, "transposed": transposed}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: moment.contiguous() for name, moment in moments.sums.items()}, partial, header)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise AgclError(f"{path} could not be written ({error}); {MAKE_ROOM}, or name another file.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_input_moments(path: str | Path, device: torch.device | str = "cpu") -> InputMoments:
    """Read what `save_input_moments` wrote.

    Args:
        path: Of the file.
        device: Where the moments are read to.

    Raises:
        AgclError: If it is missing, truncated, or something else.
    """
    if not Path(path).is_file():
        raise AgclError(f"There is no file {path}; name one written by TaskDirections or save_input_moments().")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            sums = {name: file.get_tensor(name) for name in file.keys()} if metadata.get("format") == FORMAT else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AgclError(f"{path} is truncated or no safetensors file ({error}); compute it anew.") from error
    if metadata.get("format") != FORMAT:
        raise AgclError(f"{path} holds no input moments; name a file written by TaskDirections.")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise AgclError(
            f"{path} has format version {metadata.get('format_version')}; this agcl reads version {FORMAT_VERSION}: "
            "use a newer one."
        )
    transposed = set(json.loads(metadata["transposed"]))
    return InputMoments(sums, {name: name in transposed for name in sums})
