"""Many parabolas in two buffers equal the sum over the tasks, value and gradient, in float64."""

import pytest
import torch

from agcl.methods.quadratic import QuadraticPenalty

STRENGTH = 3.0


def random_tasks(count):
    torch.manual_seed(0)
    fishers = [{"a": torch.rand(4, 3).double() ** 4, "b": torch.rand(5).double()} for _ in range(count)]
    anchors = [{name: torch.randn_like(f) for name, f in fisher.items()} for fisher in fishers]
    for fisher in fishers:
        fisher["a"][0, 0] = 0.0  # a weight that no task has used
    fishers[0]["b"][1] = 0.0  # and one that the first has not
    return fishers, anchors


def written_out(fishers, anchors, parameters, factors):
    terms = [
        factor * (fisher[name] * (parameter - anchor[name]) ** 2).sum() / 2
        for fisher, anchor, factor in zip(fishers, anchors, factors, strict=True)
        for name, parameter in parameters.items()
    ]
    return STRENGTH * sum(terms)


def check(penalty, expected, parameters):
    task_gradients = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    for name, parameter in parameters.items():
        parameter.grad = task_gradients[name].clone()
    value = penalty.add_gradient(parameters, STRENGTH)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        assert torch.allclose(parameter.grad, task_gradients[name] + gradient, rtol=1e-12, atol=1e-12)


def parameters_like(fisher):
    return {name: torch.nn.Parameter(torch.randn_like(values)) for name, values in fisher.items()}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_separate_is_the_sum_over_the_tasks(count):
    fishers, anchors = random_tasks(count)
    penalty = QuadraticPenalty()
    for fisher, anchor in zip(fishers, anchors, strict=True):
        penalty.add({name: values.clone() for name, values in fisher.items()}, anchor)
    parameters = parameters_like(fishers[0])
    check(penalty, written_out(fishers, anchors, parameters, [1.0] * count), parameters)
    assert penalty.num_bytes() == 2 * 8 * 17  # two float64 buffers, however many tasks


def test_online_decays_around_the_latest_weights():
    fishers, anchors = random_tasks(3)
    penalty = QuadraticPenalty()
    for fisher, anchor in zip(fishers, anchors, strict=True):
        penalty.replace({name: values.clone() for name, values in fisher.items()}, anchor, 0.5)
    parameters = parameters_like(fishers[0])
    check(penalty, written_out(fishers, [anchors[-1]] * 3, parameters, [0.25, 0.5, 1.0]), parameters)


def test_tasks_may_reach_different_parameters():
    fishers, anchors = random_tasks(2)
    del fishers[0]["b"]
    separate, online = QuadraticPenalty(), QuadraticPenalty()
    for fisher, anchor in zip(fishers, anchors, strict=True):
        separate.add({name: values.clone() for name, values in fisher.items()}, anchor)
        online.replace({name: values.clone() for name, values in fisher.items()}, anchor, 0.5)
    fishers[0]["b"] = torch.zeros(5).double()
    parameters = parameters_like(fishers[1])
    check(separate, written_out(fishers, anchors, parameters, [1.0, 1.0]), parameters)
    check(online, written_out(fishers, [anchors[1]] * 2, parameters, [0.5, 1.0]), parameters)


def test_parameters_without_gradient_are_drawn_and_frozen_ones_are_not():
    penalty = QuadraticPenalty()
    penalty.add({"free": torch.ones(2), "still": torch.ones(2)}, {"free": torch.zeros(2), "still": torch.zeros(2)})
    free, still = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert penalty.add_gradient({"free": free, "still": still}, 2.0).item() == 4.0
    assert free.grad.tolist() == [2.0, 2.0]
    assert still.grad is None
