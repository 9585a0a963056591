"""Importance and gate in a plain loop, against a reference by hand."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import agcl
from agcl.attribution import Sample, load_importance, merge, save_importance
from agcl.attribution.rows import samples_of
from agcl.errors import AgclError

ROWS = [
    {"input_ids": [5, 6, 7, 8, 1], "labels": [-100, -100, 7, 8, 1]},
    {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
    {"input_ids": [12, 13, 14, 15], "labels": [-100, 13, 14, 15]},
]


@pytest.fixture
def model(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder)


def batch(rows, side="right"):
    def padded(values, value):
        return pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=value, padding_side=side)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 1),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_importance_is_the_mean_absolute_relevance_over_itself_plus_its_quantile(model):
    """The default settings, written out with the public `parameter_relevance`."""
    computed = agcl.compute_importance(model, ROWS, only_correct=False)
    total: dict = {}
    for row in ROWS:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        answer = [place for place, label in enumerate(labels.tolist()) if label != -100]
        relevance = agcl.parameter_relevance(
            model, ids[None], positions=torch.tensor(answer) - 1, targets=ids[torch.tensor(answer)]
        )
        for name, values in relevance.items():
            total[name] = total.get(name, 0) + values.abs().double() / len(ROWS)
    assert computed.keys() == total.keys()
    for name, score in total.items():
        ordered = score[score > 0].sort().values
        quantile = ordered[int(torch.ceil(torch.tensor(0.9 * len(ordered)) - 1e-9)) - 1]
        expected = 255 * score / (score + quantile)
        assert (computed[name] - expected).abs().max() <= 0.5 + 1e-3, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_may_come_in_padded_batches(model, side):
    rows = agcl.compute_importance(model, ROWS, only_correct=False, batch_size=2)
    batches = agcl.compute_importance(model, [batch(ROWS[:2], side), batch(ROWS[2:], side)], only_correct=False)
    for name, levels in rows.items():
        assert (levels.int() - batches[name].int()).abs().max() <= 1, name  # rounding


def test_a_first_token_and_a_row_without_labels_are_predicted_by_nothing():
    rows = [{"input_ids": [3, 4], "labels": [3, -100]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    (sample,) = samples_of([*rows])
    assert sample.positions.tolist() == [0]
    assert sample.targets.tolist() == [4]
    assert next(samples_of([sample])) is sample


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 4]}, "needs `input_ids` and `labels`"),
        ([3, 4], "has list"),
        ({"input_ids": [3, 4, 3, 4], "labels": [3, 4, 3, 4], "position_ids": [0, 1, 0, 1]}, "before packing"),
        ({"input_ids": [3, 4], "labels": [3, 4], "seq_lengths": [1, 1]}, "before packing"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message):
    with pytest.raises(AgclError, match=message):
        next(samples_of([row]))


def test_samples_used_are_those_answered_correctly(model):
    """One row is made right by asking for what the model predicts."""
    ids = torch.tensor([5, 6, 7])
    predicted = model(ids[None]).logits[0, -1].argmax()
    right = Sample(ids, torch.tensor([2]), predicted[None])
    both = agcl.compute_importance(model, [*ROWS, right])
    alone = agcl.compute_importance(model, [right], only_correct=False)
    assert equal(both, alone)
    with pytest.raises(AgclError, match="No row is answered correctly"):
        agcl.compute_importance(model, ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"bits": 4}, "`bits` is 4"),
        ({"parameters": "("}, "not a regular expression"),
        ({"parameters": "nothing"}, "matches no trainable parameter"),
    ],
)
def test_options_that_cannot_be_used_are_named(model, options, message):
    with pytest.raises(AgclError, match=message):
        agcl.compute_importance(model, ROWS, **options)


def test_a_file_gates_as_the_importance_it_was_saved_from(model, tmp_path):
    path = tmp_path / "welsh.safetensors"
    computed = agcl.compute_importance(model, ROWS, only_correct=False, bits=16, save_to=path)
    loaded, metadata = load_importance(path)
    assert equal(loaded, computed)
    assert (metadata["task"], metadata["num_samples"], metadata["estimator"]) == ("welsh", "3", "LRP")
    optimizer = torch.optim.AdamW(model.parameters())
    with agcl.gate(optimizer, model, computed) as gate:
        expected = gate.plasticity()
    with agcl.gate(optimizer, model, str(path)) as gate:
        assert gate.plasticity() == expected


def test_of_several_tasks_the_largest_importance_counts(model, tmp_path):
    first = agcl.compute_importance(model, ROWS[:1], only_correct=False)
    second = agcl.compute_importance(model, ROWS[1:], only_correct=False)
    save_importance(tmp_path / "first.safetensors", first, {})
    optimizer = torch.optim.AdamW(model.parameters())
    with agcl.gate(optimizer, model, [tmp_path / "first.safetensors", second]) as gate:
        plasticity = gate.plasticity()
    with agcl.gate(optimizer, model, dict(merge([first, second]))) as gate:
        assert plasticity == gate.plasticity()


def test_importance_of_another_model_is_refused(model, gpt2_folder, tmp_path):
    path = tmp_path / "a.safetensors"
    agcl.compute_importance(model, ROWS, only_correct=False, save_to=path)
    other = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    with pytest.raises(AgclError, match="no such parameter; it was made for the model"):
        agcl.gate(torch.optim.AdamW(other.parameters()), other, path)


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2, bias=False).double()


IMPORTANCE = {"weight": torch.tensor([[0, 51, 255], [102, 204, 0]], dtype=torch.uint8)}
PLASTICITY = 1 - IMPORTANCE["weight"].double() / 255


@pytest.mark.parametrize("kind", ["gradient", "update"])
@pytest.mark.parametrize("wrapper", ["plain", "accelerated", "scaled"])
def test_a_step_is_scaled_once_through_wrappers_and_accumulation(kind, wrapper):
    """Two micro-batches and one step of SGD in closed form: W - lr * plasticity * (g1 + g2)."""
    model, old = linear(), linear().weight.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Accelerator(cpu=True)  # the wrapper asks for its state
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if wrapper == "scaled" else None
    outer = optimizer if wrapper == "plain" else AcceleratedOptimizer(optimizer, scaler=scaler)
    data = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    gradient = sum(torch.ones(5, 2).double().T @ rows for rows in data)
    with agcl.gate(outer, model, IMPORTANCE, kind=kind):
        for rows in data:
            loss = model(rows).sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
        outer.step()
    torch.testing.assert_close(model.weight.detach(), old - 0.1 * PLASTICITY * gradient, rtol=1e-12, atol=1e-12)
    assert not optimizer._optimizer_step_pre_hooks
    assert not model.weight._backward_hooks


def test_the_kind_follows_the_optimizer_inside():
    model = linear()
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(agcl.gate(optimizer, model, IMPORTANCE), agcl.GradientGate)
    assert isinstance(agcl.gate(torch.optim.AdamW(model.parameters()), model, IMPORTANCE), agcl.UpdateGate)
    with pytest.warns(UserWarning, match="protects nothing under AdamW"):
        agcl.gate(torch.optim.AdamW(model.parameters()), model, IMPORTANCE, kind="gradient")
    with pytest.raises(AgclError, match="`kind` is 'step'"):
        agcl.gate(optimizer, model, IMPORTANCE, kind="step")
