from functools import partial

import pytest
import torch
from torch import nn

from agcl.errors import AgclError
from agcl.gating import DirectionalGate, UpdateGate

OPTIMIZERS = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)]


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def held_of(size, seed=0):
    """What is held back of the steps in each of three directions: half, a tenth, and all."""
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q
    return rotation[:, :3] * torch.tensor([0.5, 0.1, 1.0]).sqrt()


def map_of(held):
    return torch.eye(len(held)) - held @ held.T


def run(model, optimizer, num_steps, first=0):
    for step in range(first, first + num_steps):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_whole_step_is_mapped(make, is_transposed):
    model, free = model_of(), model_of()
    held = held_of(3 if is_transposed else 4)
    before = free[0].weight.detach().clone()
    run(free, make(free.parameters()), 1)
    optimizer = make(model.parameters())
    with DirectionalGate(model.named_parameters(), {"0.weight": (held, is_transposed)}).attach(optimizer):
        run(model, optimizer, 1)
    step = free[0].weight.detach() - before
    expected = before + (map_of(held) @ step if is_transposed else step @ map_of(held))
    assert torch.allclose(model[0].weight, expected, atol=1e-6)
    assert torch.equal(model[2].weight, free[2].weight)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_narrow_products_let_a_few_thousandths_through(is_transposed):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    closed = torch.linalg.qr(torch.randn(64, 24, generator=generator)).Q
    before, moved = layer.weight.detach().clone(), torch.randn(64, 64, generator=generator)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with DirectionalGate(layer.named_parameters(), {"weight": (closed.bfloat16(), is_transposed)}).attach(optimizer):
        layer.weight.grad = -moved
        optimizer.step()
    step = (layer.weight.detach() - before).T if is_transposed else layer.weight.detach() - before
    wanted = moved.T if is_transposed else moved
    assert (step @ closed).norm() < 0.004 * (wanted @ closed).norm()
    exact = wanted - wanted @ closed @ closed.T
    assert torch.allclose(step, exact, atol=0.02)
    assert (step - exact).norm() < 0.004 * exact.norm()  # what is free is not rounded


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_closed_direction_answers_as_before(make):
    model = model_of()
    closed = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -1.0, 0.5]), dim=0)
    before = model[0].weight.detach() @ closed
    optimizer = make(model.parameters())
    with DirectionalGate(model.named_parameters(), {"0.weight": (closed[:, None], False)}).attach(optimizer):
        run(model, optimizer, 20)
    assert torch.allclose(model[0].weight.detach() @ closed, before, atol=1e-5)
    assert not torch.allclose(model[0].weight, model_of()[0].weight, atol=0.1)


def test_several_steps_are_mapped_together_and_at_the_end():
    model, free, make = model_of(), model_of(), OPTIMIZERS[1]
    held, optimizer = held_of(4), make(model.parameters())
    before = model[0].weight.detach().clone()
    gate = DirectionalGate(model.named_parameters(), {"0.weight": (held, False)}, every=3).attach(optimizer)
    run(model, optimizer, 2)
    run(free, make(free.parameters()), 2)
    assert torch.equal(model[0].weight, free[0].weight)  # not yet
    gate.detach()
    assert torch.allclose(model[0].weight, before + (free[0].weight.detach() - before) @ map_of(held), atol=1e-6)
    after = model[0].weight.detach().clone()
    run(model, optimizer, 1, first=2)
    assert not torch.allclose(model[0].weight @ held, after @ held, atol=1e-3)


def test_it_goes_on_between_two_products_as_if_nothing_had_happened():
    def make_gate(model, **state):
        return DirectionalGate(model.named_parameters(), {"0.weight": (held_of(4), False)}, every=3, **state)

    model = model_of()
    optimizer = OPTIMIZERS[1](model.parameters())
    with make_gate(model).attach(optimizer):
        run(model, optimizer, 7)
    stopped = model_of()
    other = OPTIMIZERS[1](stopped.parameters())
    gate = make_gate(stopped).attach(other)
    run(stopped, other, 5)
    state = {key: value.copy() if isinstance(value, dict) else value for key, value in gate.state_dict().items()}
    state["before"] = {name: tensor.clone() for name, tensor in state["before"].items()}
    weights, moments = {n: t.clone() for n, t in stopped.state_dict().items()}, other.state_dict()
    resumed = model_of()
    resumed.load_state_dict(weights)
    third = OPTIMIZERS[1](resumed.parameters())
    third.load_state_dict(moments)
    with make_gate(resumed, **state).attach(third):
        run(resumed, third, 2, first=5)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_beside_an_update_gate_each_gates_its_own():
    model, alone = model_of(), model_of()
    optimizer, other = (OPTIMIZERS[1](m.parameters()) for m in (model, alone))
    maps, importance = {"0.weight": (held_of(4), False)}, {"2.weight": torch.full((2, 3), 0.5)}
    with (
        UpdateGate(model.named_parameters(), importance).attach(optimizer),
        DirectionalGate(model.named_parameters(), maps).attach(optimizer),
    ):
        run(model, optimizer, 1)
    before = alone[2].weight.detach().clone()
    with DirectionalGate(alone.named_parameters(), maps).attach(other):
        run(alone, other, 1)
    assert torch.allclose(model[0].weight, alone[0].weight)
    assert torch.allclose(model[2].weight, torch.lerp(before, alone[2].weight.detach(), 0.5))


def test_plasticity_is_the_mean_share():
    gate = DirectionalGate(model_of().named_parameters(), {"0.weight": (held_of(4), False)})
    assert gate.plasticity() == {"0.weight": pytest.approx(1 - 1.6 / 4)}


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ({"3.weight": (torch.eye(4), False)}, {}, "`3.weight`: no parameter of that name"),
        ({"0.weight": (torch.eye(3), False)}, {}, r"`0.weight` has shape \(3, 3\), but the parameter \(3, 4\)"),
        ({"0.bias": (torch.eye(3), False)}, {}, "`0.bias` has shape"),
        ({"0.weight": (torch.eye(4), False)}, {"every": 0}, "`every` is 0"),
    ],
)
def test_what_does_not_fit_is_refused(maps, options, message):
    with pytest.raises(AgclError, match=message):
        DirectionalGate(model_of().named_parameters(), maps, **options)


def test_it_is_attached_once_to_an_optimizer_that_holds_its_matrices():
    model = model_of()
    gate = DirectionalGate(model.named_parameters(), {"0.weight": (torch.eye(4), False)})
    with pytest.raises(AgclError, match="holds none of the gated matrices"):
        gate.attach(torch.optim.SGD(model[2].parameters(), lr=0.1))
    gate.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(AgclError, match="attached already"):
        gate.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_rounding_of_narrow_weights_does_not_add_up():
    """What is held of a step is held after hundreds of them, each of which is rounded to bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 8, bias=False).bfloat16()
    start = model.weight.detach().float()
    held = torch.linalg.qr(torch.randn(64, 20)).Q
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    with DirectionalGate(model.named_parameters(), {"weight": (held, False)}).attach(optimizer):
        for _ in range(400):
            model.weight.grad = (torch.randn(8, 64) + 1).bfloat16()
            optimizer.step()
    moved = model.weight.detach().float() - start
    assert (moved @ held).norm() < 0.02 * moved.norm()
