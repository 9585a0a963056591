"""Each rule against a second derivation in float64: explicit matrices and ratios instead of backward formulas."""

import pytest
import torch
from torch.nn import functional

from agcl.attribution.rules import identity_rule, layer_norm_rule, rms_norm_rule, scale_gradient_


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("function", [torch.tanh, functional.silu, functional.gelu, torch.relu])
def test_identity_rule_passes_relevance_unchanged(function, generator):
    x, relevance = normal(generator, 4, 5), normal(generator, 4, 5).detach()
    y = identity_rule(x, function(x.detach()))
    assert torch.equal(y, function(x))
    y.backward(relevance / y.detach().where(y != 0, 1))
    torch.testing.assert_close(x * x.grad, relevance.where(y != 0, 0), rtol=1e-12, atol=1e-14)


def test_identity_rule_at_zero_and_of_infinite_ratio_is_silent():
    x = torch.tensor([0.0, 1e-320, 2.0], dtype=torch.float64, requires_grad=True)
    identity_rule(x, torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 2.0]


def test_identity_rule_keeps_the_dtype_of_its_input():
    x = torch.tensor([1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    y = identity_rule(x, functional.silu(x.detach().float()))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_uniform_rule_shares_a_product_in_halves(generator):
    a, b = normal(generator, 3), normal(generator, 3)
    y = scale_gradient_(a * b, 0.5)
    y.backward(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(a * a.grad, y / 2)
    torch.testing.assert_close(b * b.grad, y / 2)


def test_scale_gradient_leaves_constants_alone():
    constant = torch.ones(2)
    assert scale_gradient_(constant, 0.5) is constant
    assert not constant._backward_hooks


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_layer_norm_rule_is_linear_in_the_centred_input(shape, batch, affine, generator):
    x = normal(generator, *batch, *shape)
    weight = None if affine == "none" else normal(generator, *shape)
    bias = normal(generator, *shape) if affine == "both" else None
    value = functional.layer_norm(x, shape, weight, bias, 0.1).detach()
    y = layer_norm_rule(x, value, weight, bias, len(shape), 0.1)
    assert torch.equal(y, value)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(upstream)

    rows, grads = x.detach().reshape(-1, 6), upstream.reshape(-1, 6)
    scale = 1 / torch.sqrt(rows.var(-1, correction=0) + 0.1)
    w = torch.ones(6, dtype=torch.float64) if weight is None else weight.detach().flatten()
    matrix = w[:, None] * (torch.eye(6, dtype=torch.float64) - 1 / 6)  # (out, in)
    expected = torch.einsum("n,oi,no->ni", scale, matrix, grads)
    torch.testing.assert_close(x.grad.reshape(-1, 6), expected, rtol=1e-12, atol=1e-14)
    if weight is not None:
        normalised = (rows - rows.mean(-1, keepdim=True)) * scale[:, None]
        torch.testing.assert_close(weight.grad.flatten(), (grads * normalised).sum(0), rtol=1e-12, atol=1e-14)
    if bias is not None:
        torch.testing.assert_close(bias.grad.flatten(), grads.sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_rule_passes_relevance_unchanged(batch, eps, affine, generator):
    x = normal(generator, *batch, 5)
    weight = normal(generator, 5) if affine else None
    value = functional.rms_norm(x, (5,), weight, eps).detach()
    y = rms_norm_rule(x, value, weight, 1, eps)
    assert torch.equal(y, value)
    relevance = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(relevance / value)
    torch.testing.assert_close(x * x.grad, relevance, rtol=1e-12, atol=1e-14)
    if weight is not None:
        torch.testing.assert_close(weight * weight.grad, relevance.reshape(-1, 5).sum(0), rtol=1e-12, atol=1e-14)


def test_normaliser_rules_keep_the_dtypes_of_their_inputs():
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4)
    value = functional.layer_norm(x.detach(), (4,), weight)
    layer_norm_rule(x, value, weight.requires_grad_(), bias.requires_grad_(), 1, 1e-5).sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
