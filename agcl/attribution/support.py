"""What attribution refuses before it starts, since it could not see into it, and how the refusals are worded."""

import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name
from transformers import PreTrainedModel

from agcl.architectures import not_causal
from agcl.errors import AgclError, UnsupportedModelError

_VISIBLE_ATTENTION = ("sdpa", "eager")


def check_supported(model: nn.Module) -> None:
    """Raise if the operations of ``model`` cannot be seen one by one.

    Args:
        model: The model to attribute.

    Raises:
        AgclError: If it is no module.
        UnsupportedModelError: If it or a part of it is compiled, runs attention in another kernel than sdpa or eager,
            has hub kernels in place of its layers, or is an encoder-decoder model.
    """
    for refusal in _refusals(model):
        raise refusal


def refusals(model: nn.Module) -> list[str]:
    """All that :func:`check_supported` would refuse, one message for each, in the order of the modules.

    Args:
        model: The model to attribute.

    Returns:
        Messages with the remedy; empty if nothing stands in the way.

    Raises:
        AgclError: If it is no module.
    """
    # A model and the inner model that it wraps are refused for the same reason: the outer one's name is enough.
    messages = {re.sub(r"^`[^`]*`", "", str(refusal)): str(refusal) for refusal in reversed(list(_refusals(model)))}
    return list(reversed(messages.values()))


def _refusals(model: nn.Module) -> Iterator[UnsupportedModelError]:
    if not isinstance(model, nn.Module):
        raise AgclError(f"`model` is a {type(model).__name__}; give a torch.nn.Module.")
    for module in model.modules():
        yield from _python_refusals(module, model)
        if isinstance(module, PreTrainedModel):
            yield from _transformer_refusals(module)


def _python_refusals(module: nn.Module, model: nn.Module) -> Iterator[UnsupportedModelError]:
    if (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    ):
        yield UnsupportedModelError(
            f"{_described(module, model)} is compiled, and attribution cannot see its operations; give the model as it "
            "was before torch.compile (`model._orig_mod`), or do not call `model.compile()`."
        )
    if isinstance(module, torch.jit.ScriptModule):
        yield UnsupportedModelError(
            f"{_described(module, model)} is a TorchScript module; give the Python module it was made from."
        )


def _described(module: nn.Module, root: nn.Module) -> str:
    name = next((name for name, part in root.named_modules() if part is module), "")
    return f"`{name or 'model'}` ({type(module).__name__})"


def _transformer_refusals(model: PreTrainedModel) -> Iterator[UnsupportedModelError]:
    name = type(model).__name__
    if (what := not_causal(model.config)) is not None:
        yield UnsupportedModelError(f"`{name}` is {what}; attribution supports decoders only.")
    attention = getattr(model.config, "_attn_implementation", None)
    if attention is not None and attention not in _VISIBLE_ATTENTION:
        yield UnsupportedModelError(
            f"`{name}` runs attention with {attention!r}, which attribution cannot see into; "
            'call `model.set_attn_implementation("sdpa")` first.'
        )
    if getattr(model, "_use_kernels", False) or getattr(model, "use_kernels", False):
        yield UnsupportedModelError(
            f"`{name}` has hub kernels in place of its layers, which attribution cannot see into; "
            "load it with `use_kernels=False`."
        )


def unknown_operation(operation: Callable[..., Any], root: nn.Module) -> UnsupportedModelError:
    """The error for an operation without a rule, with the module in whose forward pass it was met.

    Args:
        operation: What torch was asked to do.
        root: The model under attribution.

    Returns:
        The error, to be raised.
    """
    name, where = operation_name(operation), _enclosing_module(root)
    return UnsupportedModelError(
        f"No relevance rule for `{name}` in {where}. If it is linear, declare it with "
        '`agcl.attribution.OPERATIONS[operation] = "linear"`; otherwise use another model or layer implementation.'
    )


def invisible_operation(gradient_node: Any, root: nn.Module) -> UnsupportedModelError:
    """The error for a value that came about out of sight: custom autograd function, script, kernel, earlier pass.

    Args:
        gradient_node: The ``grad_fn`` of the value.
        root: The model under attribution.

    Returns:
        The error, to be raised.
    """
    return UnsupportedModelError(
        f"A value in {_enclosing_module(root)} was computed out of attribution's sight, by a custom autograd function, "
        f"a compiled or scripted function or before this forward pass (grad_fn {type(gradient_node).__name__}); "
        "use an implementation in plain torch operations, and no cache of an earlier pass."
    )


def operation_name(operation: Callable[..., Any]) -> str:
    """Dotted name of a torch operation.

    Args:
        operation: A function, as handed to ``__torch_function__``.

    Returns:
        For example ``torch.Tensor.add``.
    """
    return resolve_name(operation) or getattr(operation, "__name__", repr(operation))


def _enclosing_module(root: nn.Module) -> str:
    return _described(enclosing_module(root), root)


def enclosing_module(root: nn.Module) -> nn.Module:
    """The innermost module on the call stack; reading the stack costs nothing until something is refused.

    Args:
        root: The model under attribution.

    Returns:
        ``root`` or a part of it.
    """
    parts = {id(module) for module in root.modules()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and id(candidate) in parts:
            return candidate
        frame = frame.f_back
    return root
