"""The weights of one gated parameter while the optimizer moves them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..shards import local_part
from .gate import GatedParameter
from .plasticity import blend


@dataclass
class HeldWeights:
    """A gated parameter's memory, or of it the rows that are held back.

    Attributes:
        gated: The parameter and its importance.
        weights: The memory behind it.
        rows: Indices, int64, of the rows with any importance, where those are few: most rows of an embedding stand for
            tokens that no answer needed, and move as without a gate. None for all rows.
    """

    gated: GatedParameter
    weights: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, gated: GatedParameter, parameter: nn.Parameter) -> "HeldWeights":
        """What the gate holds of a parameter."""
        return cls(gated, local_part(parameter.detach()), gated.held_rows(parameter))

    @property
    def num_entries(self) -> int:
        """Entries that :meth:`copy` copies."""
        return self.weights.numel() if self.rows is None else len(self.rows) * self.weights[0].numel()

    def copy(self, memory: Tensor) -> Tensor:
        """Copy the held weights into ``memory``, flat, of :attr:`num_entries`; returns it in their shape."""
        if self.rows is None:
            return memory.view(self.weights.shape).copy_(self.weights)
        out = memory.view(len(self.rows), *self.weights.shape[1:])
        return torch.index_select(self.weights, 0, self.rows, out=out)

    @torch.no_grad()
    def blend(self, old: Tensor) -> None:
        """In place: ``old + plasticity * (present - old)``; nothing if the parameter is gone."""
        parameter = self.gated.reference()
        if parameter is None:
            return
        importance = self.gated.local_importance(parameter)
        if self.rows is None:
            blend(self.weights, old, importance, self.gated.strength)
            return
        new = self.weights.index_select(0, self.rows)
        blend(new, old, importance.index_select(0, self.rows), self.gated.strength)
        self.weights.index_copy_(0, self.rows, new)
