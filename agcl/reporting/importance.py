"""Means of importance by layer and kind, and the plasticity that it leaves, in one pass over a run's files."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agcl.attribution.artefact import ImportanceFile
from agcl.attribution.levels import MAX_LEVEL, bits_of
from agcl.attribution.merging import How, RunningMerge
from agcl.blocks import kind_of, layer_of, layer_order, mean_by_layer
from agcl.gating.plasticity import mean_plasticity

Cell = tuple[str, str]
"""A layer and a kind of module, as :mod:`agcl.blocks` names them."""


@dataclass
class Mean:
    """A mean of weights, in the making."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        """Take in the sum of so many weights."""
        self.total, self.count = self.total + total, self.count + count

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


@dataclass
class ImportanceSummary:
    """Means over a run's importance files.

    Attributes:
        cells: Task to cell to its mean importance, in [0, 1].
        plasticity: Task learned to layer to mean ``(1 - merged importance) ** strength``.
        kinds: Kinds in the order in which the model has them.
    """

    cells: dict[str, dict[Cell, Mean]] = field(default_factory=dict)
    plasticity: dict[str, dict[str, float]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)

    def by(self, task: str, part: int) -> dict[str, float]:
        """Mean importance of each layer (``part`` 0) or of each kind (1)."""
        groups: defaultdict[str, Mean] = defaultdict(Mean)
        for cell, mean in self.cells[task].items():
            groups[cell[part]].add(mean.total, mean.count)
        return {name: mean.value for name, mean in groups.items()}

    @property
    def layers(self) -> list[str]:
        """All layers, in order."""
        return sorted({layer for cells in self.cells.values() for layer, _ in cells}, key=layer_order)


def summarise(
    files: Mapping[str, ImportanceFile], merge: How | None = "maximum", strength: float = 1.0
) -> ImportanceSummary:
    """Read each tensor of each file once.

    Args:
        files: Task to file, in the order of learning.
        merge: How the tasks' importance was merged for the gate; None leaves out the plasticity.
        strength: The gate's.

    Raises:
        AgclError: If the files are of different models.
    """
    cells: dict[str, defaultdict[Cell, Mean]] = {task: defaultdict(Mean) for task in files}
    free: dict[str, dict[str, tuple[float, int]]] = {task: {} for task in files}
    kinds: dict[str, None] = {}
    for name in dict.fromkeys(name for file in files.values() for name in file):
        layer, kind = layer_of(name), kind_of(name)
        kinds.setdefault(kind)
        own = {task: file[name] for task, file in files.items() if name in file}
        for task, levels in own.items():
            cells[task][layer, kind].add(importance_sum(levels), levels.numel())
        if merge is not None:
            for task, so_far in _merged_so_far(list(files), own, merge):
                free[task][name] = mean_plasticity(name, so_far, strength)[0], so_far.numel()
    plasticity = {task: {layer: m for layer, (m, _) in mean_by_layer(means).items()} for task, means in free.items()}
    return ImportanceSummary({task: dict(means) for task, means in cells.items()}, plasticity, list(kinds))


def _merged_so_far(tasks: list[str], own: Mapping[str, Tensor], merge: How) -> Iterator[tuple[str, Tensor]]:
    """A parameter's merged importance after each task, from the first one that has any."""
    merged = RunningMerge(merge, max(bits_of(levels) for levels in own.values()))
    for task in tasks:
        merged.update({"": own[task]} if task in own else {})
        if so_far := merged.importance():
            yield task, so_far[""]


def importance_sum(levels: Tensor) -> float:
    """Sum of importance over all entries of a fixed-point tensor."""
    return int(levels.sum(dtype=torch.int64)) / MAX_LEVEL[bits_of(levels)]
