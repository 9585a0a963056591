"""The ``TorchFunctionMode`` that applies the table of operations to tensors computed from a model's embeddings."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from agcl.attribution import rules
from agcl.attribution.operations import OPERATIONS
from agcl.attribution.support import invisible_operation, unknown_operation

# A mark is an integer attribute: serial number of the forward pass plus a level. Marks of other passes mean nothing.
MARK = "_agcl_mark"
UNSEEN, CONSTANT, ACTIVATION, ACTIVATED = -1, 0, 1, 2
_SERIALS = itertools.count(4, 4)
_Arguments = tuple[Any, ...]
_Operation = Callable[..., Any]


class RuleMode(TorchFunctionMode):
    """The rules on one model, for one forward pass after the other.

    Args:
        model: For the names in refusals.
        cut: CP-LRP: no gradient through attention weights and activated gates.
    """

    def __init__(self, model: nn.Module, *, cut: bool) -> None:
        super().__init__()
        self.model = model
        self.cut = cut
        self.muted = 0
        self.firings: Counter[str] = Counter()
        self.inputs: list[Tensor] | None = None
        self._serial = 0

    def start(self, *, keep_inputs: bool) -> None:
        """Forget the previous forward pass.

        Args:
            keep_inputs: Whether to keep the activations that enter, and have them require a gradient.
        """
        self._serial = next(_SERIALS)
        self.muted = 0
        self.firings = Counter()
        self.inputs = [] if keep_inputs else None

    def finish(self, outputs: Any) -> None:
        """Take the marks off the model's outputs, which the caller may pickle or feed elsewhere.

        Args:
            outputs: What the forward pass returned: a tensor or nested dicts, lists and tuples.

        Raises:
            UnsupportedModelError: If an output was computed out of sight.
        """
        for tensor in _tensors(outputs):
            self._level(tensor)
            tensor.__dict__.pop(MARK, None)

    def refuse_operation(self, operation: _Operation) -> None:
        """Refuse an operation on activations that no rule covers; if this returns, its ordinary gradient passes.

        Args:
            operation: What torch was asked to do.

        Raises:
            UnsupportedModelError: Always; a subclass may take note instead.
        """
        raise unknown_operation(operation, self.model)

    def refuse_value(self, tensor: Tensor) -> None:
        """Refuse a value that came about out of sight; if this returns, it counts as an activation.

        Args:
            tensor: The value, with a ``grad_fn``.

        Raises:
            UnsupportedModelError: Always; a subclass may take note instead.
        """
        raise invisible_operation(tensor.grad_fn, self.model)

    def add_input(self, tensor: Tensor) -> Tensor:
        """Mark an activation that enters the model.

        Args:
            tensor: Embeddings, floating; marked in place.

        Returns:
            The same tensor.
        """
        if self.inputs is not None:
            if not tensor.requires_grad:
                tensor.requires_grad_()
            self.inputs.append(tensor)
        return self._record(tensor, ACTIVATION)

    def activation_output(self, inputs: Any, outputs: Tensor) -> Tensor:
        """Apply the identity rule to what an activation module computed.

        Args:
            inputs: The module's first argument.
            outputs: Its result.

        Returns:
            The result's values, differentiable by the identity rule; unchanged if ``inputs`` is no activation.
        """
        if self._level(inputs) < ACTIVATION:
            return self._record(outputs, CONSTANT)
        self.firings["identity"] += 1
        return self._record(rules.identity_rule(inputs, outputs.detach()), ACTIVATED)

    def linear_input(self, inputs: Any) -> Any:
        """What a module whose operations are not seen, but known to be one linear map, is to be given.

        Args:
            inputs: Its first argument.

        Returns:
            The same, here.
        """
        return inputs

    def linear_output(self, inputs: Any, outputs: Tensor, bias: Tensor | None) -> None:
        """Take note of what such a module computed, whose ordinary gradient follows the rule of linear maps.

        Args:
            inputs: As from `linear_input`.
            outputs: Its result.
            bias: What it has added, if anything.
        """
        self._record(outputs, min(self._level(inputs), ACTIVATION))

    def __torch_function__(
        self, func: _Operation, types: Any, args: _Arguments = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = OPERATIONS.get(func, "unknown")
        if kind == "pass" or self.muted or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        result = _HANDLERS[kind](self, func, args, kwargs)
        if args and (result is None or result is args[0]) and _works_in_place(func):
            self._record_base(args[0])
        return result

    def _level(self, value: Any) -> int:
        """Level of a tensor, the highest level in a list of tensors, UNSEEN for anything else."""
        level = getattr(value, MARK, 0) - self._serial
        if CONSTANT <= level <= ACTIVATED:
            return level
        if type(value) in _NEVER_TENSORS:
            return UNSEEN
        if isinstance(value, Tensor):
            return UNSEEN if value.grad_fn is None else self._untracked(value)
        if isinstance(value, (list, tuple)):
            return max(map(self._level, value), default=UNSEEN)
        return UNSEEN

    def _untracked(self, tensor: Tensor) -> int:
        """Level of an unmarked tensor with a history; refuse what cannot be explained."""
        if tensor._base is not None:  # written to through another view
            level = getattr(tensor._base, MARK, 0) - self._serial
            if CONSTANT <= level <= ACTIVATED:
                return level
        node = tensor.grad_fn
        if type(node).__name__ in _IDENTITIES:
            self._record(tensor, ACTIVATION)
            return ACTIVATION
        self.refuse_value(tensor)
        self._record(tensor, ACTIVATION)
        return ACTIVATION

    def _levels(self, args: _Arguments, kwargs: dict[str, Any]) -> int:
        """The highest level among all arguments."""
        highest = max(map(self._level, args), default=UNSEEN)
        return max(highest, *map(self._level, kwargs.values())) if kwargs else highest

    def _record(self, result: Any, level: int) -> Any:
        """Mark a result, or the tensors of a tuple of results; below ACTIVATION only to know that it was seen."""
        if isinstance(result, Tensor):
            if (level >= ACTIVATION and _is_real_or_complex(result)) or result.grad_fn is not None:
                setattr(result, MARK, self._serial + max(level, CONSTANT))
        elif isinstance(result, (list, tuple)):
            for part in result:
                self._record(part, level)
        return result

    def _record_base(self, view: Any) -> None:
        """After a write into a slice of a buffer, the whole buffer holds activations."""
        if isinstance(view, Tensor) and view._base is not None and self._level(view) >= ACTIVATION:
            self._record(view._base, ACTIVATION)

    def _fire(self, rule: str) -> None:
        self.firings[rule] += 1

    # One method per kind of operation: (operation, positional arguments, keyword arguments) -> result.

    def _unknown(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        result = func(*args, **kwargs)
        if level >= ACTIVATION and any(map(_is_real_or_complex, _tensors(result))):
            self.refuse_operation(func)
        return self._record(result, level)

    def _constant(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _embedding(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        return self.add_input(result) if result.is_floating_point() else result

    def _structure(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        # The first argument alone: others are indices, or tensors that lend their shape or dtype.
        level = self._level(args[0]) if args else self._levels(args, kwargs)
        return self._record(func(*args, **kwargs), level)

    def _assembly(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        result = func(*args, **kwargs)
        self._record(args[0] if result is None else result, level)  # __setitem__ returns nothing
        return result

    def _linear(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        return self._record(func(*args, **kwargs), min(level, ACTIVATION))

    def _product(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        if len(args) < 2:
            return self._contraction(func, args, kwargs)  # factors by keyword
        first, second = self._level(args[0]), self._level(args[1])
        if first >= ACTIVATION and second >= ACTIVATION:
            return self._activations_multiplied(func, args, kwargs, [first, second])
        level = max(first, second)
        # Multiplied element-wise by a constant, an activated gate is still one; mixed with weights it is not.
        if level == ACTIVATED and func not in _ELEMENTWISE:
            level = ACTIVATION
        return self._record(func(*args, **kwargs), level)

    def _contraction(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        levels = [self._level(value) for value in _flat(args, kwargs)]
        factors = [level for level in levels if level >= ACTIVATION]
        if len(factors) > 1:
            return self._activations_multiplied(func, args, kwargs, factors)
        return self._record(func(*args, **kwargs), min(max(levels, default=UNSEEN), ACTIVATION))

    def _activations_multiplied(
        self, func: _Operation, args: _Arguments, kwargs: dict[str, Any], factors: list[int]
    ) -> Any:
        if self.cut and ACTIVATED in factors and ACTIVATION in factors:
            self._fire("gate cut")
            args, kwargs = self._without_gates(func, args, kwargs)
            return self._record(func(*args, **kwargs), ACTIVATION)
        self._fire("uniform product")
        result = func(*args, **kwargs)
        return self._record(rules.scale_gradient_(result, 1 / len(factors)), ACTIVATION)

    def _without_gates(
        self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]
    ) -> tuple[_Arguments, dict[str, Any]]:
        if getattr(func, "__name__", "").endswith("_") and self._level(args[0]) == ACTIVATED:
            self.refuse_operation(func)  # the gate itself would be overwritten
            return args, kwargs

        def cut(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(cut, value))
            return value.detach() if self._level(value) == ACTIVATED else value

        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _sum_product(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        names = [name for name in kwargs if name in _FACTOR_NAMES]
        args, kwargs = (*args, *(kwargs[name] for name in names)), {k: v for k, v in kwargs.items() if k not in names}
        summand, *factors = args[:3]
        if all(self._level(factor) >= ACTIVATION for factor in factors):
            self._fire("uniform product")
            factors = [rules.scale_gradient_(factor.view_as(factor), 0.5) for factor in factors]
        return self._record(func(summand, *factors, *args[3:], **kwargs), min(level, ACTIVATION))

    def _division(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        names = ("other", "input") if func in _REFLECTED else ("input", "other")
        operands = dict(zip(names, args, strict=False)) | kwargs
        numerator, divisor = self._level(operands["input"]), self._level(operands["other"])
        if divisor >= ACTIVATION:
            self._fire("divisor")
            operands["other"] = operands["other"].detach()
            if func in _REFLECTED:
                args, kwargs = (operands["other"], operands["input"]), {}
            else:
                args, kwargs = (operands.pop("input"), operands.pop("other")), operands
            divisor = CONSTANT
        return self._record(func(*args, **kwargs), max(numerator, divisor))

    def _power(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        if level < ACTIVATION:
            return self._record(func(*args, **kwargs), level)
        exponent = _DEGREES.get(getattr(func, "__name__", ""))
        if exponent is None:
            exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
        if not isinstance(exponent, (int, float)):
            self.refuse_operation(func)
            return self._record(func(*args, **kwargs), ACTIVATION)
        if exponent <= 0:
            return self._normaliser(func, args, kwargs)
        # d(x^n) = n x^(n-1), and the identity rule wants y / x = x^(n-1).
        return self._record(rules.scale_gradient_(func(*args, **kwargs), 1 / exponent), ACTIVATION)

    def _normaliser(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        result = func(*args, **kwargs)
        if level < ACTIVATION:
            return self._record(result, level)
        self._fire("normaliser")
        return result.detach()

    def _layer_norm(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        return self._norm_layer(func, args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"))

    def _rms_norm(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        return self._norm_layer(func, args, kwargs, ("input", "normalized_shape", "weight", "eps"))

    def _norm_layer(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any], names: tuple[str, ...]) -> Any:
        level = self._levels(args, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs = given["input"]
        if self._level(inputs) < ACTIVATION:
            return self._record(func(*args, **kwargs), level)
        self._fire("normaliser")
        with torch.no_grad():
            outputs = func(*args, **kwargs)
        num_dims, weight = len(given["normalized_shape"]), given.get("weight")
        if "bias" in names:
            result = rules.layer_norm_rule(inputs, outputs, weight, given.get("bias"), num_dims, given.get("eps", 1e-5))
        else:
            result = rules.rms_norm_rule(inputs, outputs, weight, num_dims, given.get("eps"))
        return self._record(result, ACTIVATION)

    def _activation(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        if level < ACTIVATION:
            return self._record(func(*args, **kwargs), level)
        if kwargs.get("inplace") or not args:
            self.refuse_operation(func)
            return self._record(func(*args, **kwargs), ACTIVATION)
        self._fire("identity")
        with torch.no_grad():
            outputs = func(*args, **kwargs)
        return self._record(rules.identity_rule(args[0], outputs), ACTIVATED)

    def _relu(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        if level >= ACTIVATION:
            self._fire("identity")
            level = ACTIVATED
        return self._record(func(*args, **kwargs), level)

    def _softmax(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        level = self._levels(args, kwargs)
        result = func(*args, **kwargs)
        if level < ACTIVATION:
            return self._record(result, level)
        self._fire("softmax")
        return result.detach() if self.cut else self._record(result, ACTIVATION)

    def _attention(self, func: _Operation, args: _Arguments, kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        rest = args[4:]
        query, key, value = (self._level(given[name]) >= ACTIVATION for name in ("query", "key", "value"))
        level = self._levels(args, kwargs)
        if level >= ACTIVATION:
            self._fire("attention")
        if self.cut:
            cut = [name for name in ("query", "key", "attn_mask") if isinstance(given.get(name), Tensor)]
            given |= {name: given[name].detach() for name in cut}
        elif query and key:
            # Products q k and (softmax) v: half at the output and half again at q and k, together 1/4, 1/4, 1/2.
            given |= {name: rules.scale_gradient_(given[name].view_as(given[name]), 0.5) for name in ("query", "key")}
        operands = [given.pop(name) for name in ("query", "key", "value")]
        result = func(*operands, given.pop("attn_mask", None), *rest, **given)
        if not self.cut and value and (query or key):
            rules.scale_gradient_(result, 0.5)
        return self._record(result, min(level, ACTIVATION))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_real_or_complex(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _works_in_place(func: _Operation) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _flat(args: _Arguments, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments, with the operands of einsum, which may come as a list, one by one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


_HANDLERS: dict[str, Callable[[RuleMode, _Operation, _Arguments, dict[str, Any]], Any]] = {
    kind: getattr(RuleMode, f"_{kind}") for kind in {"unknown", *OPERATIONS.values()} - {"pass"}
}
# In front of a module's backward hook, and where FSDP2 wants to know that a layer's backward pass is over.
_IDENTITIES = {"BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward"}
_NEVER_TENSORS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice, type(...)}
_ELEMENTWISE = {torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply}
_REFLECTED = {Tensor.__rtruediv__, Tensor.__rdiv__}
_FACTOR_NAMES = {"mat1", "mat2", "batch1", "batch2", "mat", "vec", "tensor1", "tensor2"}
_DEGREES = {"square": 2, "square_": 2, "sqrt": 0.5, "sqrt_": 0.5, "var": 2}
