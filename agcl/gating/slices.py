"""Runs an optimizer's step a few parameters at a time, so that a gate works on them while they are in the cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .gate import GatedParameter
from .held import HeldWeights

# Their steps treat each parameter on its own: state is kept by parameter, nothing is summed over the parameters or
# written into the group, and all of it happens in one pass over the groups, after the closure's only call. Exact types
# alone: a subclass may do anything.
_PER_PARAMETER = frozenset(
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"),
        *("Adafactor", "Muon"),  # not in every torch
    )
    if hasattr(torch.optim, name)
)
_CPU_SLICE, _DEVICE_SLICE = 2**20, 2**26  # gated entries: the CPU's cache; few kernel launches

Snapshot = list[tuple[HeldWeights, Tensor]]  # and their values before the step


@dataclass
class Slice:
    """Consecutive parameters of one group, and those of them that are gated."""

    group: dict[str, Any]
    parameters: list[nn.Parameter] = field(default_factory=list)
    gated: list[HeldWeights] = field(default_factory=list)


def step_without_hooks(optimizer: Optimizer) -> Callable[[Optimizer], Any] | None:
    """The step proper, without hooks, if it may be run on a part of the parameters."""
    step: Any = type(optimizer).step
    inner = getattr(step, "__wrapped__", None)
    # `hooked` twice: somebody wrapped torch's wrapper. Nowhere: this is not torch's wrapper.
    if type(optimizer) not in _PER_PARAMETER or not getattr(step, "hooked", False) or hasattr(inner, "hooked"):
        return None
    return inner


def cut(optimizer: Optimizer, find: Callable[[Tensor], GatedParameter | None]) -> list[Slice]:
    """All parameters in their order; the gated ones of a slice are few entries, or one parameter."""
    return [piece for group in optimizer.param_groups for piece in _cut_group(group, find)]


def _cut_group(group: dict[str, Any], find: Callable[[Tensor], GatedParameter | None]) -> Iterator[Slice]:
    piece, num_entries = Slice(group), 0
    for parameter in group["params"]:
        if (gated := find(parameter)) is not None:
            held = HeldWeights.of(gated, parameter)
            size = held.weights.numel()
            limit = _CPU_SLICE if held.weights.device.type == "cpu" else _DEVICE_SLICE
            if piece.gated and num_entries + size > limit:
                yield piece
                piece, num_entries = Slice(group), 0
            piece.gated.append(held)
            num_entries += size
        piece.parameters.append(parameter)
    if piece.parameters:
        yield piece


class Scratch:
    """Memory for the weights of one slice after the other; allocated once, as fresh pages are dear."""

    def __init__(self, slices: list[Slice]) -> None:
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for piece in slices:
            for kind, size in _entries_by_kind(piece).items():
                sizes[kind] = max(size, sizes.get(kind, 0))
        self._memory = {kind: torch.empty(size, device=kind[0], dtype=kind[1]) for kind, size in sizes.items()}

    def copy(self, piece: Slice) -> Snapshot:
        """Copies of the gated weights, valid until the next call."""
        snapshot, used = [], dict.fromkeys(self._memory, 0)
        for held in piece.gated:
            kind = (held.weights.device, held.weights.dtype)
            start, used[kind] = used[kind], used[kind] + held.num_entries
            snapshot.append((held, held.copy(self._memory[kind][start : used[kind]])))
        return snapshot


def _entries_by_kind(piece: Slice) -> dict[tuple[torch.device, torch.dtype], int]:
    entries: dict[tuple[torch.device, torch.dtype], int] = {}
    for held in piece.gated:
        kind = (held.weights.device, held.weights.dtype)
        entries[kind] = entries.get(kind, 0) + held.num_entries
    return entries
