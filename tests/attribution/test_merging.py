"""Merges against exact arithmetic on fractions of levels, in float64."""

import itertools

import numpy as np
import pytest
import torch

from agcl.attribution import levels as levels_module
from agcl.attribution.artefact import LazyImportance, load_importance, open_importance, save_importance
from agcl.attribution.merging import MAX_MEAN_TASKS, RunningMerge, merge
from agcl.errors import AgclError

HOWS = ["maximum", "mean", "probabilistic_or"]
SHAPES = {"matrix": (40, 25), "vector": (9,), "scalar": (), "nothing": (0, 3)}
DTYPES = {8: torch.uint8, 16: torch.uint16}
LARGEST = {8: 255, 16: 65535}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(levels_module, "CHUNK", 64)  # and a ragged one


def task(seed, bits=8, skip=()):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        # Small levels, and 0 and 1 among them, so that products neither vanish nor saturate at once.
        values = (torch.rand(shape, generator=generator) ** 4 * (LARGEST[bits] + 0.9)).long()
        values[torch.rand(shape, generator=generator) < 0.1] = 0
        found[name] = values.to(DTYPES[bits])
    return {name: values for name, values in found.items() if name not in skip}


def values_of(levels):
    bits = 8 if levels.dtype == torch.uint8 else 16
    return levels.numpy().astype(np.float64) / LARGEST[bits]


def exact(tasks, how):
    """In float64; a parameter that a task lacks is 0 there."""
    found = {}
    for name in sorted({name for one in tasks for name in one}):
        shape = next(one[name].shape for one in tasks if name in one)
        stack = np.stack([values_of(one[name]) if name in one else np.zeros(shape) for one in tasks])
        found[name] = {
            "maximum": lambda s: s.max(0),
            "mean": lambda s: s.mean(0),
            "probabilistic_or": lambda s: 1 - np.prod(1 - s, axis=0),
        }[how](stack)
    return found


def bound(how, num_tasks, bits):
    """As the module's docstring says, with room for float64."""
    step = 1 / (2 * LARGEST[bits])
    if how == "maximum":
        return 1e-12
    if how == "mean":
        return step + 1e-12
    return num_tasks / 131070 + (step if bits == 8 else 0) + 1e-12


def running(tasks, how, bits=8):
    merged = RunningMerge(how, bits)
    for one in tasks:
        merged.update(one)
    return merged


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 60])
def test_merge_is_within_its_bound_of_exact_arithmetic(how, bits, num_tasks):
    tasks = [task(seed, bits, skip=["vector"] if seed % 3 == 2 else ()) for seed in range(num_tasks)]
    merged = merge(tasks, how)
    expected = exact(tasks, how)
    assert merged.bits == bits
    assert merged.keys() == expected.keys()
    for name, levels in merged.items():
        assert levels.dtype == DTYPES[bits]
        assert levels.shape == merged.shapes[name] == expected[name].shape
        error = np.abs(values_of(levels) - expected[name])
        assert error.max(initial=0) <= bound(how, num_tasks, bits)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("result_bits", [8, 16])
def test_files_of_8_and_of_16_bits_merge(how, result_bits):
    tasks = [task(0, 8), task(1, 16), task(2, 8)]
    assert merge(tasks, how).bits == 16
    expected = exact(tasks, how)
    for name, levels in merge(tasks, how, bits=result_bits).items():
        assert levels.dtype == DTYPES[result_bits]
        step = 1 / (2 * LARGEST[result_bits])  # 16 bits of a maximum are rounded to 8
        error = np.abs(values_of(levels) - expected[name])
        assert error.max(initial=0) <= bound(how, 3, result_bits) + (step if how == "maximum" else 0)


@pytest.mark.parametrize("how", ["maximum", "mean"])
def test_order_of_the_tasks_does_not_matter(how):
    tasks = [task(seed) for seed in range(4)]
    expected = dict(merge(tasks, how))
    for order in itertools.permutations(tasks):
        assert_same(dict(merge(order, how)), expected)
        assert_same(running(order, how).importance(), expected)


def test_order_matters_to_the_probabilistic_or_by_rounding_alone():
    tasks = [task(seed, 16) for seed in range(4)]
    orders = [dict(merge(order, "probabilistic_or")) for order in itertools.permutations(tasks)]
    for name in SHAPES:
        stack = np.stack([values_of(merged[name]) for merged in orders])
        assert (stack.max(0) - stack.min(0)).max(initial=0) <= 2 * 4 / 131070


@pytest.mark.parametrize("bits", [8, 16])
def test_maximum_is_idempotent_and_so_is_the_mean_of_equals(bits):
    one, two = task(0, bits), task(1, bits)
    once = dict(merge([one, two]))
    assert_same(dict(merge([once, one, two, once])), once)
    for how in ("maximum", "mean"):
        assert_same(dict(merge([one] * 5, how)), one)


@pytest.mark.parametrize("how", HOWS)
def test_one_task_is_itself(how):
    for bits in (8, 16):
        assert_same(dict(merge([task(0, bits)], how)), task(0, bits))
    assert_same(running([task(0)], how).importance(), task(0))


@pytest.mark.parametrize("how", HOWS)
def test_zero_stays_zero_and_one_wins(how):
    zero, one = ({"w": torch.full((3,), level, dtype=torch.uint8)} for level in (0, 255))
    assert merge([zero] * 9, how)["w"].tolist() == [0] * 3
    assert merge([zero, one, zero], how)["w"].tolist() == ([85] * 3 if how == "mean" else [255] * 3)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("num_tasks", [1, 2, 9])
def test_running_and_streaming_form_agree(how, num_tasks):
    tasks = [task(seed, skip=["scalar"] if seed == 0 else ["vector"] if seed == 1 else ()) for seed in range(num_tasks)]
    assert_same(running(tasks, how).importance(), dict(merge(tasks, how)))


@pytest.mark.parametrize("how", HOWS)
def test_running_merge_of_16_bits(how):
    tasks = [task(seed, bits=16, skip=["scalar"] if seed == 0 else ()) for seed in range(4)]
    merged = running(tasks, how, bits=16)
    assert_same(merged.importance(), dict(merge(tasks, how)))
    widths = {state.element_size() for state in merged.state_dict()["state"].values()}
    assert widths == {4 if how == "mean" else 2}
    with pytest.raises(AgclError, match="takes importance of 16 bits, not of 8"):
        merged.update(task(0))
    with pytest.raises(AgclError, match="was merged in 16 bits, not in 8"):
        RunningMerge(how).load_state_dict(merged.state_dict())


@pytest.mark.parametrize("how", HOWS)
def test_running_merge_takes_in_files(how, tmp_path):
    tasks = [task(seed) for seed in range(3)]
    for index, one in enumerate(tasks):
        save_importance(tmp_path / f"{index}.safetensors", one, {})
    from_files = running([open_importance(tmp_path / f"{index}.safetensors") for index in range(3)], how)
    assert_same(from_files.importance(), running(tasks, how).importance())


@pytest.mark.parametrize("how", HOWS)
def test_running_merge_keeps_small_state_and_leaves_its_input_alone(how):
    tasks = [task(seed) for seed in range(3)]
    merged = running(tasks, how)
    merged.update({name: values.clone() for name, values in tasks[0].items()})
    for seed, one in enumerate(tasks):
        assert_same(one, task(seed))
    dtypes = {state.dtype for state in merged.state_dict()["state"].values()}
    assert dtypes == {torch.uint8 if how == "maximum" else torch.uint16}


@pytest.mark.parametrize("how", HOWS)
def test_running_merge_goes_on_after_a_checkpoint(how, tmp_path):
    tasks = [task(seed) for seed in range(4)]
    before = running(tasks[:2], how)
    torch.save(before.state_dict(), tmp_path / "checkpoint.pt")
    resumed = RunningMerge(how)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for one in tasks[2:]:
        resumed.update(one)
    assert_same(resumed.importance(), running(tasks, how).importance())
    assert resumed.num_tasks == 4
    beside = RunningMerge(how)
    beside.load_state_dict(before.state_dict())
    beside.update(tasks[2])
    assert before.num_tasks == 2
    assert_same(before.importance(), running(tasks[:2], how).importance())


def test_state_of_another_merge_is_refused():
    with pytest.raises(AgclError, match="was merged by `mean`, not by `maximum`"):
        RunningMerge("maximum").load_state_dict(running([task(0)], "mean").state_dict())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(2).to(torch.uint16)])
def test_running_merge_refuses_before_it_changes_anything(how, wrong):
    merged = running([{"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(2, dtype=torch.uint8)}], how)
    before = {name: state.clone() for name, state in merged.state_dict()["state"].items()}
    with pytest.raises(AgclError, match=r"`b`|8 bits"):
        merged.update({"a": torch.ones(1, dtype=torch.uint8), "b": wrong})
    assert_same(merged.state_dict()["state"], before)
    assert merged.num_tasks == 1


def test_running_mean_is_exact_up_to_257_tasks_and_then_refuses():
    one = {"w": torch.tensor([0, 1, 254, 255], dtype=torch.uint8)}
    merged = RunningMerge("mean")
    for _ in range(MAX_MEAN_TASKS[8]):
        merged.update(one)
    assert merged.importance()["w"].tolist() == [0, 1, 254, 255]
    with pytest.raises(AgclError, match="over at most 257 tasks"):
        merged.update(one)
    assert merged.importance()["w"].tolist() == [0, 1, 254, 255]


@pytest.mark.parametrize("bits", [8, 16])
def test_streaming_mean_has_no_such_limit(bits):
    one = {"w": torch.tensor([0, 1, LARGEST[bits]]).to(DTYPES[bits])}
    assert_same(dict(merge([one] * 300, "mean")), one)


def test_nothing_and_nonsense_are_refused():
    with pytest.raises(AgclError, match="nothing to merge"):
        merge([])
    for make in (RunningMerge, lambda how: merge([task(0)], how)):
        with pytest.raises(AgclError, match="`how` is 'sum'; choose one of 'maximum', 'mean', 'probabilistic_or'"):
            make("sum")
    with pytest.raises(AgclError, match=r"`w` has shape \(3,\), in an earlier task \(2,\)"):
        merge([{"w": torch.zeros(n, dtype=torch.uint8)} for n in (2, 3)])
    with pytest.raises(AgclError, match=r"`w` is torch\.float32"):
        merge([{"w": torch.zeros(2)}])
    with pytest.raises(KeyError):
        merge([task(0)])["other"]


@pytest.mark.parametrize("how", HOWS)
def test_files_are_merged_a_tensor_at_a_time(how, tmp_path):
    tasks = [task(seed, skip=["scalar"] if seed else ()) for seed in range(3)]
    for index, one in enumerate(tasks):
        save_importance(tmp_path / f"{index}.safetensors", one, {"task": str(index)}, max_shard_bytes=100)
    asked = []

    class Noted(LazyImportance):
        def __init__(self, file):
            self.file, self.shapes, self.bits = file, file.shapes, file.bits

        def __getitem__(self, name):
            asked.append(name)
            return self.file[name]

    merged = merge([Noted(open_importance(tmp_path / f"{index}.safetensors")) for index in range(3)], how)
    assert merged.partial == ["scalar"]
    assert asked == []
    save_importance(tmp_path / "merged.safetensors", merged, {})
    assert asked == sorted(asked)
    assert len(asked) == 3 * len(SHAPES) - 2  # each once
    assert_same(load_importance(tmp_path / "merged.safetensors")[0], dict(merge(tasks, how)))
