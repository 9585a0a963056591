"""What is kept of one parameter while samples stream by: enough for a mean over all of them, or over the K largest.

All work entry by entry on a flat parameter, a piece at a time, so that temporaries stay in the cache.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

_PIECE = 2**20  # entries whose K values are wide at one time


class Accumulator(ABC):
    """Of one parameter. For each sample: `add` every piece once, then count it with `next_sample`.

    Several samples may be added side by side, piece by piece, each ``ahead`` of the count, and then be counted at once.

    Attributes:
        count: Number of samples taken in.
        skips_zeros: Whether pieces that are zero may be left out; `add_rows` then takes what is left.
    """

    skips_zeros: ClassVar[bool] = False

    def __init__(self) -> None:
        self.count = 0

    def next_sample(self, num_samples: int = 1) -> None:
        """All pieces of a sample, or of several, have been added."""
        self.count += num_samples

    @abstractmethod
    def add(self, start: int, value: Tensor, ahead: int = 0) -> None:
        """Take in a piece of a sample; the same piece of the samples before it has been taken in.

        Args:
            start: Index of the piece's first entry in the flat parameter.
            value: Shape ``(n,)``, floating point; neither changed nor kept.
            ahead: How many samples come between those that are counted and this one.
        """

    def add_square(self, start: int, root: Tensor, ahead: int = 0) -> None:
        """`add` of the square of ``root``, which may be overwritten."""
        self.add(start, root.square_(), ahead)

    def add_rows(self, rows: Tensor, value: Tensor) -> None:
        """Take in some rows of a sample, of which all others are zero.

        Args:
            rows: Their numbers, int64, each once.
            value: Shape ``(rows, width)``, floating point.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, num_samples: int) -> Tensor:
        """The mean, shape ``(size,)``, float32; gives up the memory, so call it once.

        Args:
            num_samples: Number of samples of the task, of which some may not have reached this parameter.
        """


class Mean(Accumulator):
    """Mean over all samples of the task, those that did not reach the parameter counting as zero; 4 bytes an entry."""

    skips_zeros = True

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self._total = torch.zeros(size, device=device)

    def add(self, start: int, value: Tensor, ahead: int = 0) -> None:
        """See :meth:`Accumulator.add`."""
        self._total[start : start + len(value)].add_(value)

    def add_square(self, start: int, root: Tensor, ahead: int = 0) -> None:
        """See :meth:`Accumulator.add_square`; one pass over the memory instead of two."""
        if root.dtype == self._total.dtype:
            self._total[start : start + len(root)].addcmul_(root, root)
        else:
            super().add_square(start, root, ahead)

    def add_rows(self, rows: Tensor, value: Tensor) -> None:
        """See :meth:`Accumulator.add_rows`."""
        self._total.view(-1, value.shape[1]).index_add_(0, rows, value.to(self._total.dtype))

    def score(self, num_samples: int) -> Tensor:
        """See :meth:`Accumulator.score`."""
        return self._total.div_(num_samples)


class MeanOfSeen(Mean):
    """Mean over the samples that reached the parameter."""

    def score(self, num_samples: int) -> Tensor:
        """See :meth:`Accumulator.score`."""
        return self._total.div_(self.count)


class TopKMean(Accumulator):
    """Mean of the K largest values, or of all if there are fewer; exact. K values of ``dtype`` an entry, sorted."""

    def __init__(self, size: int, device: torch.device, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._largest = torch.empty(top_k, size, dtype=dtype, device=device)

    def add(self, start: int, value: Tensor, ahead: int = 0) -> None:
        """See :meth:`Accumulator.add`."""
        held, num_held = self._largest[:, start : start + len(value)], self.count + ahead
        value = value.to(held.dtype)
        for row in held[:num_held]:
            smaller = torch.minimum(row, value)
            torch.maximum(row, value, out=row)
            value = smaller
        if num_held < len(held):
            held[num_held].copy_(value)

    def score(self, num_samples: int) -> Tensor:
        """See :meth:`Accumulator.score`."""
        pieces = self._largest[: self.count].split(_PIECE, dim=1)
        return torch.cat([piece.mean(0, dtype=torch.float32) for piece in pieces])


class BlockMaximaMean(Accumulator):
    """Stands in for the mean of the K largest values: the mean of the maxima of K consecutive blocks of samples.

    One maximum of ``dtype`` and one float32 sum an entry, whatever K is; for K = 1 it is the maximum. The K maxima are
    the values of K different samples, so their mean is never above that of the K largest. It is below where two of
    those fall in one block: the less so, the more a few samples stand out.

    Blocks are cut for ``num_planned`` samples, lengths differing by one at most; samples beyond join the last block.
    Where fewer come, blocks are missing, and their maxima count as zero: the sum is divided by K, or by the number of
    values if that is smaller. Scores >= 0 are then still not above the exact ones, but a good deal below.

    Args:
        size: Number of entries.
        device: Of the samples.
        top_k: K, less than ``num_planned``.
        dtype: Of the maxima.
        num_planned: Number of samples expected.
    """

    def __init__(self, size: int, device: torch.device, top_k: int, dtype: torch.dtype, num_planned: int) -> None:
        super().__init__()
        self._top_k, self._num_planned = top_k, num_planned
        self._total = torch.zeros(size, device=device)
        self._maximum = torch.empty(size, dtype=dtype, device=device)

    def _block(self, index: int) -> int:
        """The block of a sample."""
        return min(index * self._top_k // self._num_planned, self._top_k - 1)

    def add(self, start: int, value: Tensor, ahead: int = 0) -> None:
        """See :meth:`Accumulator.add`."""
        index, piece = self.count + ahead, slice(start, start + len(value))
        is_first = index == 0 or self._block(index - 1) < self._block(index)
        is_last = self._block(index) < self._block(index + 1)
        held, total = self._maximum[piece], self._total[piece]
        if is_first and is_last:
            total.add_(value)
        elif is_first:
            held.copy_(value)
        elif is_last:
            total.add_(torch.maximum(held, value.to(held.dtype)))
        else:
            torch.maximum(held, value.to(held.dtype), out=held)

    def score(self, num_samples: int) -> Tensor:
        """See :meth:`Accumulator.score`."""
        if self._block(self.count - 1) == self._block(self.count):  # the block at hand is open still
            self._total.add_(self._maximum)
        return self._total.div_(min(self.count, self._top_k))
