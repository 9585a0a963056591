"""Gates that hold a parameter back by its importance, for any PyTorch training loop.

``plasticity = (1 - importance) ** strength``, entry by entry. `GradientGate` is the paper's gate (arXiv 2605.05285,
Eq. 13; the form is SPG's, arXiv 2306.14775): it multiplies the gradient. An adaptive optimizer divides that factor out
again, since its step does not depend on the gradient's size, and decoupled weight decay never sees the gradient.
`UpdateGate` therefore multiplies the optimizer's whole step. `choose_gate` picks the one that works.
"""

import inspect
import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import AgclError

_MAX_LEVEL = 255  # uint8 importance is fixed point, value / 255, as in agcl.attribution.importance
_CPU_CHUNK, _DEVICE_CHUNK = 2**18, 2**24  # entries: temporaries stay in cache; few kernel launches


class _GatedParameter:
    """One parameter and its importance; does not keep the parameter alive."""

    def __init__(self, name: str, parameter: nn.Parameter, importance: Tensor, strength: float) -> None:
        if importance.shape != parameter.shape:
            raise AgclError(
                f"Importance of `{name}` has shape {tuple(importance.shape)}, the parameter {tuple(parameter.shape)}; "
                "use the importance with the model it was computed for."
            )
        self.name = name
        self.strength = strength
        self.reference = weakref.ref(parameter)
        self.importance = importance.detach()
        self._local: Tensor | None = None
        self.mean_plasticity, self.is_open = self._summary()

    def _summary(self) -> tuple[float, bool]:
        """Mean plasticity, and whether nothing is held back (importance zero throughout, or strength 0)."""
        importance, num_entries = self.importance, max(self.importance.numel(), 1)
        if importance.dtype == torch.uint8:
            counts = torch.bincount(importance.reshape(-1), minlength=_MAX_LEVEL + 1).cpu().double()
            kept = (counts * _plasticity_levels(self.strength, torch.float64, counts.device)).sum()
            return float(kept) / num_entries, self.strength == 0 or float(counts[0]) == importance.numel()
        if not importance.is_floating_point():
            raise AgclError(
                f"Importance of `{self.name}` is {importance.dtype}; give uint8 fixed point or floats in [0, 1]."
            )
        if not ((importance >= 0) & (importance <= 1)).all():
            raise AgclError(f"Importance of `{self.name}` has values outside [0, 1] or NaN; normalise it first.")
        total = sum(float(_plasticity(piece, self.strength, torch.float64).sum()) for (piece,) in _chunks(importance))
        return total / num_entries, self.strength == 0 or not bool(importance.any())

    def local_importance(self, parameter: Tensor) -> Tensor:
        """Importance beside the parameter: on its device and, where it is sharded (DTensor), this rank's shard."""
        if self._local is None or self._local.device != parameter.device:
            self.importance = self.importance.to(parameter.device)
            self._local = _shard_like(parameter, self.importance)
        return self._local


class _Gate:
    """What both gates share: which parameters are gated, and the life cycle on an optimizer."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        importance: Mapping[str, Tensor],
        strength: float = 1.0,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise AgclError(f"`strength` is {strength}; choose a finite number >= 0 (1: the paper's gate, 0: no gate).")
        self.strength = float(strength)
        self._gated: dict[int, _GatedParameter] = {}
        unknown = set(importance)
        for name, parameter in named_parameters:
            unknown.discard(name)
            if name not in importance:
                continue
            twin = self._gated.get(id(parameter))
            if twin is not None and not torch.equal(twin.importance, importance[name]):
                raise AgclError(f"`{name}` and `{twin.name}` are one parameter; give its importance under one name.")
            if twin is None:
                self._gated[id(parameter)] = _GatedParameter(name, parameter, importance[name], self.strength)
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
        held = [gated for parameter in _parameters(optimizer) if (gated := self._find(parameter)) is not None]
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _find(self, parameter: Tensor) -> _GatedParameter | None:
        gated = self._gated.get(id(parameter))
        # The id of a parameter that is gone may have been given to another one.
        return gated if gated is not None and gated.reference() is parameter else None

    def _install(self, optimizer: Optimizer, held: list[_GatedParameter]) -> None:
        raise NotImplementedError


class GradientGate(_Gate):
    """Multiplies each gradient by the plasticity, ``(1 - importance) ** strength * grad`` (Eq. 13).

    A hook on each parameter scales the gradient of every backward pass once, before it is accumulated: accumulation
    over micro-batches, clipping, DDP and tied weights each see it exactly once. Computed in float32 (float64 for
    float64) and rounded to the gradient's dtype. Only with an optimizer whose step is linear in the gradient does the
    step scale with it; see `choose_gate`. Momentum gathered before the gate was attached is not scaled, nor are
    parameters that did not require a gradient then.

    Args:
        named_parameters: Pairs as from ``model.named_parameters()``. The model is not kept alive.
        importance: Parameter name to tensor of the parameter's shape, uint8 fixed point (``value / 255``) or floating
            point in [0, 1], on any device. Held without copying: leave it unchanged. Parameters without importance are
            not gated.
        strength: Exponent >= 0; 1 is the paper's linear gate, 0 is no gate.

    Raises:
        AgclError: If an importance has an unknown name, another shape or dtype, or values outside [0, 1].

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with GradientGate(model.named_parameters(), {"weight": torch.tensor([[0.25, 1.0]])}).attach(optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad
        tensor([[0.7500, 0.0000]])
    """

    def _install(self, optimizer: Optimizer, held: list[_GatedParameter]) -> None:
        for gated in held:
            parameter = gated.reference()
            if parameter is None or gated.is_open or not parameter.requires_grad:
                continue
            if _is_sharded(parameter):
                self.detach()
                raise AgclError(
                    f"`{gated.name}` is sharded (DTensor), where gradient hooks do not run; use UpdateGate."
                )
            self._handles.append(parameter.register_hook(partial(_scaled_gradient, gated)))


def _scaled_gradient(gated: _GatedParameter, gradient: Tensor) -> Tensor:
    dtype = _working_dtype(gradient)
    plasticity = _plasticity(gated.local_importance(gradient), gated.strength, dtype)
    # Not in place: autograd may hand the same tensor to another branch.
    return (gradient * plasticity).to(gradient.dtype)


class UpdateGate(_Gate):
    """Multiplies the optimizer's whole step by the plasticity: ``W <- W_old + plasticity * (W_new - W_old)``.

    Momentum, preconditioning and weight decay are included, for any ``torch.optim.Optimizer``, through its public step
    hooks. Entries of importance 1 keep their value, entries of importance 0 move exactly as without the gate. The
    optimizer's own state is not gated.

    The gated weights that have a gradient are copied just before they change and the copies are dropped after the
    step, so the peak grows by one copy of the gated weights, and nothing stays in between. Where ``step`` is given a
    closure (Lightning does), the copies are made after its first call, thus not during forward and backward. bfloat16
    and float16 weights are blended in float32 and rounded. Sharded parameters (DTensor, FSDP2) are gated shard by
    shard.

    An optimizer that changes weights before it first calls its closure, or weights without a gradient, is not
    supported. If the optimizer raises in the middle of a step, that step is not gated.

    Args:
        named_parameters: Pairs as from ``model.named_parameters()``. The model is not kept alive.
        importance: Parameter name to tensor of the parameter's shape, uint8 fixed point (``value / 255``) or floating
            point in [0, 1], on any device. Held without copying: leave it unchanged. Parameters without importance are
            not gated.
        strength: Exponent >= 0; 1 is linear, 0 is no gate.

    Raises:
        AgclError: If an importance has an unknown name, another shape or dtype, or values outside [0, 1].

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        >>> with UpdateGate(model.named_parameters(), {"weight": torch.tensor([[0.25, 1.0]])}).attach(optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        importance: Mapping[str, Tensor],
        strength: float = 1.0,
    ) -> None:
        super().__init__(named_parameters, importance, strength)
        self._snapshot: list[tuple[_GatedParameter, Tensor, Tensor]] = []
        self._awaits_closure = False
        self._step_frame: FrameType | None = None  # of the step under way, or of one that raised

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of copied weights held now; zero outside of an optimizer's update."""
        return sum(old.numel() * old.element_size() for _, _, old in self._snapshot)

    def detach(self) -> None:
        """Stop gating, drop what an interrupted step left behind; harmless if not attached."""
        super().detach()
        self._snapshot.clear()
        self._awaits_closure = False
        self._step_frame = None

    def _install(self, optimizer: Optimizer, held: list[_GatedParameter]) -> None:
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caller = _calling_frame()
        if self._step_frame is not None and _is_on_stack(self._step_frame, caller):
            return None  # a subclass's step calls super().step(), which runs the hooks as well; the outer step counts
        self._step_frame = caller
        self._snapshot.clear()  # of a step that raised
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._awaits_closure = closure is not None
        if closure is None:
            self._copy_weights(optimizer)
            return None
        wrapped = partial(self._run_closure, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _run_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        result = closure()
        if self._awaits_closure:  # LBFGS calls it again, with the weights already on their way
            self._awaits_closure = False
            self._copy_weights(optimizer)
        return result

    def _copy_weights(self, optimizer: Optimizer) -> None:
        for parameter in _parameters(optimizer):
            gated = self._find(parameter)
            if gated is not None and not gated.is_open and parameter.grad is not None:
                weights = _local(parameter)
                self._snapshot.append((gated, weights, weights.clone()))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _calling_frame() is not self._step_frame:
            return
        self._step_frame = None
        if self._awaits_closure:
            raise AgclError(f"{type(optimizer).__name__}.step did not call its closure, so the step was not gated.")
        while self._snapshot:
            gated, weights, old = self._snapshot.pop()
            parameter = gated.reference()
            if parameter is not None:
                _blend(weights, old, gated.local_importance(parameter), gated.strength)


def _calling_frame() -> FrameType | None:
    """Frame of the function that called the caller."""
    frame = inspect.currentframe()
    return frame.f_back.f_back if frame is not None and frame.f_back is not None else None


def _is_on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


@torch.no_grad()
def _blend(new: Tensor, old: Tensor, importance: Tensor, strength: float) -> None:
    """In place in ``new``: old + plasticity * (new - old); lerp is exact at 0 and at 1."""
    dtype = _working_dtype(new)
    for new_piece, old_piece, importance_piece in _chunks(new, old, importance):
        plasticity = _plasticity(importance_piece, strength, dtype)
        if new.dtype == dtype:
            torch.lerp(old_piece, new_piece, plasticity, out=new_piece)
        else:
            new_piece.copy_(torch.lerp(old_piece.to(dtype), new_piece.to(dtype), plasticity))


def _plasticity(importance: Tensor, strength: float, dtype: torch.dtype) -> Tensor:
    """(1 - importance) ** strength in fresh memory; uint8 is looked up, several times as fast as a power per entry."""
    if importance.dtype == torch.uint8:
        levels = _plasticity_levels(strength, dtype, importance.device)
        return levels.index_select(0, importance.reshape(-1).int()).view(importance.shape)
    return (1 - importance.to(dtype)).pow_(strength)


def _plasticity_levels(strength: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(_MAX_LEVEL, -1, -1, dtype=dtype, device=device).div_(_MAX_LEVEL).pow_(strength)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of tensors of one shape; flat pieces, or groups of rows where one of them is not contiguous."""
    first = tensors[0]
    size = _CPU_CHUNK if first.device.type == "cpu" else _DEVICE_CHUNK
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    else:
        size = max(1, size * len(first) // max(first.numel(), 1))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _shard_like(parameter: Any, full: Tensor) -> Tensor:
    """This rank's part of ``full`` where the parameter is a DTensor, else ``full``."""
    if not _is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    # Every rank holds the same importance: no communication.
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor, without importing torch.distributed.tensor


def _local(parameter: Tensor) -> Tensor:
    """The memory behind a parameter: this rank's shard of a DTensor, else the parameter itself, detached."""
    detached: Any = parameter.detach()
    return detached.to_local() if _is_sharded(detached) else detached


def choose_gate(optimizer: Optimizer) -> Literal["gradient", "update"]:
    """The gate that scales this optimizer's step.

    ``"gradient"``, the paper's and the cheaper one, only for ``torch.optim.SGD`` itself (momentum and Nesterov are
    linear in the gradient) without weight decay, which a scaled gradient does not scale; ``"update"`` for everything
    else.
    """
    has_decay = any(group.get("weight_decay", 0) != 0 for group in optimizer.param_groups)
    return "gradient" if type(optimizer) is SGD and not has_decay else "update"


def cancels_gradient_gate(optimizer: Optimizer) -> bool:
    """Whether a constant factor on the gradient (nearly) leaves the optimizer's step as it was.

    True for all of ``torch.optim`` but SGD and ASGD. An optimizer from elsewhere counts as cancelling too, unless
    derived from those: nearly all are adaptive or sign-based, and a needless warning costs less than a gate without
    effect.
    """
    return not isinstance(optimizer, (SGD, ASGD))


def shuffled(importance: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Control: the same values, shuffled within each tensor.

    Args:
        importance: Name to tensor, any dtype.
        seed: With the name it decides the permutation, whatever the other tensors are.

    Returns:
        New tensors of the same shapes, dtypes and devices.
    """
    result = {}
    for name, values in importance.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        result[name] = values.reshape(-1)[order].view(values.shape)
    return result


def flattened(importance: Mapping[str, Tensor], scope: Literal["tensor", "model"] = "model") -> dict[str, Tensor]:
    """Control: a uniform gate of the same mean importance.

    Args:
        importance: Name to uint8 fixed point or floating-point tensor in [0, 1].
        scope: ``"model"``: one value everywhere, like a lower learning rate; ``"tensor"``: each tensor its own mean.

    Returns:
        float32 tensors of the same shapes: views of one element, to be read only, which take no memory.

    Raises:
        AgclError: If ``scope`` is not one of the two.
    """
    if scope not in ("tensor", "model"):
        raise AgclError(f"`scope` is {scope!r}; choose 'tensor' or 'model'.")
    sums = {}
    for name, values in importance.items():
        total = values.sum(dtype=torch.int64 if values.dtype == torch.uint8 else torch.float64)
        sums[name] = float(total) / (_MAX_LEVEL if values.dtype == torch.uint8 else 1)
    num_entries = {name: max(values.numel(), 1) for name, values in importance.items()}
    overall = sum(sums.values()) / max(sum(num_entries.values()), 1)
    means = {name: overall if scope == "model" else sums[name] / num_entries[name] for name in importance}
    return {name: torch.tensor(means[name]).expand(values.shape) for name, values in importance.items()}
