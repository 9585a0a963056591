"""Experience replay: some rows of the old tasks are trained on again beside the new task's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agcl.errors import AgclError


@dataclass(frozen=True)
class Replay:
    """How many rows of the old tasks are kept, and how many of them come back in each training epoch.

    Each epoch of a task with ``n`` training rows, but for the first task's, serves ``max(1, round(share * n))`` rows of
    the old tasks beside its own ``n``. They are split evenly over the old tasks; what cannot be split goes to tasks
    drawn by chance. Within an epoch a task's kept row comes up again only after all its others have.

    Args:
        share: Replayed rows of an epoch relative to the new task's rows, above 0. At 1 both are equally many.
        buffer_size: Rows kept of all old tasks together, split evenly over them (the first ones get one more where it
            does not divide), so that each task's shrink as tasks are added. None: all rows are kept.

    Raises:
        AgclError: If a value is not usable.
    """

    share: float = 0.1
    buffer_size: int | None = None

    def __post_init__(self) -> None:
        if not (self.share > 0 and math.isfinite(self.share)):
            raise AgclError(f"`replay.share` is {self.share}; give a number above 0, or leave `replay` out.")
        if self.buffer_size is not None and self.buffer_size < 1:
            raise AgclError(
                f"`replay.buffer_size` is {self.buffer_size}; give at least 1, or leave it out to keep all."
            )

    def num_replayed(self, num_new: int) -> int:
        """Rows of old tasks in each epoch of a task with ``num_new`` training rows."""
        return max(1, round(self.share * num_new))

    def num_kept(self, num_rows: Sequence[int]) -> list[int]:
        """Rows kept of each old task, given how many training rows each has; none takes over another's share."""
        if self.buffer_size is None:
            return list(num_rows)
        each, rest = divmod(self.buffer_size, len(num_rows))
        return [min(num, each + (index < rest)) for index, num in enumerate(num_rows)]


def draw(num_kept: Sequence[int], count: int, generator: torch.Generator) -> list[Tensor]:
    """Draw the rows that one epoch replays.

    Args:
        num_kept: Rows kept of each old task, each at least 1.
        count: Rows to draw in all.
        generator: Source of chance.

    Returns:
        For each old task the positions drawn among its kept rows, int64; ``count`` in all.
    """
    each, rest = divmod(count, len(num_kept))
    gets_one_more = torch.randperm(len(num_kept), generator=generator) < rest
    drawn = []
    for num, more in zip(num_kept, gets_one_more.tolist(), strict=True):
        wanted = each + more
        rounds = [torch.randperm(num, generator=generator) for _ in range(math.ceil(wanted / num))]
        drawn.append(torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:wanted])
    return drawn
