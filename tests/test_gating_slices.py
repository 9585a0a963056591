"""The update gate runs torch's own optimizers on a few parameters at a time; nobody else may notice."""

import copy
import functools

import pytest
import torch
from torch import nn

from agcl.gating import UpdateGate
from agcl.gating.gate import GatedParameter
from agcl.gating.held import HeldWeights

NUM_STEPS = 4

# Name: optimizer, options, whether it has a foreach path.
CASES = {
    "sgd": (torch.optim.SGD, {}, True),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, True),
    "sgd_maximize": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}, True),
    "sgd_fused": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "fused": True}, False),
    "adam": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, True),
    "adam_tensor_lr": (torch.optim.Adam, {"lr": torch.tensor(0.1)}, False),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, True),
    "adamw_maximize": (torch.optim.AdamW, {"maximize": True}, True),
    "adamw_fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}, False),
    "adamw_fused_amsgrad": (torch.optim.AdamW, {"amsgrad": True, "maximize": True, "fused": True}, False),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, True),
    "radam": (torch.optim.RAdam, {"weight_decay": 0.1}, True),
    "adamax": (torch.optim.Adamax, {"weight_decay": 0.1}, True),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}, True),
    "adagrad_fused": (torch.optim.Adagrad, {"lr_decay": 0.1, "fused": True}, False),
    "adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}, True),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, True),
    "rprop": (torch.optim.Rprop, {}, True),
    "asgd": (torch.optim.ASGD, {"t0": 1, "weight_decay": 0.1}, True),
}
if hasattr(torch.optim, "Adafactor"):
    CASES["adafactor"] = (torch.optim.Adafactor, {"weight_decay": 0.1}, True)
if hasattr(torch.optim, "Muon"):
    CASES["muon"] = (torch.optim.Muon, {"weight_decay": 0.1}, False)
VARIANTS = [(name, False) for name in CASES] + [(name, True) for name in CASES if CASES[name][2]]

SHAPES = {"a": (3, 4), "ungated": (4, 2), "b": (2, 3), "no_gradient": (2, 2), "c": (5, 2), "open": (2, 5), "d": (1, 3)}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr("agcl.gating.slices._CPU_SLICE", 9)


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def make_optimizer(name, parameters, foreach=None):
    kind, options, _ = copy.deepcopy(CASES[name])
    options = {"lr": 0.1, **options} | ({"foreach": True} if foreach else {})
    values = list(parameters.values())
    return kind([{"params": values[:3]}, {"params": values[3:], "lr": 0.03}], **options)


def negligible(parameters):
    """Too small to change a weight, yet not zero: all entries are copied and blended."""
    return {n: torch.full(p.shape, 0.0 if n == "open" else 1e-30) for n, p in parameters.items() if n != "ungated"}


def set_gradients(parameters, seed, first_of_late=2):
    """One parameter has none in the first steps (torch's fused SGD with momentum allows that only throughout)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters.items():
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if name == "no_gradient" and seed < first_of_late else gradient


def flat(state):
    """Nested state as a list of plain values, keys and their order included."""
    if isinstance(state, torch.Tensor):
        return [str(state.dtype), tuple(state.shape), state.detach().reshape(-1).clone().view(torch.uint8).tolist()]
    if isinstance(state, dict):
        return [[key, flat(value)] for key, value in state.items()]
    return [flat(value) for value in state] if isinstance(state, (list, tuple)) else [state]


def record_inner_steps(monkeypatch, kind, gate, fail_at=None):
    """Each inner step's parameters and the bytes copied for it."""
    calls = []
    inner = kind.step.__wrapped__

    def step(optimizer):
        groups = optimizer.param_groups
        calls.append((gate.snapshot_bytes, [p for group in groups for p in group["params"]]))
        if len(calls) == fail_at:
            raise RuntimeError("out of memory")
        return inner(optimizer)

    monkeypatch.setattr(kind.step, "__wrapped__", step)
    return calls


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize(("name", "foreach"), VARIANTS)
def test_weights_and_state_are_those_of_the_whole_step(monkeypatch, name, foreach, with_closure):
    results = []
    for is_gated in (False, True):
        parameters = make_parameters()
        optimizer = make_optimizer(name, parameters, foreach)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        groups, trace = optimizer.param_groups, []
        if is_gated:
            gate = UpdateGate(parameters.items(), negligible(parameters)).attach(optimizer)
            calls = record_inner_steps(monkeypatch, type(optimizer), gate)
        for seed in range(NUM_STEPS):

            def closure(seed=seed, parameters=parameters):
                set_gradients(parameters, seed, first_of_late=NUM_STEPS if name == "sgd_fused" else 2)
                return torch.tensor(float(seed))

            if with_closure:
                assert optimizer.step(closure) == seed
            else:
                closure()
                assert optimizer.step() is None
            scheduler.step()
            assert optimizer.param_groups is groups
            trace.append(flat([list(parameters.values()), optimizer.state_dict()]))
        results.append(trace)
    assert results[0] == results[1]
    names = {id(p): name for name, p in parameters.items()}
    expected = [["a", "ungated"], ["b"], ["no_gradient", "c", "open"], ["d"]]
    assert [[names[id(p)] for p in called] for _, called in calls[:4]] == expected
    assert [held for held, _ in calls[:4]] == [4 * 12, 4 * 6, 4 * 10, 4 * 3]


@pytest.mark.parametrize("name", ["sgd_fused", "adamw_fused", "adagrad_fused", "adamw"])
def test_gradient_scaler(name):
    """Fused steps unscale and skip by themselves, from attributes that the scaler sets for the step."""
    results = []
    for is_gated in (False, True):
        parameters = make_parameters()
        optimizer = make_optimizer(name, parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        if is_gated:
            UpdateGate(parameters.items(), negligible(parameters)).attach(optimizer)
        for seed in range(NUM_STEPS):
            optimizer.zero_grad()
            set_gradients(parameters, seed, first_of_late=NUM_STEPS)
            scaler.scale(torch.zeros(()))  # the scaler starts lazily
            for p in parameters.values():
                if p.grad is not None:
                    p.grad.mul_(scaler.get_scale())
            if seed == 2:
                parameters["c"].grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        gradients = [p.grad for p in parameters.values()]
        results.append(flat([list(parameters.values()), gradients, optimizer.state_dict(), scaler.state_dict()]))
    assert results[0] == results[1]


def test_copies_are_at_most_the_largest_parameter_or_the_limit(monkeypatch):
    parameters = {str(i): nn.Parameter(torch.randn(size)) for i, size in enumerate((4, 4, 4, 30, 1, 8, 1, 1))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    gate = UpdateGate(parameters.items(), negligible(parameters)).attach(optimizer)
    calls = record_inner_steps(monkeypatch, torch.optim.SGD, gate)
    set_gradients(parameters, 0)
    optimizer.step()
    assert [held // 4 for held, _ in calls] == [8, 4, 30, 9, 2]
    assert gate.snapshot_bytes == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "muon"])
def test_an_inner_step_that_raises_leaves_the_optimizer_whole(monkeypatch, name):
    parameters = make_parameters()
    optimizer = make_optimizer(name, parameters)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    groups, ids = optimizer.param_groups, [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    gate = UpdateGate(parameters.items(), {n: torch.ones(p.shape) for n, p in parameters.items() if n != "ungated"})
    gate.attach(optimizer)
    with monkeypatch.context() as patch:
        record_inner_steps(patch, type(optimizer), gate, fail_at=3)
        set_gradients(parameters, 0)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert optimizer.param_groups is groups
    assert [[id(p) for p in group["params"]] for group in groups] == ids
    assert gate.snapshot_bytes == 0
    optimizer.step()
    for n, p in parameters.items():
        assert torch.equal(p, start[n]) == (n != "ungated")
    steps = [int(optimizer.state[p].get("step", 0)) for p in list(parameters.values())[:3]]
    assert steps == ([2, 2, 2] if name != "muon" else [0, 0, 0])


@pytest.mark.parametrize("detaches", [True, False])
def test_a_step_interrupted_after_the_slices_is_mended(detaches):
    parameters = make_parameters()
    optimizer = make_optimizer("adamw", parameters)
    groups = optimizer.param_groups
    gate = UpdateGate(parameters.items(), negligible(parameters)).attach(optimizer)

    def interrupted(_, args, kwargs):
        def closure():
            args[1]()
            assert optimizer.param_groups == []
            raise KeyboardInterrupt

        return (args[0], closure), kwargs

    set_gradients(parameters, 0)
    handle = optimizer.register_step_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    if detaches:
        gate.detach()
        assert optimizer.param_groups is groups
    optimizer.step()
    assert optimizer.param_groups is groups
    assert int(optimizer.state[parameters["a"]]["step"]) == 2


def test_step_hooks_of_others_see_groups_gradients_and_weights_as_without_slices():
    seen = {}
    for is_gated in (False, True):
        parameters = make_parameters()
        optimizer = make_optimizer("sgd_momentum", parameters)
        log = seen[is_gated] = []

        def look(optimizer, args, kwargs, log=log):
            log.append(flat([group["params"] for group in optimizer.param_groups]))

        def clip(optimizer, args, kwargs):
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
        if is_gated:
            UpdateGate(parameters.items(), negligible(parameters)).attach(optimizer)
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(look)
        set_gradients(parameters, 0)
        optimizer.step()
        optimizer.step(closure=None)
        optimizer.step(None)
    assert len(seen[True]) == 12
    assert seen[True] == seen[False]


def test_two_gates_on_one_optimizer_multiply():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = -torch.ones(3)
    first = UpdateGate([("w", weight)], {"w": torch.tensor([0.5, 0.5, 0.0])})
    second = UpdateGate([("w", weight)], {"w": torch.tensor([0.5, 0.0, 0.0])})
    with first.attach(optimizer), second.attach(optimizer):
        optimizer.step()
        assert weight.tolist() == [0.25, 0.5, 1.0]
    with first.attach(optimizer):
        optimizer.step()
        assert first._step is not None  # alone again: in slices
    assert weight.tolist() == [0.75, 1.0, 2.0]


def test_a_step_wrapped_by_others_and_its_hooks_run_once(monkeypatch):
    weights = [nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    hooked, calls = torch.optim.SGD.step, []
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))

    @functools.wraps(hooked)
    def step(self, closure=None):
        calls.append(len(self.param_groups[0]["params"]))
        return hooked(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    for weight in weights:
        weight.grad = -torch.ones(6)
    importance = {"0": torch.full((6,), 0.5), "1": torch.ones(6)}
    with UpdateGate(zip("01", weights, strict=True), importance).attach(optimizer):
        optimizer.step()
    assert calls == [2, "hook"]
    assert [weight[0].item() for weight in weights] == [0.5, 0.0]


def test_nothing_to_gate_is_one_whole_step(monkeypatch):
    parameters = make_parameters()
    optimizer = make_optimizer("adamw", parameters)
    importance = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    gate = UpdateGate(parameters.items(), importance).attach(optimizer)
    calls = record_inner_steps(monkeypatch, torch.optim.AdamW, gate)
    set_gradients(parameters, 0)
    before = parameters["a"].detach().clone()
    optimizer.step()
    assert calls == []
    assert not torch.equal(parameters["a"], before)


class OwnAdamW(torch.optim.AdamW):
    """Not run in slices: the gate copies all weights at once."""


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, OwnAdamW])
@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "levels"), [(torch.float64, 255), (torch.float64, 65535), (torch.bfloat16, 255)])
def test_rows_without_importance_are_neither_copied_nor_touched(optimizer_class, strength, dtype, levels):
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 6, dtype=dtype)
    importance = torch.zeros(40, 6, dtype=torch.int64)
    importance[torch.tensor([3, 17, 39])] = torch.randint(levels + 1, (3, 6))
    importance[3, 0], importance[17, 0] = levels, 0
    fixed_point = importance.to(torch.uint8 if levels == 255 else torch.uint16)
    free = copy.deepcopy(embedding)
    gate = UpdateGate(embedding.named_parameters(), {"weight": fixed_point}, strength)
    for module in (embedding, free):
        optimizer = optimizer_class(module.parameters(), lr=0.1, weight_decay=0.1)
        start = module.weight.detach().clone()
        if module is embedding:
            gate.attach(optimizer)
        module(torch.arange(40)).square().sum().backward()
        optimizer.step()
    plasticity = (1 - importance.to(torch.float64) / levels) ** strength
    expected = start.double() + plasticity * (free.weight.detach().double() - start.double())
    assert torch.allclose(embedding.weight.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-2)
    assert torch.equal(embedding.weight[importance == 0], free.weight[importance == 0])
    assert embedding.weight[3, 0] == start[3, 0]
    held = HeldWeights.of(GatedParameter("weight", embedding.weight, fixed_point, strength), embedding.weight)
    assert held.num_entries == 3 * 6
