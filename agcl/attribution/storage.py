"""How an importance file lies on the disk: safetensors files, the index of shards, and replacing both atomically."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AgclError, one_line
from ..files import sync_folder, synced
from .levels import DTYPES, Bits

FORMAT = "agcl-importance"
FORMAT_VERSION = "2"
INDEX_SUFFIX = ".index.json"

Shape = tuple[int, ...]

_READABLE_VERSIONS = ("1", FORMAT_VERSION)
_DTYPE_NAMES: dict[Bits, str] = {8: "U8", 16: "U16"}  # as safetensors writes them
_CHECKSUMS = "crc32"  # of each tensor's bytes, in the header of the file that it is in
_AGAIN = "copy it again, or compute it anew"


# ------------------------------------------------------------------- writing


def split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, in as few consecutive groups of at most ``max_bytes`` as that allows; at least one.

    Example:
        >>> split({"a": 2, "b": 9, "c": 1, "d": 3}, max_bytes=4)
        [['a'], ['b'], ['c', 'd']]
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def file_names(path: Path, num_files: int) -> list[str]:
    """Name of the single file, or of each shard."""
    if num_files == 1:
        return [path.name]
    stem = path.name.removesuffix(".safetensors")
    return [f"{stem}-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def name_of_whole(shard: str) -> str:
    """The name given to `file_names`, from a shard's.

    Example:
        >>> name_of_whole("welsh-00001-of-00003.safetensors")
        'welsh.safetensors'
    """
    return re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", shard)


def num_bytes(shape: Shape, bits: Bits) -> int:
    """Size of a tensor of levels."""
    size = bits // 8
    for length in shape:
        size *= length
    return size


def write_safetensors(
    path: Path,
    named: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, Shape],
    bits: Bits,
    importance: Mapping[str, Tensor],
) -> None:
    """Write tensors one after the other, and wait for the disk; errors call the file ``named``.

    The library's own writer wants all tensors at once, and its bytes differ from one time to the next by the order of
    the metadata.
    """
    checksums = dict.fromkeys(shapes, 0)
    with synced(path, named) as file:
        file.write(_header(metadata, shapes, bits, checksums))
        for name, shape in shapes.items():
            levels = importance[name]
            if levels.dtype != DTYPES[bits] or tuple(levels.shape) != shape:
                raise AgclError(f"Importance of `{name}` changed while it was written.")
            content = _bytes_of(levels)
            checksums[name] = zlib.crc32(content)
            file.write(content)
        file.seek(0)
        file.write(_header(metadata, shapes, bits, checksums))


def _header(
    metadata: Mapping[str, str], shapes: Mapping[str, Shape], bits: Bits, checksums: Mapping[str, int]
) -> bytes:
    """What stands before the tensors, of the same length for all values of the checksums."""
    written = json.dumps({name: f"{checksum:08x}" for name, checksum in checksums.items()}, ensure_ascii=False)
    header: dict[str, Any] = {"__metadata__": {**metadata, _CHECKSUMS: written}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + num_bytes(shape, bits)
        header[name] = {"dtype": _DTYPE_NAMES[bits], "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)  # the data are to be aligned
    return len(content).to_bytes(8, "little") + content


def _bytes_of(levels: Tensor) -> memoryview:
    return levels.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_index(
    path: Path, named: Path, metadata: Mapping[str, str], contents: Mapping[str, list[str]], total_size: int
) -> None:
    """Write which shard each parameter is in, as Hugging Face does, and wait for the disk."""
    index = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": {name: file for file, names in contents.items() for name in names},
    }
    with synced(path, named) as file:
        file.write(json.dumps(index, indent=2, ensure_ascii=False).encode())


def publish(path: Path, temporaries: Mapping[str, Path]) -> None:
    """Give finished files their names, the one that makes them count last; then take away what they replace."""
    index = index_of(path)
    stale = _shards_on_disk(path)
    if stale & temporaries.keys():
        index.unlink()
    *shards, last = temporaries.items()
    for name, temporary in shards:
        temporary.replace(path.with_name(name))
    sync_folder(path.parent)
    last[1].replace(path.with_name(last[0]))
    sync_folder(path.parent)
    if shards:
        path.unlink(missing_ok=True)
    elif stale:
        index.unlink()
    for name in stale - temporaries.keys():
        path.with_name(name).unlink(missing_ok=True)


def _shards_on_disk(path: Path) -> set[str]:
    """The files of an index of ours; none if there is no index, or somebody else's."""
    try:
        return set(read_index(path)[1])
    except AgclError:
        return set()


# ------------------------------------------------------------------- reading


def index_of(path: Path) -> Path:
    """Where the index of ``path`` is, if it has shards."""
    return path.with_name(path.name + INDEX_SUFFIX)


def read_index(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Metadata, and the names that each shard is to hold.

    Raises:
        AgclError: If the index is missing, damaged, not of an importance file, or leads out of its folder.
    """
    index_path = index_of(path)
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        metadata, weight_map = index["metadata"], index["weight_map"]
        if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
            raise TypeError("`metadata` and `weight_map` must be mappings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AgclError(f"{index_path} is no index of shards ({one_line(error, None)}); {_AGAIN}.") from error
    metadata = {key: str(value) for key, value in metadata.items() if key != "total_size"}
    check_format(index_path, metadata)
    contents: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise AgclError(f"{index_path}: `{name}` is in {file!r}, not in a file beside the index; do not trust it.")
        contents.setdefault(file, []).append(name)
    return metadata, contents


class OpenedFile(NamedTuple):
    """A safetensors file whose header has been read.

    Attributes:
        path: Where it is.
        handle: What reads its tensors.
        metadata: What it says about itself, without the checksums.
        checksums: Of each tensor; empty in files of before there were any.
    """

    path: Path
    handle: Any
    metadata: dict[str, str]
    checksums: dict[str, str]

    def read(self, name: str) -> Tensor:
        """A tensor, which is a view of the mapped file, and the same one for all who ask.

        Raises:
            AgclError: If its bytes have another checksum than those that were written.
        """
        levels: Tensor = self.handle.get_tensor(name)
        if self.checksums and self.checksums[name] != f"{zlib.crc32(_bytes_of(levels)):08x}":
            raise AgclError(f"{self.path}: `{name}` is damaged, its checksum differs; {_AGAIN}.")
        return levels


def open_safetensors(path: Path) -> OpenedFile:
    """Open a file whose header is whole and covers the file.

    Raises:
        AgclError: If it is missing, truncated or something else.
    """
    if not path.is_file():
        raise AgclError(f"There is no importance file {path}; name a file written by agcl.")
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AgclError(f"{path} is truncated or no importance file ({one_line(error, None)}); {_AGAIN}.") from error
    metadata = dict(handle.metadata() or {})
    try:
        checksums = dict(json.loads(metadata.pop(_CHECKSUMS, "{}")))
    except (ValueError, TypeError) as error:
        raise AgclError(f"{path} has unreadable checksums ({one_line(error, None)}); {_AGAIN}.") from error
    if checksums and checksums.keys() != set(handle.keys()):
        raise AgclError(f"{path} has other tensors than checksums, so it is damaged; {_AGAIN}.")
    return OpenedFile(path, handle, metadata, checksums)


def check_format(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse what is no importance, or of a later format."""
    if metadata.get("format") != FORMAT:
        raise AgclError(f"{path} is not an importance file; name a file written by agcl.")
    if metadata.get("format_version") not in _READABLE_VERSIONS:
        raise AgclError(
            f"{path} is an importance file of format version {metadata.get('format_version')}; this agcl reads "
            f"version {' and '.join(_READABLE_VERSIONS)}: use a newer one."
        )


def check_shard(
    path: Path, metadata: Mapping[str, str], names: set[str], index: Mapping[str, str], listed: set[str]
) -> None:
    """Refuse a shard that is not the one which the index tells of."""
    if {key: value for key, value in metadata.items() if key != "shard"} != index:
        raise AgclError(f"{path} and its index were not written together; {_AGAIN}.")
    if astray := min(names ^ listed, default=None):
        where = "is in the shard, but not there" if astray in names else "is there, but not in the shard"
        raise AgclError(f"{path} does not agree with its index: `{astray}` {where}; {_AGAIN}.")


def check_dtypes(path: Path, dtypes: Mapping[str, str], metadata: Mapping[str, str]) -> Bits:
    """8 or 16, where all tensors have that dtype and the metadata say the same.

    Raises:
        AgclError: For the first tensor of another dtype.
    """
    bits = cast(Bits, int(metadata.get("bits", "8"))) if metadata.get("bits", "8") in ("8", "16") else None
    if bits is None:
        raise AgclError(f"{path} says that it has {metadata['bits']} bits; importance has 8 or 16.")
    for name, dtype in dtypes.items():
        if dtype != _DTYPE_NAMES[bits]:
            raise AgclError(f"{path}: `{name}` is {dtype}, not {_DTYPE_NAMES[bits]}; the file was not written by agcl.")
    return bits
