"""The gate on the optimizer's step."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import AgclError
from .gate import Gate, GatedParameter
from .slices import Scratch, Snapshot, cut, step_without_hooks

# The update gates attached to an optimizer.
_ON_OPTIMIZER: "weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[UpdateGate]]" = weakref.WeakKeyDictionary()


class UpdateGate(Gate):
    """Multiplies the optimizer's whole step by the plasticity: ``W <- W_old + plasticity * (W_new - W_old)``.

    Momentum, preconditioning and weight decay are included, for any ``torch.optim.Optimizer``, through its public step
    hooks. Entries of importance 1 keep their value, entries of importance 0 move exactly as without the gate. The
    optimizer's own state is not gated.

    The gated weights that have a gradient are copied just before they change and the copies are dropped after the
    step; nothing stays in between. The optimizers of ``torch.optim`` (SparseAdam and LBFGS aside) treat each parameter
    on its own; they are run on a slice of the parameters after the other, each copied, stepped and blended while it is
    in the cache. The peak then grows by one copy of the largest gated parameter, or of 2^20 entries (2^26 on a GPU) if
    that is more. With any other optimizer, or several update gates on one, it grows by one copy of all gated weights.
    Rows without any importance (most of an embedding's, for tokens that no answer needed) are left out where they are
    at least half of a parameter's.
    Where ``step`` is given a closure (Lightning does), all this comes after its first call, thus not during forward
    and backward. bfloat16 and float16 weights are blended in float32 and rounded. Sharded parameters (DTensor, FSDP2)
    are gated shard by shard.

    An optimizer that changes weights before it first calls its closure, or weights without a gradient, is not
    supported. If the optimizer raises in the middle of a step, the slices before are stepped and gated, the slice at
    hand is not gated, and the rest is not stepped; without slices, that step is not gated. A step hook of yours that
    wraps the closure finds ``param_groups`` empty after the closure has run; all other hooks see them as they are.

    Args:
        named_parameters: Pairs as from ``model.named_parameters()``. The model is not kept alive.
        importance: Parameter name to tensor of the parameter's shape, fixed point (uint8: ``value / 255``, uint16:
            ``value / 65535``) or floating point in [0, 1], on any device. Held without copying: leave it unchanged.
            A DTensor that lies as its parameter does is this rank's part already. Parameters without importance are not
            gated.
        strength: Exponent >= 0; 1 is linear, 0 is no gate.
        moves_importance: Whether the importance moves to the parameters' device when it is first used. If not, it stays
            where it is (host memory), and each parameter's is copied over for the moment it is used.

    Raises:
        AgclError: If an importance has an unknown name, another shape or dtype, or values outside [0, 1].

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
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
        moves_importance: bool = True,
    ) -> None:
        super().__init__(named_parameters, importance, strength, moves_importance)
        self._snapshot: Snapshot = []
        self._peers: weakref.WeakSet[UpdateGate] = weakref.WeakSet()  # all update gates on the optimizer
        self._step: Callable[[Optimizer], Any] | None = None  # runs one slice; None: the weights are copied as a whole
        self._set_aside: tuple[Optimizer, list[dict[str, Any]]] | None = None  # whose groups, while slices run
        self._awaits_closure = False
        self._step_frame: FrameType | None = None  # of the step under way, or of one that raised

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of copied weights held now; zero outside of an optimizer's update."""
        return sum(old.numel() * old.element_size() for _, old in self._snapshot)

    def detach(self) -> None:
        """Stop gating, drop what an interrupted step left behind; harmless if not attached."""
        super().detach()
        self._peers.discard(self)
        self._drop_leftovers()
        self._awaits_closure = False
        self._step_frame = None

    def _install(self, optimizer: Optimizer, held: list[GatedParameter]) -> None:
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(self._after_step)
        # First, so that other hooks find the groups in their place and the weights gated.
        hooks: Any = after.hooks_dict_ref()
        hooks.move_to_end(after.id, last=False)
        self._handles += [before, after]
        self._peers = _ON_OPTIMIZER.setdefault(optimizer, weakref.WeakSet())
        self._peers.add(self)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caller = _calling_frame()
        if self._step_frame is not None and _is_on_stack(self._step_frame, caller):
            return None  # a subclass's step calls super().step(), which runs the hooks as well; the outer step counts
        self._step_frame = caller
        self._drop_leftovers()
        is_alone = len(self._peers) == 1  # several would each run the slices
        self._step = step_without_hooks(optimizer) if is_alone else None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._awaits_closure = closure is not None or self._step is not None
        if not self._awaits_closure:
            self._copy_weights(optimizer)
            return None
        # Slices run in the closure even where the caller gave none: there, all hooks before the step have run.
        wrapped = partial(self._run_closure, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _run_closure(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        result = None if closure is None else closure()
        if self._awaits_closure:  # LBFGS calls it again, with the weights already on their way
            self._awaits_closure = False
            if self._step is None:
                self._copy_weights(optimizer)
            else:
                self._step_in_slices(optimizer, self._step)
        return result

    def _copy_weights(self, optimizer: Optimizer) -> None:
        for piece in cut(optimizer, self._find_moving):
            self._snapshot += [(held, held.copy(held.weights.new_empty(held.num_entries))) for held in piece.gated]

    def _step_in_slices(self, optimizer: Optimizer, step: Callable[[Optimizer], Any]) -> None:
        """Do the whole update, and leave the step under way no group to work on."""
        slices = cut(optimizer, self._find_moving)
        if not any(piece.gated for piece in slices):
            return
        scratch = Scratch(slices)
        self._set_aside = (optimizer, optimizer.param_groups)
        try:
            for piece in slices:
                self._snapshot = scratch.copy(piece)
                optimizer.param_groups = [{**piece.group, "params": piece.parameters}]
                step(optimizer)
                self._blend()
        except BaseException:
            self._drop_leftovers()
            raise
        optimizer.param_groups = []

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _calling_frame() is not self._step_frame:
            return
        self._step_frame = None
        self._put_groups_back()
        if self._awaits_closure:
            raise AgclError(f"{type(optimizer).__name__}.step did not call its closure, so the step was not gated.")
        self._blend()

    def _blend(self) -> None:
        while self._snapshot:
            held, old = self._snapshot.pop()
            held.blend(old)

    def _find_moving(self, parameter: Tensor) -> GatedParameter | None:
        """The gated parameter, if the step will change it and not all of it is free to."""
        gated = self._find(parameter)
        return None if gated is None or gated.is_open or parameter.grad is None else gated

    def _put_groups_back(self) -> None:
        if self._set_aside is not None:
            optimizer, groups = self._set_aside
            optimizer.param_groups = groups
            self._set_aside = None

    def _drop_leftovers(self) -> None:
        """Of a step that raised or was interrupted."""
        self._put_groups_back()
        self._snapshot.clear()


def _calling_frame() -> FrameType | None:
    """Frame of the function that called the caller."""
    frame = inspect.currentframe()
    return frame.f_back.f_back if frame is not None and frame.f_back is not None else None


def _is_on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted
