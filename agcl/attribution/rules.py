"""The propagation rules as functions of tensors: values are the original kernel's, only the backward pass changes.

With every rule written as a modified gradient, relevance is ``value * gradient`` and no relevance tensor is carried.
Rules: AttnLRP (arXiv 2402.05602) and CP-LRP (ICML 2022, "XAI for Transformers"). Nothing here knows a model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def scale_gradient_(tensor: Tensor, factor: float) -> Tensor:
    """Multiply the gradient that arrives at ``tensor`` by ``factor``; the values stay.

    This is the uniform rule for a product of ``n`` activations when ``factor = 1 / n`` is applied to the product: in
    ``y = a * b`` each factor then receives ``R(y) / n``.

    Args:
        tensor: Any shape and floating dtype. It gets a gradient hook, in place; no hook if it needs no gradient.
        factor: Dimensionless.

    Returns:
        ``tensor`` itself.

    Example:
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> scale_gradient_(a * 2, 0.5).backward()
        >>> a.grad
        tensor(1.)
    """
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * factor)
    return tensor


def identity_rule(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Element-wise non-linearity ``y = a(x)``: relevance passes unchanged, so the backward factor is ``y / x``.

    Where ``x = 0`` the factor is 0: the relevance ``x * gradient`` is 0 there whatever the factor. A function with
    ``a(0) != 0`` (sigmoid, softplus) loses the relevance of that point and has large factors next to it.

    Args:
        inputs: ``x``, any shape, floating.
        outputs: ``y``, the same shape, computed by the caller without gradient.

    Returns:
        ``outputs``, bit for bit, differentiable with respect to ``inputs`` by the rule.

    Example:
        >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> identity_rule(x, torch.tanh(x.detach())).sum().backward()
        >>> torch.allclose(x * x.grad, torch.tanh(x))
        True
    """
    return _IdentityRule.apply(inputs, outputs)


def layer_norm_rule(
    inputs: Tensor,
    outputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_dims: int,
    eps: float,
) -> Tensor:
    """LayerNorm with a constant normaliser: ``y = w (x - mean(x)) / s + b``; ``s = sqrt(var + eps)`` has no gradient.

    Args:
        inputs: ``x``, shape ``(..., *normalised_shape)``, floating.
        outputs: ``y``, the same shape, computed by the caller without gradient.
        weight: ``w``, shape ``normalised_shape``, or None.
        bias: ``b``, shape ``normalised_shape``, or None.
        num_dims: Number of trailing dimensions that are normalised.
        eps: Added to the variance.

    Returns:
        ``outputs``, bit for bit, differentiable with respect to ``inputs``, ``weight`` and ``bias``.
    """
    return _NormaliserRule.apply(inputs, outputs, weight, bias, num_dims, eps, True)


def rms_norm_rule(inputs: Tensor, outputs: Tensor, weight: Tensor | None, num_dims: int, eps: float | None) -> Tensor:
    """RMSNorm with a constant normaliser: ``y = w x / s``, no gradient through ``s = sqrt(mean(x^2) + eps)``.

    Args:
        inputs: ``x``, shape ``(..., *normalised_shape)``, floating.
        outputs: ``y``, the same shape, computed by the caller without gradient.
        weight: ``w``, shape ``normalised_shape``, or None.
        num_dims: Number of trailing dimensions that are normalised.
        eps: Added to the mean square; None means the machine epsilon of the dtype, as in ``torch.nn.RMSNorm``.

    Returns:
        ``outputs``, bit for bit, differentiable with respect to ``inputs`` and ``weight``.
    """
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    return _NormaliserRule.apply(inputs, outputs, weight, None, num_dims, eps, False)


class _IdentityRule(torch.autograd.Function):
    """See :func:`identity_rule`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            # The ratio is saved instead of both tensors: one multiplication in the backward pass.
            ratio = (outputs / inputs).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            ctx.save_for_backward(ratio.to(inputs.dtype))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (ratio,) = ctx.saved_tensors
        return (gradient * ratio).to(ratio.dtype), None


class _NormaliserRule(torch.autograd.Function):
    """See :func:`layer_norm_rule` (``centred``) and :func:`rms_norm_rule`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        outputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_dims: int,
        eps: float,
        centred: bool,
    ) -> Tensor:
        dims = tuple(range(-num_dims, 0))
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if centred:
            variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        else:
            variance, mean = wide.square().mean(dims, keepdim=True), None
        ctx.dims, ctx.centred = dims, centred
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(inputs, mean, torch.rsqrt(variance + eps), weight)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, scale, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        need_inputs, _, need_weight, need_bias, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        dims, centred = ctx.dims, ctx.centred  # type: ignore[attr-defined]
        batch_dims = tuple(range(gradient.dim() - len(dims)))
        gradient = gradient.to(scale.dtype)
        inputs_gradient = weight_gradient = bias_gradient = None
        if need_inputs:
            inner = gradient if weight is None else gradient * weight
            if centred:
                inner = inner - inner.mean(dims, keepdim=True)
            inputs_gradient = (inner * scale).to(inputs.dtype)
        if need_weight:
            normalised = (inputs - mean if centred else inputs) * scale
            weight_gradient = _sum_over(gradient * normalised, batch_dims).to(weight.dtype)
        if need_bias:
            bias_gradient = _sum_over(gradient, batch_dims).to(ctx.bias_dtype)  # type: ignore[attr-defined]
        return inputs_gradient, None, weight_gradient, bias_gradient, None, None, None


def _sum_over(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum over ``dims``; over none of them if empty (torch would take that for all)."""
    return tensor.sum(dims) if dims else tensor
