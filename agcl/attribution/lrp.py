"""The context under which a forward and backward pass of one model instance follows the LRP rules.

A ``TorchFunctionMode``, active only while the forward pass of that instance runs, sees each torch operation and looks
up its rule in ``operations.py``. Tensors computed from the embeddings carry a mark, so that products of activations are
told from products with weights. No class, registry or config is touched.
"""

import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from agcl.architectures import is_quantised_linear
from agcl.attribution.mode import RuleMode
from agcl.attribution.support import check_supported
from agcl.errors import AgclError, UnsupportedModelError, check_choice

Rule = Literal["attnlrp", "cplrp"]

# Several of these compute their function from products, so that the table of operations would see too much.
_ENTRIES: list[Any] = list(ACT2CLS.values())
_CLASSES: list[Any] = [entry[0] if isinstance(entry, tuple) else entry for entry in _ENTRIES]
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(cls for cls in _CLASSES if cls is not ACT2CLS["linear"])
_RUNNING = threading.local()


class LRPContext:
    """What ``lrp_rules`` yields: the rules in force on one model, and which of them fired.

    Attributes:
        model: The model instance.
        rule: ``"attnlrp"`` or ``"cplrp"``.
        keep_inputs: Set it to True to have the activations that enter the model (embeddings, given ``inputs_embeds``)
            require a gradient and be kept in ``inputs`` until the next forward pass or the end of the context.
    """

    def __init__(self, model: nn.Module, rule: Rule, mode: RuleMode | None = None) -> None:
        self.model = model
        self.rule = rule
        self.keep_inputs = False
        self._mode = mode or RuleMode(model, cut=rule == "cplrp")
        self._depth = 0
        self._is_transformer = any(isinstance(module, PreTrainedModel) for module in model.modules())

    @property
    def inputs(self) -> list[Tensor]:
        """Activations that entered the model in the last forward pass; empty unless ``keep_inputs`` was set."""
        return list(self._mode.inputs or ())

    def report(self) -> dict[str, int]:
        """How often each rule fired in the last forward pass.

        Returns:
            Rule -> number of firings; rules that did not fire are absent.
        """
        return dict(self._mode.firings)

    def _attach(self, stack: ExitStack) -> None:
        register = self.model.register_forward_pre_hook
        stack.callback(register(self._enter_forward, with_kwargs=True).remove)
        register_end = self.model.register_forward_hook
        stack.callback(register_end(self._leave_forward, prepend=True, always_call=True).remove)
        for module in self.model.modules():
            if isinstance(module, _ACTIVATIONS):
                stack.callback(module.register_forward_pre_hook(self._enter_activation).remove)
                handle = module.register_forward_hook(self._leave_activation, prepend=True, always_call=True)
                stack.callback(handle.remove)
            elif is_quantised_linear(module):
                stack.callback(module.register_forward_pre_hook(self._enter_linear).remove)
                handle = module.register_forward_hook(self._leave_linear, prepend=True, always_call=True)
                stack.callback(handle.remove)
        stack.callback(self._release)

    def _release(self) -> None:
        self._mode.inputs = None
        if self._depth:  # a KeyboardInterrupt passes by the hooks
            self._depth = 0
            self._stop_mode()

    def _enter_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(_RUNNING, "context", None) not in (None, self):
            raise AgclError(
                f"The forward pass of `{type(module).__name__}` under `lrp_rules` runs inside another one; "
                "use one context for the outermost model."
            )
        self._depth += 1
        if self._depth > 1:
            return None
        _RUNNING.context = self
        self._mode.start(keep_inputs=self.keep_inputs)
        self._mode.__enter__()
        return self._mark_inputs(args, kwargs)

    def _mark_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Mark given activations by an alias, so that no attribute stays on the caller's tensor."""

        def marked(name: str | None, value: Any) -> Any:
            is_input = name == "inputs_embeds" or not self._is_transformer
            if is_input and isinstance(value, Tensor) and value.is_floating_point() and torch.is_grad_enabled():
                return self._mode.add_input(value.view_as(value))
            return value

        names = [*inspect.signature(self.model.forward).parameters] if self._is_transformer else []
        return (
            tuple(marked(name, value) for name, value in itertools.zip_longest(names[: len(args)], args)),
            {name: marked(name, value) for name, value in kwargs.items()},
        )

    def _leave_forward(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        # After an exception this is called for every pass that was entered, and also if entering was refused.
        if getattr(_RUNNING, "context", None) is not self:
            return
        self._depth -= 1
        if self._depth:
            return
        self._stop_mode()
        if outputs is not None and torch.is_grad_enabled():
            self._mode.finish(outputs)
            self._check_firings()

    def _stop_mode(self) -> None:
        _RUNNING.context = None
        self._mode.__exit__(None, None, None)

    def _check_firings(self) -> None:
        firings = self._mode.firings
        for what, names in (("attention", ("attention", "softmax")), ("normaliser", ("normaliser", "divisor"))):
            if self._is_transformer and not any(firings[name] for name in names):
                raise UnsupportedModelError(
                    f"No {what} was seen in the forward pass of `{type(self.model).__name__}`, so its relevance would "
                    "be wrong; attribution supports transformer decoders in plain torch operations."
                )

    def _enter_activation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._depth:
            self._mode.muted += 1

    def _leave_activation(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Tensor | None:
        if not self._depth:
            return None
        self._mode.muted -= 1
        if self._mode.muted or not isinstance(outputs, Tensor) or not torch.is_grad_enabled():
            return None
        return self._mode.activation_output(args[0], outputs)

    def _enter_linear(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._depth:
            return None
        args = (self._mode.linear_input(args[0]), *args[1:])
        self._mode.muted += 1
        return args

    def _leave_linear(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if not self._depth:
            return
        self._mode.muted -= 1
        if not self._mode.muted and isinstance(outputs, Tensor) and torch.is_grad_enabled():
            self._mode.linear_output(args[0], outputs, getattr(module, "bias", None))


_Context = TypeVar("_Context", bound=LRPContext)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and checkpointing off for a while.

    The flag is set directly: overridden ``train`` methods may do more, such as merging adapters.

    Args:
        model: Its modules' ``training`` flags are False inside and what they were, one by one, after.

    Yields:
        None.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def lrp_rules(model: nn.Module, rule: Rule = "attnlrp") -> Iterator[LRPContext]:
    """Let forward and backward passes of this model instance follow the LRP rules.

    Inside, call ``model`` itself (not a submodule), then backward; afterwards ``value * gradient`` of a parameter or an
    activation is its relevance. Values are unchanged bit for bit. The model is in evaluation mode inside; on exit, also
    after an exception, hooks and training flags are as before. Other instances are never touched. The backward pass may
    also follow after the exit. Rules: AttnLRP (arXiv 2402.05602), or CP-LRP, which sends nothing through attention
    weights and activated gates and therefore conserves relevance exactly in a model without biases.

    Args:
        model: A decoder of transformers, a PEFT model around one, or any module made of supported operations, whose
            floating-point arguments then count as the input activations.
        rule: ``"attnlrp"`` or ``"cplrp"``.

    Yields:
        The context; its ``report()`` tells which rule fired how often.

    Raises:
        AgclError: If ``rule`` is unknown, or the rules are on already for this model or a part of it.
        UnsupportedModelError: If the model is compiled, scripted, encoder-decoder or runs opaque attention kernels; in
            the forward pass, for an operation without a rule, a value computed out of sight, or if a transformer
            shows no attention or no normaliser.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> with lrp_rules(layer) as context:
        ...     output = layer(x)
        >>> output.sum().backward()
        >>> torch.allclose((layer.weight * layer.weight.grad).sum(), output)
        True
    """
    check_choice("rule", rule, Rule)
    check_supported(model)
    with in_force(LRPContext(model, rule)) as context:
        yield context


@contextmanager
def in_force(context: _Context) -> Iterator[_Context]:
    """Put the rules of ``context`` on its model for a while; :func:`lrp_rules` for a context made elsewhere.

    Args:
        context: Not in force yet.

    Yields:
        ``context``.

    Raises:
        AgclError: If rules are on already for the model or a part of it.
    """
    check_free(context.model)
    with evaluation_mode(context.model), ExitStack() as stack:
        context._attach(stack)
        yield context


def check_free(model: nn.Module) -> None:
    """Raise if rules are on for a model.

    Args:
        model: The model to attribute.

    Raises:
        AgclError: If rules are on already for it or a part of it.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if hooks and any(isinstance(getattr(hook, "__self__", None), LRPContext) for hook in hooks.values()):
            raise AgclError(
                f"`lrp_rules` is on already for this `{type(model).__name__}` or a part of it; leave it first."
            )
