"""Gradients of a batch's samples by one matrix, made a few rows at a time, so that what is done with them stays cached.

What a sample adds to the gradient of a linear map is ``left.T @ right`` over its few tokens. Whole, that is as large as
the matrix, and writing it, scoring it and adding it up costs several times what computing it does. Rows that no token
touches need not be made at all: most of an embedding's, the output side of a tied one included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | Tensor  # of a matrix: consecutive ones (start and stop are given), or their numbers, ascending
_CPU_PIECE, _DEVICE_PIECE = 2**17, 2**24  # entries: a few pieces fit a core's cache; few kernel launches


@dataclass(frozen=True)
class Part:
    """``left.T @ right``: what one use of a matrix adds to one sample's gradient.

    Attributes:
        left: Shape ``(tokens, rows of the matrix)``; or the row that each token looks up, int64 of shape ``(tokens,)``,
            which stands for a one-hot vector.
        right: Shape ``(tokens, columns of the matrix)``, floating point.
    """

    left: Tensor
    right: Tensor

    @property
    def is_lookup(self) -> bool:
        """Whether ``left`` holds row numbers."""
        return self.left.dim() == 1

    def mark(self, is_touched: Tensor) -> None:
        """Set the flags, one a row of the matrix, of those that are not zero throughout."""
        if self.is_lookup:
            is_touched[self.left] = True
        else:
            is_touched |= self.left.any(0)

    def add_to(self, total: Tensor, rows: Rows) -> None:
        """Add these rows to ``total``."""
        if self.is_lookup:
            places, is_here = _places(self.left, rows)
            total.index_add_(0, places[is_here], self.right[is_here].to(total.dtype))
        else:
            total.add_(self._product(rows))

    def write_to(self, total: Tensor, rows: Rows) -> None:
        """Write these rows over ``total``."""
        if self.is_lookup:
            self.add_to(total.zero_(), rows)
        elif self.right.dtype == total.dtype:
            torch.mm(self.left[:, rows].T, self.right, out=total)
        else:  # autocast sends back narrower gradients
            total.copy_(self._product(rows))

    def _product(self, rows: Rows) -> Tensor:
        return self.left[:, rows].T @ self.right


def scored_in(tensor: Tensor) -> torch.dtype:
    """The dtype that squares and products of such a tensor's entries fit: its own, but float32 for float16."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _places(numbers: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Where in ``rows`` each number is, and whether it is."""
    if isinstance(rows, slice):
        return numbers - rows.start, (numbers >= rows.start) & (numbers < rows.stop)
    places = torch.searchsorted(rows, numbers).clamp_max_(len(rows) - 1)
    return places, rows[places] == numbers


class SampleGradients:
    """The gradients by one matrix of some samples of a batch.

    Args:
        like: The matrix, detached.
        parts: For each sample what the matrix's uses add; at least one.
    """

    def __init__(self, like: Tensor, parts: Sequence[Sequence[Part]]) -> None:
        self.like = like
        self.num_samples = len(parts)
        self._parts = parts

    def pieces(self, *, skips_zeros: bool = False) -> Iterator[tuple[Rows, int, Tensor]]:
        """All gradients, some rows of the first sample's, the same rows of the next one's, and so on.

        Args:
            skips_zeros: Leave out rows that are zero in all samples, where they are at least half.

        Yields:
            Rows, the sample's number, and its gradient there, as `scored_in` says, in memory that may be overwritten
            and is used again for the next.
        """
        limit = _CPU_PIECE if self.like.device.type == "cpu" else _DEVICE_PIECE
        num_rows = max(1, limit // max(self.like.shape[1], 1))
        memory = self.like.new_empty(min(num_rows, len(self.like)), self.like.shape[1], dtype=scored_in(self.like))
        for rows, count in self._cut(num_rows, skips_zeros):
            for number, (first, *others) in enumerate(self._parts):
                gradient = memory[:count]
                first.write_to(gradient, rows)
                for part in others:
                    part.add_to(gradient, rows)
                yield rows, number, gradient

    def _cut(self, num_rows: int, skips_zeros: bool) -> Iterator[tuple[Rows, int]]:
        """Rows to do at a time, and how many they are."""
        if skips_zeros and (touched := self._few_touched()) is not None:
            yield from ((rows, len(rows)) for rows in touched.split(num_rows) if len(rows))
            return
        for start in range(0, len(self.like), num_rows):
            stop = min(start + num_rows, len(self.like))
            yield slice(start, stop), stop - start

    def _few_touched(self) -> Tensor | None:
        """Rows that are not zero in all samples, if they are at most half."""
        is_touched = torch.zeros(len(self.like), dtype=torch.bool, device=self.like.device)
        touched = is_touched.nonzero().flatten()
        for part in (part for parts in self._parts for part in parts):
            part.mark(is_touched)
            touched = is_touched.nonzero().flatten()
            if 2 * len(touched) > len(self.like):  # nearly always after the first, but for an embedding
                return None
        return touched


PieceConsumer = Callable[[str, SampleGradients], None]
