import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from agcl.attribution.levels import dequantise
from agcl.errors import AgclError
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate, flattened, shuffled

GATES = [GradientGate, UpdateGate]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum_decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
    return model(batch).square().mean()


def uniform(model, value):
    return {name: torch.full(p.shape, value, dtype=torch.uint8) for name, p in model.named_parameters()}


def random_importance(model):
    generator = torch.Generator().manual_seed(7)
    levels = {n: torch.randint(256, p.shape, generator=generator) for n, p in model.named_parameters()}
    for value in levels.values():
        value.view(-1)[:2] = torch.tensor([0, 255])
    return {name: value.to(torch.uint8) for name, value in levels.items()}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def train(model, optimizer, num_steps=3):
    for seed in range(num_steps):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def equal(left, right):
    # On the bits: 0.0 and -0.0 differ.
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("importance_dtype", [torch.uint8, torch.uint16, torch.float64])
def test_sgd_step_in_closed_form(monkeypatch, gate, strength, importance_dtype):
    monkeypatch.setattr("agcl.gating.plasticity._CPU_CHUNK", 6)
    model = make_model(torch.float64)
    old = weights(model)
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    importance = random_importance(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {
        name: levels.double() / 255 if importance_dtype == torch.float64 else as_importance(levels, importance_dtype)
        for name, levels in importance.items()
    }
    with gate(model.named_parameters(), given, strength).attach(optimizer):
        loss_of(model).backward()
        optimizer.step()
    for new, before, gradient, levels in zip(model.parameters(), old, gradients, importance.values(), strict=True):
        expected = before - 0.1 * (1 - levels.double() / 255) ** strength * gradient
        torch.testing.assert_close(new.detach(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_gate_freezes_at_one_and_is_absent_at_zero(name, dtype):
    plain, gated, frozen = (make_model(dtype) for _ in range(3))
    start = weights(frozen)
    train(plain, OPTIMIZERS[name](plain.parameters()))
    for model, value in ((gated, 0), (frozen, 255)):
        optimizer = OPTIMIZERS[name](model.parameters())
        with UpdateGate(model.named_parameters(), uniform(model, value)).attach(optimizer):
            train(model, optimizer)
    assert equal(weights(gated), weights(plain))
    assert equal(weights(frozen), start)
    assert not equal(weights(plain), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("importance_dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_update_gate_is_exact_entry_by_entry(dtype, importance_dtype, strength):
    """Zeros and ones mixed in a tensor, so that neither the copy nor the blend is skipped."""
    plain, gated = make_model(dtype), make_model(dtype)
    optimizers = [OPTIMIZERS["adamw"](model.parameters()) for model in (plain, gated)]
    start = weights(gated)
    importance = {name: (torch.rand(p.shape) < 0.5).float() for name, p in gated.named_parameters()}
    given = {name: as_importance((255 * value).to(torch.uint8), importance_dtype) for name, value in importance.items()}
    with UpdateGate(gated.named_parameters(), given, strength).attach(optimizers[1]):
        for model, optimizer in zip((plain, gated), optimizers, strict=True):
            train(model, optimizer, num_steps=1)
    for new, free, before, value in zip(weights(gated), weights(plain), start, importance.values(), strict=True):
        assert torch.equal(new, torch.where(value == 1, before, free))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_half_plasticity_halves_the_step_from_the_same_state(name):
    model = make_model(torch.float64 if name != "adamw_fused" else torch.float32)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # momentum and second moments exist
    start, state = weights(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, num_steps=1)
    free = weights(model)
    with torch.no_grad():
        for p, before in zip(model.parameters(), start, strict=True):
            p.copy_(before)
    optimizer.load_state_dict(state)
    half = {name: torch.full(p.shape, 0.5) for name, p in model.named_parameters()}
    with UpdateGate(model.named_parameters(), half).attach(optimizer):
        train(model, optimizer, num_steps=1)
    for new, before, after in zip(weights(model), start, free, strict=True):
        torch.testing.assert_close(new, (before + after) / 2, rtol=1e-6, atol=1e-7)
        assert (after != before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_gradient_gate_acts_once_per_micro_batch(num_micro_batches, dtype):
    model = make_model(dtype)
    importance = random_importance(model)
    parameters = list(model.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for seed in range(num_micro_batches):
        gradients = torch.autograd.grad(loss_of(model, seed), parameters)
        for total, gradient, levels in zip(expected, gradients, importance.values(), strict=True):
            plasticity = (255 - levels.float()) / 255
            total += (plasticity * gradient.float()).to(dtype)
    with GradientGate(model.named_parameters(), importance).attach(torch.optim.SGD(parameters, lr=0.1)):
        for seed in range(num_micro_batches):
            loss_of(model, seed).backward()
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        # Clipping sees the gated gradient and keeps its direction.
        norm = torch.stack([g.float().norm() for g in expected]).norm()
        nn.utils.clip_grad_norm_(parameters, float(norm) / 2)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(
                parameter.grad, gradient / 2, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
            )


def test_gradient_gate_scales_in_autocast():
    model = make_model()
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = torch.autograd.grad(loss_of(model), parameters)
    half = {name: torch.full(p.shape, 0.5) for name, p in model.named_parameters()}
    with GradientGate(model.named_parameters(), half).attach(torch.optim.SGD(parameters)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
    assert equal([p.grad for p in parameters], [g / 2 for g in plain])


def test_gradient_gate_on_sparse_and_strided_gradients(monkeypatch):
    monkeypatch.setattr("agcl.gating.plasticity._CPU_CHUNK", 2)
    table, weight = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(4, 3))
    importance = {"table": torch.rand(4, 3), "weight": torch.rand(4, 3)}
    with GradientGate([("table", table), ("weight", weight)], importance).attach(torch.optim.SGD([table, weight])):
        nn.functional.embedding(torch.tensor([1, 1, 3]), table, sparse=True).sum().backward()
        factor = torch.rand(3, 4)
        (weight.T * factor).sum().backward()  # the gradient at the weight is a transposed tensor
    counts = torch.tensor([0.0, 2.0, 0.0, 1.0])[:, None]
    torch.testing.assert_close(table.grad.to_dense(), counts * (1 - importance["table"]))
    torch.testing.assert_close(weight.grad, factor.T * (1 - importance["weight"]))


def test_gradient_gate_keeps_the_graph_for_double_backward():
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    with GradientGate([("w", weight)], {"w": torch.tensor([0.5, 0.0])}).attach(torch.optim.SGD([weight])):
        (gradient,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
        assert gradient.tolist() == [6.0, 27.0]
        gradient.sum().backward()
    # d/dw (0.5 * 3 w^2) = 3 w = 6, gated once more; 6 w = 18.
    assert weight.grad.tolist() == [3.0, 18.0]


def test_adamw_cancels_the_gradient_gate_but_not_the_update_gate():
    """Importance 0.75 should leave a quarter of the way; under AdamW the gradient gate leaves all of it."""
    distance = {}
    for gate in (None, GradientGate, UpdateGate):
        model = make_model(torch.float64)
        start = weights(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-12)
        if gate is not None:
            values = {name: torch.full(p.shape, 0.75) for name, p in model.named_parameters()}
            gate(model.named_parameters(), values).attach(optimizer)
        train(model, optimizer, num_steps=5)
        moved = [(new - before).norm() for new, before in zip(weights(model), start, strict=True)]
        distance[gate] = float(torch.stack(moved).norm())
    assert distance[GradientGate] == pytest.approx(distance[None], rel=1e-3)
    assert distance[UpdateGate] == pytest.approx(distance[None] / 4, rel=1e-2)


def test_weight_decay_gets_past_the_gradient_gate():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    assert choose_gate(optimizer) == "update"
    with GradientGate([("w", weight)], {"w": torch.ones(3)}).attach(optimizer):
        weight.sum().backward()
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.95] * 3)


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum_decay", "lbfgs"])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_closure_runs_before_the_weights_are_copied(name, by_keyword):
    model = make_model()
    start = weights(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    importance = random_importance(model)
    gate = UpdateGate(model.named_parameters(), importance).attach(optimizer)
    held = []

    def closure():
        held.append(gate.snapshot_bytes)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss.item() == pytest.approx(loss_of_copy(start))
    assert held[0] == 0
    if name == "lbfgs":
        # Called again, with the copy of the weights before the step still there.
        assert set(held[1:]) == {sum(p.numel() * 4 for p in model.parameters())}
    else:
        assert len(held) == 1
    assert gate.snapshot_bytes == 0
    for new, before, levels in zip(model.parameters(), start, importance.values(), strict=True):
        assert torch.equal(new[levels == 255], before[levels == 255])
        assert (new[levels == 0] != before[levels == 0]).all()


def loss_of_copy(values):
    model = make_model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
        return loss_of(model).item()


def test_closure_and_plain_step_agree():
    results = []
    for by_closure in (True, False):
        model = make_model()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        with UpdateGate(model.named_parameters(), random_importance(model)).attach(optimizer):
            for seed in range(3):

                def closure(seed=seed, model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = loss_of(model, seed)
                    loss.backward()
                    return loss

                if by_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        results.append(weights(model))
    assert equal(*results)


class Foreign(torch.optim.SGD):
    """Not one of torch's own, so all gated weights are copied at once, before the step."""


def test_only_gated_parameters_with_a_gradient_are_copied():
    model = make_model()
    importance = uniform(model, 9)
    del importance["2.weight"]
    importance["0.bias"].zero_()
    optimizer = Foreign(model.parameters(), lr=0.1)
    gate = UpdateGate(model.named_parameters(), importance).attach(optimizer)
    loss_of(model).backward()
    model[2].bias.grad = None
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gate.snapshot_bytes))
    optimizer.step()
    assert seen == [4 * model[0].weight.numel()]


class Decaying(torch.optim.SGD):
    """Moves the weights before and after a step of its base class, which runs the hooks too."""

    def step(self, closure=None):
        for factor in (0.5, None, 0.25):
            if factor is None:
                loss = super().step(closure)
                continue
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(factor)
        return loss


def test_nested_steps_count_as_one():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on SGD.step runs hooks, also through super()
    weight = nn.Parameter(torch.tensor([8.0, 8.0, 8.0]))
    optimizer = Decaying([weight], lr=1.0)
    weight.grad = torch.tensor([2.0, 2.0, 2.0])
    with UpdateGate([("w", weight)], {"w": torch.tensor([0.0, 0.5, 1.0])}).attach(optimizer):
        optimizer.step()
        # Ungated: (8 * 0.5 - 2) * 0.25 = 0.5.
        assert weight.tolist() == [0.5, (8 + 0.5) / 2, 8.0]


def test_exceptions_leave_nothing_behind():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    def closure():
        raise KeyError("bad batch")

    start = weights(model)
    gate = UpdateGate(model.named_parameters(), uniform(model, 128)).attach(optimizer)
    with pytest.raises(KeyError, match="bad batch"):
        optimizer.step(closure)
    assert gate.snapshot_bytes == 0
    assert equal(weights(model), start)
    train(model, optimizer, num_steps=1)
    assert not equal(weights(model), start)


def test_copy_of_a_step_that_raised_is_dropped_by_the_next_step_or_detach():
    model = make_model()
    optimizer = Foreign(model.parameters(), lr=0.1)
    gate = UpdateGate(model.named_parameters(), uniform(model, 255)).attach(optimizer)

    def fail(*_):
        raise RuntimeError("out of memory")

    loss_of(model).backward()
    for _ in range(2):
        handle = optimizer.register_step_pre_hook(fail)  # runs after the gate's, so the copy exists
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert gate.snapshot_bytes == 4 * sum(p.numel() for p in model.parameters())
        handle.remove()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    optimizer.step()
    assert gate.snapshot_bytes == 0
    assert (model[0].weight == 3.0).all()  # not the older copy
    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    gate.detach()
    assert gate.snapshot_bytes == 0


def test_an_optimizer_that_ignores_its_closure_is_reported():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    model = make_model()
    optimizer = Deaf(model.parameters(), lr=0.1)
    gate = UpdateGate(model.named_parameters(), uniform(model, 255)).attach(optimizer)
    loss_of(model).backward()
    with pytest.raises(AgclError, match=r"Deaf\.step did not call its closure"):
        optimizer.step(lambda: None)
    gate.detach()


@pytest.mark.parametrize("gate", GATES)
def test_detach_restores_plain_training(gate):
    plain, gated = make_model(), make_model()
    optimizer = OPTIMIZERS["adamw"](gated.parameters())
    attached = gate(gated.named_parameters(), uniform(gated, 200))
    with attached.attach(optimizer) as entered:
        assert entered is attached
    attached.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in gated.parameters())
    train(gated, optimizer)
    train(plain, OPTIMIZERS["adamw"](plain.parameters()))
    assert equal(weights(gated), weights(plain))


@pytest.mark.parametrize("gate", GATES)
def test_an_exception_in_the_block_detaches_and_passes(gate):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = gate(model.named_parameters(), uniform(model, 255))
    with pytest.raises(ZeroDivisionError), frozen.attach(optimizer):
        train(model, optimizer, num_steps=1 // 0)
    start = weights(model)
    train(model, optimizer, num_steps=1)
    assert not equal(weights(model), start)


@pytest.mark.parametrize("gate", GATES)
def test_attach_again_after_detach_gates_again(gate):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = gate(model.named_parameters(), uniform(model, 255))
    start = weights(model)
    for _ in range(2):
        with frozen.attach(optimizer):
            train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), start, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_attach_refuses_twice_and_a_foreign_optimizer(gate):
    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = gate(model.named_parameters(), uniform(model, 1))
    with pytest.raises(AgclError, match="none of the gated parameters"):
        attached.attach(torch.optim.SGD(other.parameters(), lr=0.1))
    attached.attach(optimizer)
    with pytest.raises(AgclError, match="attached already"):
        attached.attach(optimizer)


@pytest.mark.parametrize("gate", GATES)
def test_gate_does_not_keep_the_model_alive(gate):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = gate(model.named_parameters(), uniform(model, 100))
    kept.attach(optimizer)
    train(model, optimizer, num_steps=1)
    kept.detach()
    weight = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
    assert kept.plasticity()["0.weight"] == pytest.approx(155 / 255)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("both_names", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_tied_weights_are_gated_once(gate, both_names):
    torch.manual_seed(0)
    model = Tied().double()
    tokens = torch.tensor([1, 2, 3])
    start = model.embed.weight.detach().clone()
    (gradient,) = torch.autograd.grad(model(tokens).square().sum(), model.embed.weight)
    half = torch.full((6, 4), 0.5)
    importance = {"embed.weight": half, "head.weight": half.clone()} if both_names else {"head.weight": half}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gate(model.named_parameters(remove_duplicate=False), importance).attach(optimizer):
        model(tokens).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.embed.weight.detach(), start - 0.05 * gradient)


def test_tied_weights_with_two_opinions_are_refused():
    model = Tied()
    with pytest.raises(AgclError, match=r"`head.weight` and `embed.weight` are one parameter"):
        GradientGate(
            model.named_parameters(remove_duplicate=False),
            {"embed.weight": torch.zeros(6, 4), "head.weight": torch.ones(6, 4)},
        )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"missing.weight": torch.zeros(2)}, "`missing.weight`: no parameter"),
        ({"0.weight": torch.zeros(5, 7)}, r"`0.weight` has shape \(5, 7\), the parameter \(7, 5\)"),
        ({"0.bias": torch.full((7,), 1.5)}, "`0.bias` has values outside"),
        ({"0.bias": torch.full((7,), -0.1)}, "`0.bias` has values outside"),
        ({"0.bias": torch.tensor([float("nan")] * 7)}, "`0.bias` has values outside .* NaN"),
        ({"0.bias": torch.zeros(7, dtype=torch.int64)}, r"`0.bias` is torch.int64"),
    ],
)
def test_bad_importance_is_refused_by_name(gate, importance, message):
    with pytest.raises(AgclError, match=message):
        gate(make_model().named_parameters(), importance)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_bad_strength_is_refused(strength):
    with pytest.raises(AgclError, match="`strength`"):
        UpdateGate(make_model().named_parameters(), {}, strength)


@pytest.mark.parametrize("gate", GATES)
def test_strength_zero_is_no_gate(gate):
    plain, gated = make_model(), make_model()
    optimizer = OPTIMIZERS["adamw"](gated.parameters())
    free = gate(gated.named_parameters(), uniform(gated, 255), strength=0)
    assert set(free.plasticity().values()) == {1.0}
    with free.attach(optimizer):
        train(gated, optimizer)
    train(plain, OPTIMIZERS["adamw"](plain.parameters()))
    assert equal(weights(gated), weights(plain))


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_plasticity_is_the_mean_for_fixed_point_and_float(monkeypatch, strength):
    monkeypatch.setattr("agcl.gating.plasticity._CPU_CHUNK", 6)
    model = make_model()
    importance = random_importance(model)
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        given = {name: as_importance(levels, dtype) for name, levels in importance.items()}
        found = UpdateGate(model.named_parameters(), given, strength).plasticity()
        for name, levels in importance.items():
            expected = ((1 - levels.double() / 255) ** strength).mean()
            assert found[name] == pytest.approx(float(expected), rel=1e-6)


def as_importance(levels, dtype):
    """uint8 levels as the same importance in another dtype; 255 * 257 = 65535."""
    if dtype == torch.uint8:
        return levels
    return (levels.int() * 257).to(dtype) if dtype == torch.uint16 else dequantise(levels).to(dtype)


@pytest.mark.parametrize("importance_dtype", [torch.uint8, torch.uint16, torch.float16, torch.float64])
def test_update_gate_in_chunks_and_on_strided_weights(monkeypatch, importance_dtype):
    monkeypatch.setattr("agcl.gating.plasticity._CPU_CHUNK", 6)
    strided = nn.Parameter(torch.randn(5, 4).T.detach().requires_grad_())
    flat, scalar = nn.Parameter(torch.randn(17)), nn.Parameter(torch.tensor(2.0))
    named = {"strided": strided, "flat": flat, "scalar": scalar, "empty": nn.Parameter(torch.empty(0, 3))}
    assert not strided.is_contiguous()
    levels = {name: torch.randint(256, p.shape, dtype=torch.uint8) for name, p in named.items()}
    given = {name: as_importance(value, importance_dtype) for name, value in levels.items()}
    start = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=1.0)
    for p in named.values():
        p.grad = torch.ones_like(p)
    with UpdateGate(named.items(), given).attach(optimizer):
        optimizer.step()
    for name, p in named.items():
        expected = start[name] - (1 - dequantise(levels[name]))
        torch.testing.assert_close(
            p.detach(), expected, rtol=1e-5, atol=1e-3 if importance_dtype == torch.float16 else 1e-6
        )


def test_frozen_parameters_need_no_gradient_hook():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = weights(model)
    with GradientGate(model.named_parameters(), uniform(model, 255)).attach(optimizer):
        train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), start, strict=True))


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_parameters(mesh):
    from torch.distributed.fsdp import fully_shard

    plain, model = make_model(), make_model()
    importance = random_importance(plain)
    fully_shard(model, mesh=mesh)
    results = []
    for trained in (plain, model):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        with UpdateGate(trained.named_parameters(), importance).attach(optimizer):
            train(trained, optimizer)
        results.append([getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in trained.parameters()])
    assert equal(*results)
    with pytest.raises(AgclError, match=r"is sharded .* use UpdateGate"):
        GradientGate(model.named_parameters(), importance).attach(torch.optim.SGD(model.parameters(), lr=0.1))


def step_ratio(make):
    """Distance moved under a quarter of the gradient (of a quadratic bowl), relative to the whole gradient."""
    moved = []
    target = 0.5 + torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for factor in (1.0, 0.25):
        weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        optimizer = make([weight])
        is_sparse = type(optimizer) is torch.optim.SparseAdam

        def closure(weight=weight, factor=factor, is_sparse=is_sparse):
            gradient = factor * (weight.detach() - target)
            weight.grad = gradient.to_sparse() if is_sparse else gradient
            return factor * (weight.detach() - target).square().sum() / 2

        for _ in range(300):  # RAdam starts out as plain momentum
            optimizer.step(closure)
        moved.append(float(weight.detach().norm()))
    return moved[1] / moved[0]


@pytest.mark.parametrize(
    "kind",
    sorted((k for k in vars(torch.optim).values() if isinstance(k, type)), key=lambda k: k.__name__),
    ids=lambda k: k.__name__,
)
def test_cancelling_optimizers_by_their_behaviour(kind):
    if kind is torch.optim.Optimizer:
        return
    options = {torch.optim.ASGD: {"lambd": 0.0}, torch.optim.LBFGS: {"max_iter": 1}}.get(kind, {})
    if "weight_decay" in kind.__init__.__code__.co_varnames:
        options["weight_decay"] = 0.0

    def make(parameters):
        return kind(parameters, lr=1e-3, **options)

    ratio = step_ratio(make)
    is_cancelling = cancels_gradient_gate(make([nn.Parameter(torch.zeros(2, 2))]))
    assert ratio > 0.8 if is_cancelling else ratio < 0.3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "gradient"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "gradient"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4), "update"),
        (lambda p: torch.optim.SGD([{"params": p, "weight_decay": 1e-4}], lr=0.1), "update"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0), "update"),
        (lambda p: Decaying(p, lr=0.1), "update"),
    ],
)
def test_choose_gate(make, expected):
    assert choose_gate(make([nn.Parameter(torch.zeros(2))])) == expected


def test_gradient_gate_under_momentum_scales_the_whole_step():
    """What `choose_gate` relies on: momentum and Nesterov are linear in the gradient."""
    model, plain = make_model(torch.float64), make_model(torch.float64)
    start = weights(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True) for m in (model, plain)]
    quarter = {name: torch.full(p.shape, 0.75) for name, p in model.named_parameters()}
    with GradientGate(model.named_parameters(), quarter).attach(optimizers[0]):
        for seed in range(5):
            gradients = torch.autograd.grad(loss_of(plain, seed), list(plain.parameters()))
            # The same gradients for both, through the gated model's own backward.
            sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True)).backward()
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p.grad = g
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for gated, free, before in zip(weights(model), weights(plain), start, strict=True):
        torch.testing.assert_close(gated - before, (free - before) / 4)


def test_shuffled_keeps_the_values_and_ignores_the_other_tensors():
    importance = {"a": torch.arange(200, dtype=torch.uint8).view(20, 10), "b": torch.rand(30), "empty": torch.rand(0)}
    importance["fine"] = importance["a"].to(torch.uint16)
    first = shuffled(importance, seed=1)
    for name, values in importance.items():
        assert first[name].shape == values.shape
        assert first[name].dtype == values.dtype
        assert torch.equal(first[name].reshape(-1).sort().values, values.reshape(-1).sort().values)
    assert not torch.equal(first["a"], importance["a"])
    assert torch.equal(importance["a"].view(-1), torch.arange(200, dtype=torch.uint8))
    assert torch.equal(shuffled({"a": importance["a"]}, seed=1)["a"], first["a"])
    assert not torch.equal(shuffled(importance, seed=2)["a"], first["a"])


def test_flattened_has_the_same_mean():
    model = make_model()
    importance = random_importance(model)
    means = {name: float(dequantise(levels).double().mean()) for name, levels in importance.items()}
    overall = float(torch.cat([dequantise(v).double().reshape(-1) for v in importance.values()]).mean())
    for scope in ("tensor", "model"):
        flat = flattened(importance, scope)
        for name, values in flat.items():
            assert values.shape == importance[name].shape
            expected = means[name] if scope == "tensor" else overall
            torch.testing.assert_close(values, torch.full(values.shape, expected))
        gate = UpdateGate(model.named_parameters(), flat).attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert gate.plasticity()["0.bias"] == pytest.approx(1 - (means["0.bias"] if scope == "tensor" else overall))
    assert flattened({"a": torch.tensor([0, 65535], dtype=torch.uint16)})["a"].tolist() == [0.5, 0.5]
    assert flattened({"a": torch.tensor([0.2, 0.4])})["a"].tolist() == pytest.approx([0.3, 0.3])
    with pytest.raises(AgclError, match="`scope` is 'row'"):
        flattened(importance, "row")


@pytest.mark.parametrize("moves", [True, False])
def test_importance_moves_to_the_parameters_device_or_stays(moves):
    """The meta device stands for another one."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    given = torch.tensor([0, 1, 255], dtype=torch.uint8)
    gate = UpdateGate([("w", parameter)], {"w": given}, moves_importance=moves)
    assert gate._gated[id(parameter)].local_importance(parameter).device.type == "meta"
    assert {tensor.device.type for tensor in gate.held_importance()} == {"meta" if moves else "cpu"}
