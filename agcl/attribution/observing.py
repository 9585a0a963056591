"""The rules with a note taken of what they meet: operations without a rule, and where relevance goes.

For :func:`agcl.attribution.selfcheck.check_model`. Nothing here weakens :func:`agcl.attribution.lrp.lrp_rules`, which
has its own, strict mode.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agcl.attribution.lrp import LRPContext, Rule
from agcl.attribution.mode import ACTIVATED, ACTIVATION, MARK, RuleMode, _flat, _works_in_place
from agcl.attribution.operations import OPERATIONS
from agcl.attribution.support import enclosing_module, operation_name
from agcl.errors import UnsupportedModelError

Role = Literal["input", "additive", "crossing"]

# Kinds whose result may hold something that no activation brought along: a bias, a summand, a concatenated token.
_ADDITIVE = {"linear", "product", "sum_product", "layer_norm", "assembly"}
# Their value at activations of zero is not what they add: it depends on the activations which operand is taken.
_CHOOSING = {"max", "min", "maximum", "minimum"}
_PLACE = "_agcl_place"


@dataclass
class Flow:
    """Relevance at one tensor, filled in by the backward pass.

    Places are numbered: 2 i + 1 is block i, the even ones lie before, between and after the blocks.

    Attributes:
        place: Where the tensor is used.
        origin: Where it was computed; the same place for inputs and additive terms.
        role: ``crossing`` if it was computed elsewhere; otherwise how it comes to be there.
        relevance: Sum of value times gradient, in the units of the logits.
        gross: Sum of its absolute values.
    """

    place: int
    origin: int
    role: Role
    relevance: float = 0.0
    gross: float = 0.0


class ObservingMode(RuleMode):
    """Rules that let pass what they do not cover, with its ordinary gradient, and take note of it.

    Attributes:
        uncovered: (operation, name of the enclosing module, its class) -> how often it was met in the last pass.
        flows: Relevance at the sources (inputs, additive terms) and of what passes from place to place, under CP-LRP.
        place: Where the forward pass is, see :class:`Flow`.
    """

    def __init__(self, model: nn.Module, *, cut: bool) -> None:
        super().__init__(model, cut=cut)
        self.uncovered: Counter[tuple[str, str, str]] = Counter()
        self.flows: list[Flow] = []
        self.place = 0
        self._cut_off: dict[int, Any] = {}
        self._names = {id(module): name for name, module in model.named_modules()}

    def start(self, *, keep_inputs: bool) -> None:
        """Forget the previous forward pass."""
        super().start(keep_inputs=keep_inputs)
        self.uncovered, self.flows, self.place, self._cut_off = Counter(), [], 0, {}

    def refuse_operation(self, operation: Callable[..., Any]) -> None:
        """Take note of an operation without a rule."""
        self._note(operation_name(operation))

    def refuse_value(self, tensor: Tensor) -> None:
        """Take note of a value that came about out of sight."""
        self._note(type(tensor.grad_fn).__name__)

    def _untracked(self, tensor: Tensor) -> int:
        # Also called from hooks, where this mode is on and would see the questions asked here.
        with torch._C.DisableTorchFunction():
            return super()._untracked(tensor)

    def _note(self, operation: str) -> None:
        module = enclosing_module(self.model)
        self.uncovered[operation, self._names.get(id(module), ""), type(module).__name__] += 1

    def add_input(self, tensor: Tensor) -> Tensor:
        """Mark an activation that enters, and watch its relevance.

        Returns:
            A copy, which the model may overwrite; what is kept as input stays.
        """
        copy = self._record(super().add_input(tensor).clone(), ACTIVATION)
        self.watch(copy, "input")
        return copy

    def look_at(self, value: Any) -> None:
        """Take note of what came about out of sight, in the module that made it and not in the one that uses it."""
        if not self.muted and torch.is_grad_enabled():
            self._level(list(value.values()) if isinstance(value, dict) else value)

    def crossing(self, value: Any) -> Any:
        """Put an alias in the place of an activation that was computed elsewhere, and watch its relevance.

        An alias, since the same tensor may go elsewhere too: what flows through this use is counted, no more.

        Args:
            value: Anything; tensors in tuples and lists are found, other containers may be written to later.

        Returns:
            The same, with aliases in new tuples and lists.
        """
        if type(value) in (tuple, list):
            return type(value)(map(self.crossing, value))
        level = getattr(value, MARK, 0) - self._serial
        if not (self.cut and isinstance(value, Tensor) and ACTIVATION <= level <= ACTIVATED and value.requires_grad):
            return value
        origin = getattr(value, _PLACE)
        if origin == self.place:
            return value
        with torch._C.DisableTorchFunction():
            alias = self._record(value.view_as(value), level)
        self.watch(alias, "crossing", origin=origin)
        return alias

    def _record(self, result: Any, level: int) -> Any:
        if isinstance(result, Tensor) and level >= ACTIVATION:
            setattr(result, _PLACE, self.place)
        return super()._record(result, level)

    def activation_output(self, inputs: Any, outputs: Tensor) -> Tensor:
        """See :class:`RuleMode`."""
        return super().activation_output(self.crossing(inputs), outputs)

    def linear_input(self, inputs: Any) -> Any:
        """See :class:`RuleMode`."""
        return self.crossing(inputs)

    def linear_output(self, inputs: Any, outputs: Tensor, bias: Tensor | None) -> None:
        """See :class:`RuleMode`."""
        super().linear_output(inputs, outputs, bias)
        if bias is not None:
            self.watch(outputs, "additive", bias.detach().clone())

    def watch(self, tensor: Tensor, role: Role, value: Tensor | None = None, origin: int | None = None) -> None:
        """Sum value times gradient at ``tensor`` in the backward pass; CP-LRP only, since only that conserves.

        Args:
            tensor: What the gradient arrives at.
            role: What it is.
            value: What the gradient is multiplied with, broadcastable; None means the tensor's present value.
            origin: Where it was computed; None means here.
        """
        if not self.cut or not tensor.requires_grad:
            return
        flow = Flow(self.place, self.place if origin is None else origin, role)
        self.flows.append(flow)
        factor = tensor.detach().clone() if value is None else value

        def add(gradient: Tensor) -> None:
            # Masks of -inf meet a gradient of zero.
            part = torch.where(gradient == 0, 0.0, factor.cpu().double() * gradient.cpu().double())
            flow.relevance += float(part.sum())
            flow.gross += float(part.abs().sum())

        tensor.register_hook(add)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = OPERATIONS.get(func, "unknown")
        is_watched = self.cut and not self.muted and torch.is_grad_enabled()
        if is_watched and kind != "pass":
            # What an operation writes to is left alone: it must stay the same tensor.
            first = args[:1] if _works_in_place(func) else self.crossing(args[:1])
            args = (*first, *self.crossing(args[1:]))
            kwargs = {name: self.crossing(value) for name, value in kwargs.items()}
        added = self._added(kind, func, args, kwargs) if is_watched and kind in _ADDITIVE else None
        result = super().__torch_function__(func, types, args, kwargs)
        if is_watched and kind != "pass":
            self._follow_cut_off(kind, func, args, result)
        if added is not None and isinstance(result, Tensor) and result.shape == added.shape:
            self.watch(result, "additive", added)
        return result

    def _follow_cut_off(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Keep account of what came from activations but has no gradient: where it is added, it is no source."""
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor) or not result.is_floating_point() or getattr(result, MARK, 0) > self._serial:
            return
        if name.endswith("_like") or name.startswith("new_"):
            return
        for value in args[:1] if kind == "structure" else _flat(args, {}):
            if getattr(value, MARK, 0) > self._serial or id(value) in self._cut_off:
                self._cut_off[id(result)] = result  # kept, so that no other tensor gets its id
                return

    def _added(
        self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The part of an affine operation's result that no activation brought along: its value at activations of 0."""
        operands = [*args, *kwargs.values()]
        if kind == "product" and not any(isinstance(operand, Tensor) for operand in operands[2:]):
            return None  # no bias: the matrix product with zeros can be saved
        if self._levels(args, kwargs) < ACTIVATION or getattr(func, "__name__", "") in _CHOOSING:
            return None

        def at_zero(value: Any) -> Any:
            if isinstance(value, Tensor):
                is_activation = self._level(value) >= ACTIVATION or id(value) in self._cut_off
                return torch.zeros_like(value) if is_activation else value.detach().clone()
            return type(value)(map(at_zero, value)) if type(value) in (list, tuple) else value

        with torch.no_grad():
            added = func(*map(at_zero, args), **{name: at_zero(value) for name, value in kwargs.items()})
        is_source = isinstance(added, Tensor) and added.is_floating_point() and bool(added.any())
        return added if is_source else None


class ObservingContext(LRPContext):
    """Rules in force on a model, for one forward pass, with a note taken of what they meet.

    Args:
        model: The model instance.
        rule: ``"attnlrp"`` or ``"cplrp"``.
        blocks: Modules that run one after the other in this order (a shared one several times), to be watched.

    Attributes:
        mode: The notes.
        refusals: Why ``lrp_rules`` would refuse this forward pass as a whole.
    """

    def __init__(self, model: nn.Module, rule: Rule, blocks: list[nn.Module]) -> None:
        self.mode = ObservingMode(model, cut=rule == "cplrp")
        super().__init__(model, rule, self.mode)
        self.keep_inputs = True
        self.refusals: list[str] = []
        self._blocks = blocks

    def _attach(self, stack: ExitStack) -> None:
        super()._attach(stack)
        for block in dict.fromkeys(self._blocks):
            stack.callback(block.register_forward_pre_hook(self._enter_block, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(self._leave_block, prepend=True).remove)
        for module in self.model.modules():
            stack.callback(module.register_forward_hook(self._leave_module).remove)

    def _enter_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self.mode.place += 1
        return self.mode.crossing(args), {name: self.mode.crossing(value) for name, value in kwargs.items()}

    def _leave_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.mode.look_at(output)
        self.mode.place += 1

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._depth:
            self.mode.look_at(output)

    def _check_firings(self) -> None:
        try:
            super()._check_firings()
        except UnsupportedModelError as refusal:
            self.refusals.append(str(refusal))


def find_blocks(model: nn.Module, run: Callable[[], Any]) -> tuple[str, list[nn.Module]]:
    """Find the model's blocks: the longest list of modules that run one after the other.

    Lists within a block, such as experts, do not count; ``nn.Sequential`` counts if no ``nn.ModuleList`` does.

    Args:
        model: Any module.
        run: Runs its forward pass.

    Returns:
        Name of the list and its modules; an empty name and list if there is none.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    calls: list[nn.Module] = []
    with ExitStack() as stack:
        for part in {part for parts in lists.values() for part in parts}:
            stack.callback(part.register_forward_pre_hook(lambda module, args: calls.append(module)).remove)
        run()
    in_order = {name: parts for name, parts in lists.items() if _called(calls, set(parts)) == parts}
    for kind in (nn.ModuleList, nn.Sequential):
        candidates = {name: parts for name, parts in in_order.items() if isinstance(model.get_submodule(name), kind)}
        outermost = list(_outermost(candidates))
        if outermost:
            name = max(outermost, key=lambda name: len(candidates[name]))
            return name, candidates[name]
    return "", []


def _called(calls: list[nn.Module], among: set[nn.Module]) -> list[nn.Module]:
    return [module for module in calls if module in among]


def _outermost(lists: dict[str, list[nn.Module]]) -> Iterator[str]:
    for name in lists:
        if not any(name.startswith(other + "." if other else "") for other in lists if other != name):
            yield name
