"""Importance files: one or two bytes per weight, in safetensors, to be kept, shared, merged and compared.

``name.safetensors`` holds a uint8 or uint16 tensor for each parameter, named as in ``named_parameters``. More than
``max_shard_bytes`` are split as Hugging Face splits models, into ``name-00001-of-00003.safetensors`` and so on, with
``name.safetensors.index.json`` saying where each parameter is. Both are opened as ``name.safetensors``; where both are
there, the single file counts. The same importance and metadata give the same bytes.

Metadata are strings. `save_importance` adds those down to ``crc32``, whoever computes the importance the others:

==================================== ==============================================================================
``format``, ``format_version``       ``agcl-importance``, ``2``. Version 1 (uint8, one file) is still read.
``bits``                             ``8``: importance is level / 255. ``16``: level / 65535.
``agcl_version``                     What wrote the file.
``shard``                            ``1 of 3``; in the headers of shards only, not in their index.
``crc32``                            Checksum of each tensor's bytes, a JSON object of eight hexadecimal digits by name;
                                     in headers only, and no part of :attr:`ImportanceFile.metadata`.
``model``                            Name or path of the model, as its user gave it.
``fingerprint``                      :func:`fingerprint` of the weights that the importance was computed on.
``task``                             The task's name. In a merged file ``tasks`` instead: a JSON list of names.
``source``                           The model it was computed on: ``running``, the one that learns all tasks, or
                                     ``single_task``, one that learned this task alone.
``reestimated_after``                Name of the later task after which it was computed anew from kept rows.
``merged``                           How they were merged: ``maximum``, ``mean`` or ``probabilistic_or``.
``estimator``                        What scored the weights: ``LRP``, ``Fisher``, ...
``rule``, ``score``                  Its options, as far as it has them: ``attnlrp``, ``relevance``, ...
``num_samples``                      Number of samples.
``sign``, ``normalisation``,         The settings by which relevance became importance, as in
``scope``, ``quantile``, ``top_k``,  :class:`~agcl.attribution.importance.ImportanceConfig`.
``top_k_method``, ``alpha``
==================================== ==============================================================================
"""

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AgclError
from ..files import partial_of
from ..version import __version__
from . import storage
from .fingerprints import fingerprint
from .levels import Bits, bits_of, dequantise, quantise
from .storage import FORMAT, FORMAT_VERSION, INDEX_SUFFIX, Shape

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "ImportanceFile",
    "LazyImportance",
    "check_importance",
    "common_bits",
    "dequantise",
    "fingerprint",
    "importance_files",
    "load_importance",
    "open_importance",
    "quantise",
    "save_importance",
    "shapes_of",
]


class LazyImportance(Mapping[str, Tensor], ABC):
    """A mapping that makes each parameter's levels when asked for them, and knows shapes and bits beforehand."""

    shapes: dict[str, Shape]
    bits: Bits

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes


class ImportanceFile(LazyImportance):
    """An importance file, whole or in shards, opened lazily: ``file[name]`` reads that parameter's tensor alone.

    Opening it reads the headers and checks them; a tensor is checked, by its checksum, when it is read, and each one
    read is the reader's own.

    Args:
        path: As given to `save_importance`; the index of a sharded one will do as well.
        device: Where tensors are read to.

    Attributes:
        path: The path without the index's suffix.
        metadata: What the file says about itself (see the module's docstring).
        bits: 8 or 16.
        shapes: Shape of each parameter's importance, in the order of the names.
        files: The safetensors files that it consists of.

    Raises:
        AgclError: If a file is missing, truncated, not of this format or version, of another dtype, or at odds with
            the index; on reading a tensor, if it is damaged.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.path = Path(str(path).removesuffix(INDEX_SUFFIX))
        self.device = torch.device(device)
        self._homes: dict[str, storage.OpenedFile] = {}  # each parameter's
        is_sharded = not self.path.exists() and storage.index_of(self.path).exists()
        self.metadata, self.files = self._open_shards() if is_sharded else self._open_single()
        parts = {name: self._homes[name].handle.get_slice(name) for name in sorted(self._homes)}
        self.shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        self.bits = storage.check_dtypes(
            self.path, {name: part.get_dtype() for name, part in parts.items()}, self.metadata
        )

    def _open_single(self) -> tuple[dict[str, str], list[Path]]:
        file = storage.open_safetensors(self.path)
        storage.check_format(self.path, file.metadata)
        if "shard" in file.metadata:
            whole = self.path.with_name(storage.name_of_whole(self.path.name))
            shard = file.metadata["shard"]
            raise AgclError(f"{self.path} is shard {shard} of an importance file; name {whole} instead.")
        self._homes = dict.fromkeys(file.handle.keys(), file)
        return file.metadata, [self.path]

    def _open_shards(self) -> tuple[dict[str, str], list[Path]]:
        metadata, contents = storage.read_index(self.path)
        files = {self.path.with_name(file): names for file, names in contents.items()}
        for path, listed in files.items():
            file = storage.open_safetensors(path)
            storage.check_shard(path, file.metadata, set(file.handle.keys()), metadata, set(listed))
            self._homes.update(dict.fromkeys(listed, file))
        return metadata, list(files)

    def __getitem__(self, name: str) -> Tensor:
        return self._homes[name].read(name).to(self.device, copy=True)

    def __repr__(self) -> str:
        return f"ImportanceFile({str(self.path)!r}, {len(self)} tensors of {self.bits} bits)"


def open_importance(path: str | Path, device: torch.device | str = "cpu") -> ImportanceFile:
    """Open what `save_importance` wrote, without reading a tensor (see `ImportanceFile`)."""
    return ImportanceFile(path, device)


def importance_files(folder: str | Path) -> list[ImportanceFile]:
    """Open what a run has left in its folder ``importance``, each once, also where it is in shards.

    Args:
        folder: Where the files are; it need not exist. Shards without their index are of no file.

    Returns:
        In the order of their names, by which a task's re-estimated file follows its first.

    Raises:
        AgclError: If one of them cannot be used.
    """
    names = {path.name.removesuffix(INDEX_SUFFIX) for path in Path(folder).glob(f"*.safetensors{INDEX_SUFFIX}")}
    files = {path.name for path in Path(folder).glob("*.safetensors")}
    names |= {name for name in files if storage.name_of_whole(name) == name}
    return [open_importance(Path(folder) / name) for name in sorted(names)]


def load_importance(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all of what `save_importance` wrote.

    Returns:
        Name to uint8 or uint16 tensor, and the metadata.

    Raises:
        AgclError: As `ImportanceFile`.
    """
    file = open_importance(path, device)
    return dict(file), file.metadata


def shapes_of(importance: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shape of each parameter's importance, in the order of the names; reads no tensor of a lazy one."""
    if isinstance(importance, LazyImportance):
        return importance.shapes
    return {name: tuple(importance[name].shape) for name in sorted(importance)}


def common_bits(importance: Mapping[str, Tensor]) -> Bits:
    """8 or 16, the same for all parameters; reads no tensor of a lazy mapping.

    Raises:
        AgclError: If a tensor is neither uint8 nor uint16, or they differ.
    """
    if isinstance(importance, LazyImportance):
        return importance.bits
    found: dict[Bits, str] = {}
    for name in importance:
        found.setdefault(bits_of(importance[name], name), name)
    if len(found) > 1:
        raise AgclError(f"Importance of `{found[8]}` has 8 bits, of `{found[16]}` 16; make them the same.")
    return next(iter(found), 8)


def save_importance(
    path: str | Path,
    importance: Mapping[str, Tensor],
    metadata: Mapping[str, object],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write importance, a tensor at a time, and atomically: a crash leaves the old importance or the new.

    Only where shards replace as many shards of the same name can a crash leave neither: the old index is then taken
    away before the first of them is replaced, since old and new shards must not be mixed.

    Args:
        path: ``<name>.safetensors``; its folder is made if need be. What was stored under it before is replaced.
        importance: Parameter name, as in ``named_parameters``, to uint8 or uint16 tensor; all of one dtype. A lazy
            mapping (`ImportanceFile`, :func:`agcl.attribution.merging.merge`) is read a tensor at a time.
        metadata: Stored beside them as strings; ``format``, ``format_version``, ``bits`` and ``agcl_version`` are
            added.
        max_shard_bytes: Largest size of a file's tensors; a larger tensor has a file of its own. Parameters are
            assigned to shards in the order of their names.

    Raises:
        AgclError: If a tensor is neither uint8 nor uint16, or they differ.
        OSError: With the file's name, if it cannot be written, for instance on a full disk.
    """
    path, shapes, bits = Path(path), shapes_of(importance), common_bits(importance)
    added = {"format": FORMAT, "format_version": FORMAT_VERSION, "bits": bits, "agcl_version": __version__}
    header = {key: str(value) for key, value in sorted({**metadata, **added}.items()) if key != "shard"}
    sizes = {name: storage.num_bytes(shape, bits) for name, shape in shapes.items()}
    shards = storage.split(sizes, max_shard_bytes)
    contents = dict(zip(storage.file_names(path, len(shards)), shards, strict=True))
    is_sharded = len(shards) > 1
    path.parent.mkdir(parents=True, exist_ok=True)
    temporaries: dict[str, Path] = {}
    try:
        for number, (file, names) in enumerate(contents.items(), 1):
            temporaries[file] = partial_of(path.with_name(file))
            own_header = {**header, "shard": f"{number} of {len(shards)}"} if is_sharded else header
            own_shapes = {name: shapes[name] for name in names}
            named = path.with_name(file)
            storage.write_safetensors(temporaries[file], named, own_header, own_shapes, bits, importance)
        if is_sharded:
            index = storage.index_of(path)
            temporaries[index.name] = partial_of(index)
            storage.write_index(temporaries[index.name], index, header, contents, sum(sizes.values()))
        storage.publish(path, temporaries)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def check_importance(
    importance: Mapping[str, Tensor],
    named_parameters: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    exact: bool = False,
) -> None:
    """Check that importance fits a model: each name is one of its parameters and has its shape.

    Parameters without importance are in order: they are not gated. No tensor of a lazy mapping is read.

    Args:
        importance: Name to importance, of any dtype.
        named_parameters: The model's.
        metadata: What is known of the importance, for the message and the fingerprint; an `ImportanceFile` brings its
            own.
        exact: Demand the very weights that it was computed on, as far as :func:`fingerprint` can tell.

    Raises:
        AgclError: For the first name that does not fit, with the shapes, or for the wrong fingerprint.
    """
    if metadata is None:
        metadata = importance.metadata if isinstance(importance, ImportanceFile) else {}
    parameters = list(named_parameters)
    origin = f"it was made for the model `{metadata['model']}`" if "model" in metadata else "use the model it is of"
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    for name, shape in shapes_of(importance).items():
        if name not in shapes:
            raise AgclError(f"Importance of `{name}` {shape}: the model has no such parameter; {origin}.")
        if shapes[name] != shape:
            raise AgclError(
                f"Importance of `{name}` has shape {shape}, the model's parameter {shapes[name]}; {origin}."
            )
    if exact and "fingerprint" not in metadata:
        raise AgclError("The importance carries no `fingerprint`, so whether the weights are the same cannot be told.")
    if exact and metadata["fingerprint"] != fingerprint(parameters):
        raise AgclError(f"The importance is of a model with the same parameters but other weights; {origin}.")
