"""Processes that share the samples of a task, and of which each keeps its part of every tensor.

A part is some rows: along the first dimension a tensor is cut into as many pieces as there are processes, the last ones
shorter or empty. FSDP2 cuts weights in the same way, so that a part of the scores belongs to a part of the weights.

Every process calls every method of :class:`Ranks` in the same order: they wait for each other.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from agcl.errors import AgclError

_NO_TENSOR = -1


@dataclass(frozen=True)
class Ranks:
    """All processes of a run, or the only one.

    Attributes:
        rank: Of this process, 0-based.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_this_run(cls) -> "Ranks":
        """The processes of the default group; one alone, if there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def rows(self, shape: Sequence[int], rank: int | None = None) -> tuple[int, int]:
        """Where a process's part of a tensor begins and ends along the first dimension.

        Args:
            shape: Of the whole tensor; a scalar counts as one row.
            rank: Whose part; this process's if None.
        """
        num_rows = shape[0] if shape else 1
        length = math.ceil(num_rows / self.size)
        start = min(length * (self.rank if rank is None else rank), num_rows)
        return start, min(start + length, num_rows)

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor: a view; the tensor itself, if there is one process."""
        if self.size == 1:
            return whole
        start, end = self.rows(whole.shape)
        return (whole if whole.ndim else whole.view(1))[start:end]

    def exchange(self, name: str, whole: Tensor) -> list[Tensor]:
        """From each process's tensor of that name, this process's part.

        Args:
            name: The same in all processes, which is checked.
            whole: This process's; of the same shape and dtype in all.

        Returns:
            By rank.

        Raises:
            AgclError: If another process came with another tensor, or has none left.
        """
        if self.size == 1:
            return [whole]
        self._agree(zlib.crc32(name.encode()), name, whole.device)
        width = whole.numel() // max(whole.shape[0] if whole.ndim else 1, 1)
        sizes = [(end - start) * width for start, end in (self.rows(whole.shape, rank) for rank in range(self.size))]
        shape = self.part(whole).shape
        received = whole.new_empty(self.size, *shape)
        distributed.all_to_all_single(
            received.view(-1), whole.contiguous().view(-1), [sizes[self.rank]] * self.size, sizes
        )
        return list(received)

    def finish(self, device: torch.device) -> None:
        """After the last :meth:`exchange` of a batch: check that no process is waiting for one more.

        Raises:
            AgclError: If one is.
        """
        if self.size > 1:
            self._agree(_NO_TENSOR, "", device)

    def whole(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor that the parts make up, in every process.

        Args:
            part: This process's.
            shape: Of the whole.
        """
        if self.size == 1:
            return part
        lengths = [end - start for start, end in (self.rows(shape, rank) for rank in range(self.size))]
        padded = part.new_zeros(lengths[0], *shape[1:])
        padded[: len(part)] = part
        # Bytes, since not every backend has every dtype of fixed point.
        pieces = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather([piece.view(torch.uint8) for piece in pieces], padded.view(torch.uint8))
        return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)]).view(tuple(shape))

    def maximum(self, value: Tensor) -> Tensor:
        """The largest of the processes' scalars."""
        return self._reduced(value, distributed.ReduceOp.MAX)

    def total(self, value: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape."""
        return self._reduced(value, distributed.ReduceOp.SUM)

    def agree_on(self, value: Tensor) -> None:
        """Overwrite a tensor, contiguous and of one shape everywhere, by the first process's."""
        if self.size > 1:
            distributed.broadcast(value, src=0)

    def flags(self, mine: Sequence[bool], device: torch.device) -> list[list[bool]]:
        """The flags of all processes, by rank; each has as many."""
        if self.size == 1:
            return [list(mine)]
        own = torch.tensor(mine, dtype=torch.uint8, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        return [flags.bool().tolist() for flags in found]

    def collected(self, mine: Any) -> list[Any]:
        """Each process's object, which can be pickled, by rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, mine)
        return found

    def _reduced(self, value: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value, operation)
        return value

    def _agree(self, code: int, name: str, device: torch.device) -> None:
        """Raise in all processes, instead of waiting for ever in some, if they are not at the same tensor."""
        own = torch.tensor([code], device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        if any(int(other) != code for other in found):
            raise AgclError(
                f"The processes do not attribute the same parameters{f' (`{name}` in this one)' if name else ''}: "
                "what a sample reaches depends on the sample in this model (experts?). Attribute in one process."
            )


ALONE = Ranks()
