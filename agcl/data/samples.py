"""A task's training rows as samples for attribution."""

from collections.abc import Iterator
from typing import Any

import torch

from agcl.attribution.passes import Sample
from agcl.data.tasks import IGNORED_LABEL


def training_samples(datamodule: Any, task_index: int, *, seed: int, device: torch.device) -> Iterator[Sample]:
    """A task's training rows in a random order that depends on the seed alone.

    Args:
        datamodule: A ``ContinualDataModule`` that has been set up.
        task_index: 0-based.
        seed: Of the order.
        device: Where the tensors are made.

    Yields:
        One sample per row.
    """
    rows = datamodule.training_rows(task_index)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for row in order.tolist():
        input_ids, labels = (torch.tensor(rows[row][key], device=device) for key in ("input_ids", "labels"))
        answer = (labels != IGNORED_LABEL).nonzero().flatten()
        # The logits at one position predict the next token.
        yield Sample(input_ids, positions=answer - 1, targets=labels[answer])
