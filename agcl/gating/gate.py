"""What the gates share: a parameter with its importance, and a gate's life cycle on an optimizer."""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, distributed, equal, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import AgclError
from ..shards import is_sharded, local_part
from .plasticity import mean_plasticity


class GatedParameter:
    """One parameter and its importance; does not keep the parameter alive."""

    def __init__(
        self, name: str, parameter: nn.Parameter, importance: Tensor, strength: float, moves: bool = True
    ) -> None:
        if importance.shape != parameter.shape:
            raise AgclError(
                f"Importance of `{name}` has shape {tuple(importance.shape)}, the parameter {tuple(parameter.shape)}; "
                "use the importance with the model it was computed for."
            )
        self.name = name
        self.strength = strength
        self.reference = weakref.ref(parameter)
        self.importance = local_part(importance.detach())
        self._is_local = is_sharded(importance)
        self.moves = moves
        self._local: Tensor | None = None
        self._rows: Tensor | None = None
        self.mean_plasticity, self.is_open = mean_plasticity(name, self.importance, strength)
        if self._is_local:
            self.mean_plasticity = _mean_of_all(self.mean_plasticity, importance)

    def local_importance(self, parameter: Tensor) -> Tensor:
        """Importance beside the parameter: on its device and, where it is sharded (DTensor), this rank's shard."""
        if not self.moves:
            return self._beside(parameter, self.importance.to(parameter.device))
        if self._local is None or self._local.device != parameter.device:
            self.importance = self.importance.to(parameter.device)
            self._local = self._beside(parameter, self.importance)
            self._rows = _few_rows(self._local)
        return self._local

    def _beside(self, parameter: Tensor, importance: Tensor) -> Tensor:
        return importance if self._is_local else _shard_like(parameter, importance)

    def held_rows(self, parameter: Tensor) -> Tensor | None:
        """Indices of the rows with any importance beside the parameter, if those are at most half; else None."""
        if self.moves:  # else importance would be carried over once more just to look at it
            self.local_importance(parameter)
        return self._rows

    def held(self) -> list[Tensor]:
        """The importance as it lies in memory; a shard's is in memory of its own."""
        return [self.importance] if self._local is None else [self.importance, self._local]


class Gate:
    """What both gates share: which parameters are gated, and the life cycle on an optimizer."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        importance: Mapping[str, Tensor],
        strength: float = 1.0,
        moves_importance: bool = True,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise AgclError(f"`strength` is {strength}; choose a finite number >= 0 (1: the paper's gate, 0: no gate).")
        self.strength = float(strength)
        self._gated: dict[int, GatedParameter] = {}
        unknown = set(importance)
        for name, parameter in named_parameters:
            unknown.discard(name)
            if name not in importance:
                continue
            twin = self._gated.get(id(parameter))
            if twin is not None and not equal(twin.importance, importance[name]):
                raise AgclError(f"`{name}` and `{twin.name}` are one parameter; give its importance under one name.")
            if twin is None:
                self._gated[id(parameter)] = GatedParameter(
                    name, parameter, importance[name], self.strength, moves_importance
                )
        if unknown:
            raise AgclError(
                f"Importance of `{min(unknown)}`: no parameter of that name; use the names of named_parameters()."
            )
        self._handles: list[RemovableHandle] = []
        self._is_attached = False

    def attach(self, optimizer: Optimizer) -> Self:
        """Start gating the parameters that ``optimizer`` holds.

        Returns:
            The gate, so that ``with gate.attach(optimizer):`` gates for the duration of the block.

        Raises:
            AgclError: If the gate is attached already, or the optimizer holds none of the gated parameters.
        """
        if self._is_attached:
            raise AgclError(f"This {type(self).__name__} is attached already; call detach() first.")
        held = [gated for parameter in parameters_of(optimizer) if (gated := self._find(parameter)) is not None]
        if not held:
            raise AgclError(
                "The optimizer holds none of the gated parameters; build the gate from the model it trains."
            )
        self._install(optimizer, held)
        self._is_attached = True
        return self

    def detach(self) -> None:
        """Stop gating and remove every hook; harmless if not attached. The gate may be attached again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._is_attached = False

    def plasticity(self) -> dict[str, float]:
        """Mean of ``(1 - importance) ** strength`` over each gated parameter, in [0, 1]; 0: frozen, 1: free."""
        return {gated.name: gated.mean_plasticity for gated in self._gated.values()}

    def held_importance(self) -> list[Tensor]:
        """The importance tensors that the gate holds between steps, for counting memory."""
        return [tensor for gated in self._gated.values() for tensor in gated.held()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _find(self, parameter: Tensor) -> GatedParameter | None:
        gated = self._gated.get(id(parameter))
        # The id of a parameter that is gone may have been given to another one.
        return gated if gated is not None and gated.reference() is parameter else None

    def _install(self, optimizer: Optimizer, held: list[GatedParameter]) -> None:
        raise NotImplementedError


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """All that it holds, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _few_rows(importance: Tensor) -> Tensor | None:
    if importance.ndim < 2:
        return None
    rows = _row_maxima(importance).nonzero().flatten()
    return rows if 2 * len(rows) <= len(importance) else None


def _row_maxima(importance: Tensor) -> Tensor:
    rows = importance.flatten(1)
    # Of bytes on a CPU ten times as fast as torch.any of rows turned into truth values; not every dtype has it.
    return rows.amax(1) if importance.dtype == torch.uint8 and rows.shape[1] else rows.bool().any(1)


def _shard_like(parameter: Any, full: Tensor) -> Tensor:
    """This rank's part of ``full`` where the parameter is a DTensor, else ``full``."""
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    # Every rank holds the same importance: no communication.
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _mean_of_all(mean: float, importance: Any) -> float:
    """Mean over all shards of a DTensor from the one of this rank's; all ranks call it."""
    local = importance.to_local()
    total = torch.tensor(mean * local.numel(), device=local.device)
    for dimension in range(importance.device_mesh.ndim):
        distributed.all_reduce(total, group=importance.device_mesh.get_group(dimension))
    return float(total) / max(importance.numel(), 1)
