"""Half fine-tuning (Hui et al., ACL 2025, arXiv 2404.18466)."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from agcl.data.samples import resolve_seed
from agcl.errors import AgclError
from agcl.methods.freezing import Freezing, by_block


class HFT(Freezing):
    """For each task, a fresh random half of each decoder block's matrices is frozen.

    As in the paper, the choice is made by category: attention matrices, feed-forward matrices and normalisations. Of
    each category and block the given share is frozen; where that is no whole number (one and a half of a gated
    feed-forward layer's three), randomly chosen blocks freeze one more than the others, so that the share holds over
    all blocks. A matrix is frozen with its bias, whole. From the first task on. Our choice: what is in no block
    (embeddings, final normalisation, output weights) stays trainable, and attention is told by ``attn`` or
    ``attention`` in the name.

    Args:
        share: Of each category that is frozen, between 0 and 1, both excluded.
        seed: Of the random choice, which depends on it and the task alone; the data module's if left out.

    Raises:
        AgclError: For another share, or, before anything is trained, a model without decoder blocks.
    """

    def __init__(self, share: float = 0.5, seed: int | None = None) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise AgclError(f"`share` is {share}; choose a number between 0 and 1, both excluded.")
        self.share = share
        self.seed = seed
        self._seed = seed or 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse joint training; take the seed."""
        super().setup(trainer, pl_module, stage)
        self._seed = resolve_seed(self.seed, trainer.datamodule)  # type: ignore[attr-defined]

    def choose(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], task_index: int) -> Collection[str]:
        """See :meth:`Freezing.choose`."""
        units = _units(trainable)
        if not units:
            raise AgclError("HFT finds no decoder blocks: no trainable parameter has a number in its name.")
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + task_index)
        chosen: list[str] = []
        for blocks in units.values():
            due = 0.0
            for block in torch.randperm(len(blocks), generator=generator).tolist():
                # The running total, rounded: each block freezes the whole number above or below its share.
                modules, before = blocks[block], math.floor(due + 0.5)
                due += self.share * len(modules)
                picked = torch.randperm(len(modules), generator=generator)[: math.floor(due + 0.5) - before]
                chosen += [name for index in picked.tolist() for name in modules[index]]
        return chosen


def _units(trainable: Mapping[str, nn.Parameter]) -> dict[str, list[list[list[str]]]]:
    """Category -> for each block its modules -> their parameters' names."""
    units: dict[str, list[list[list[str]]]] = defaultdict(list)
    for names in by_block(trainable).values():
        modules: dict[str, list[str]] = defaultdict(list)
        for name in names:
            modules[name.rpartition(".")[0]].append(name)
        categories: dict[str, list[list[str]]] = defaultdict(list)
        for module, members in modules.items():
            categories[_category(module, [trainable[name] for name in members])].append(members)
        for category, found in categories.items():
            units[category].append(found)
    return dict(units)


def _category(module: str, parameters: list[nn.Parameter]) -> str:
    if all(parameter.dim() == 1 for parameter in parameters):
        return "normalisation"
    return "attention" if "attn" in module or "attention" in module else "feed-forward"
