"""One batch of samples, shared by processes that wait for each other."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ranks import Ranks
from ..shards import is_sharded, local_part
from .relevance import Consumer


class Turn:
    """Lets every process run its samples forward and backward, and every process consume its part of all gradients.

    Where a sample of one process counts, the others run theirs of that place too, whether it counts or not: the
    gradients of one tensor are exchanged by all at a time.

    Args:
        ranks: The processes.
        consume: Called with name, this process's part of the parameter and of a gradient; in the order of the samples.
        num_samples: Of the batch that is shared out, sample ``i`` to process ``i % ranks.size``; those beyond do not
            count.
        device: Of the samples.
        per_sample: Whether each sample's gradient is consumed, or the sum over a process's samples.

    Attributes:
        num_used: Samples that count, of all processes.
    """

    def __init__(
        self, ranks: Ranks, consume: Consumer, num_samples: int, device: torch.device, *, per_sample: bool
    ) -> None:
        self.num_used = 0
        self._ranks, self._consume, self._per_sample = ranks, consume, per_sample
        self._num_samples, self._device = num_samples, device
        self._num_seen = 0  # of this process's samples
        self._draws: list[Sequence[bool]] = []  # for each gradient of a tensor to come: whose count
        self._consumed: Counter[str] = Counter()

    def choose(self, flags: list[bool]) -> list[bool]:
        """Which of this process's next samples are run backward, given which of them count here."""
        first = self._num_seen * self._ranks.size + self._ranks.rank
        self._num_seen += len(flags)
        own = [flag and first + place * self._ranks.size < self._num_samples for place, flag in enumerate(flags)]
        found = self._ranks.flags(own, self._device)
        self.num_used += sum(map(sum, found))
        self._consumed.clear()
        if self._per_sample:
            columns = list(zip(*found, strict=True))
            self._draws = [column for column in columns if any(column)]
            return [any(column) for column in columns]
        counts = [any(row) for row in found]
        self._draws = [counts] if any(counts) else []
        return own if any(own) else [any(counts)] * len(own)

    def consume(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Exchange one gradient, and consume those that count."""
        counts = self._draws[self._consumed[name]]
        self._consumed[name] += 1
        part = local_part(parameter.detach()) if is_sharded(parameter) else self._ranks.part(parameter.detach())
        for is_counted, piece in zip(counts, self._ranks.exchange(name, gradient), strict=True):
            if is_counted:
                self._consume(name, part, piece)

    def finish(self) -> None:
        """See :meth:`Ranks.finish`."""
        self._ranks.finish(self._device)
