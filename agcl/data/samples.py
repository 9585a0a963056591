"""A task's training rows as samples for attribution."""

from collections.abc import Iterator
from typing import Any

import torch

from agcl.attribution.passes import Sample
from agcl.attribution.rows import samples_of


def training_samples(datamodule: Any, task_index: int, *, seed: int | None, device: torch.device) -> Iterator[Sample]:
    """A task's training rows in a random order that depends on the seed alone.

    Args:
        datamodule: A ``ContinualDataModule`` that has been set up.
        task_index: 0-based.
        seed: Of the order; the data module's if None.
        device: Where the tensors are made.

    Returns:
        One sample per row.
    """
    rows = datamodule.training_rows(task_index)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(resolve_seed(seed, datamodule)))
    return samples_of((rows[row] for row in order.tolist()), device)


def resolve_seed(seed: int | None, datamodule: Any) -> int:
    """A method's own seed; the data module's, which changes with the run's, where it has none."""
    return int(datamodule.seed) if seed is None else seed
