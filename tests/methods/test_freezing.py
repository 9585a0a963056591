"""Frozen parameters do not move at all, the others do, and a new task thaws them."""

import pytest
import torch
from helpers import EPOCHS, build, trainer_for, weights
from lightning.pytorch import Callback

from agcl.errors import AgclError
from agcl.methods import HFT, LayerFreezing


class Boundaries(Callback):
    """The weights before training and after each task."""

    def on_train_start(self, trainer, pl_module):
        self.weights = [weights(pl_module.model)]

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self.weights.append(weights(pl_module.model))

    def still(self):
        """For each task the names of the parameters that did not move by a bit."""
        pairs = list(zip(self.weights[:-1], self.weights[1:], strict=True))
        return [{name for name in old if torch.equal(old[name], new[name])} for old, new in pairs]


def fit(folder, files, run_dir, callback, **options):
    model, data = build(folder, files, **options)
    boundaries = Boundaries()
    trainer_for(data, run_dir, [callback, boundaries]).fit(model, datamodule=data)
    return model, boundaries


LLAMA = {
    ("bottom", 1, True): ["embed_tokens", "layers.0."],
    ("bottom", 2, False): ["layers.0.", "layers.1."],
    ("top", 1, True): ["layers.1.", "model.norm"],
    ("top", 1, False): ["layers.1."],
}


@pytest.mark.parametrize("choice", LLAMA)
def test_chosen_layers_stand_still_from_the_second_task_on(llama_folder, task_files, tmp_path, choice):
    side, num_layers, ends = choice
    callback = LayerFreezing(num_layers, side=side, ends=ends)
    model, boundaries = fit(llama_folder, task_files, tmp_path, callback)
    expected = {n for n, _ in model.model.named_parameters() if any(part in n for part in LLAMA[choice])}
    assert boundaries.still() == [set(), expected, expected]
    assert all(parameter.requires_grad for parameter in model.parameters())  # left as it was


def test_regular_expression_from_the_start(gpt2_folder, task_files, tmp_path):
    callback = LayerFreezing(parameters=r"mlp|ln_1", num_free_tasks=0)
    _, boundaries = fit(gpt2_folder, task_files[:2], tmp_path, callback)
    expected = {name for name in boundaries.weights[0] if "mlp" in name or "ln_1" in name}
    assert boundaries.still() == [expected, expected]


def test_learned_position_embeddings_are_embeddings(gpt2_folder, task_files, tmp_path):
    _, boundaries = fit(gpt2_folder, task_files[:2], tmp_path, LayerFreezing(1))
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < boundaries.still()[1]
    assert "transformer.ln_f.weight" not in boundaries.still()[1]


def test_freezing_works_under_gradient_checkpointing(llama_folder, task_files, tmp_path):
    ends = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing}
        _, boundaries = fit(llama_folder, task_files[:2], tmp_path, LayerFreezing(1), **options)
        ends.append(boundaries.weights[-1])
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in ends[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "`num_layers` is 3, but the model has 2 decoder blocks"),
        ({}, "freezes nothing"),
        ({"parameters": "nothing"}, "freezes nothing"),
        ({"parameters": "."}, "freezes every trainable parameter at task `task1`"),
        ({"parameters": "("}, "is not a regular expression"),
        ({"num_layers": -1}, "are numbers >= 0"),
        ({"side": "left"}, "`side` is 'left'"),
    ],
)
def test_useless_choices_are_refused(llama_folder, task_files, tmp_path, options, message):
    with pytest.raises(AgclError, match=message):
        fit(llama_folder, task_files, tmp_path, LayerFreezing(**options))


def category(name):
    return next(key for key in ("attn", "mlp", "layernorm") if key in name)


def test_hft_freezes_another_half_for_each_task(llama_folder, task_files, tmp_path):
    _, boundaries = fit(llama_folder, task_files, tmp_path, HFT())
    names = [name for name in boundaries.weights[0] if "layers" in name]
    assert len(names) == 2 * 9
    halves = boundaries.still()
    for half in halves:
        assert half <= set(names)  # embeddings and final norm learn
        counts = {
            (layer, kind): sum(f"layers.{layer}." in n and category(n) == kind for n in half)
            for layer in (0, 1)
            for kind in ("attn", "mlp", "layernorm")
        }
        assert [counts[layer, "attn"] for layer in (0, 1)] == [2, 2]  # of four
        assert sorted(counts[layer, "mlp"] for layer in (0, 1)) == [1, 2]  # of three: half over both blocks
        assert [counts[layer, "layernorm"] for layer in (0, 1)] == [1, 1]  # of two
    assert halves[0] != halves[1] != halves[2]
    _, again = fit(llama_folder, task_files, tmp_path, HFT())
    assert again.still() == halves
    _, other = fit(llama_folder, task_files[:1], tmp_path, HFT(seed=1))
    assert other.still()[0] != halves[0]


def test_hft_share_and_biases(gpt2_folder, task_files, tmp_path):
    callback = HFT(share=0.25)
    model, data = build(gpt2_folder, task_files[:1])
    trainer_for(data, tmp_path, [callback]).fit(model, datamodule=data)
    trainable = dict(model.model.named_parameters())
    chosen = callback.choose(model.model, trainable, 0)
    # A quarter of two matrices is half a matrix: one of the two blocks freezes one, in each of the three categories.
    assert len({name.rpartition(".")[0] for name in chosen}) == 3
    assert all(name.replace("weight", "bias") in chosen for name in chosen)  # a matrix goes with its bias
    assert all(kind in str(chosen) for kind in ("ln_", "attn", "mlp"))


def test_hft_refusals():
    with pytest.raises(AgclError, match=r"`share` is 1\.0"):
        HFT(share=1.0)
    with pytest.raises(AgclError, match="HFT finds no decoder blocks"):
        HFT().choose(torch.nn.Linear(1, 1), {"weight": torch.nn.Parameter(torch.ones(1))}, 0)


def test_thawed_parameters_start_without_momentum(llama_folder, task_files, tmp_path):
    """Task 0 is learned by the attention alone, task 1 by all: the optimizer's state then covers all."""

    class AttentionFirst(HFT):
        def choose(self, model, trainable, task_index):
            return [] if task_index else [name for name in trainable if "attn" not in name]

    class States(Callback):
        sizes = ()

        def on_train_epoch_end(self, trainer, pl_module):
            self.sizes = (*self.sizes, len(trainer.optimizers[0].state))

    states = States()
    model, data = build(llama_folder, task_files[:2])
    boundaries = Boundaries()
    trainer_for(data, tmp_path, [AttentionFirst(), states, boundaries]).fit(model, datamodule=data)
    num_all = len(list(model.parameters()))
    assert states.sizes == (8,) * EPOCHS + (num_all,) * EPOCHS
    first, second = boundaries.still()
    assert first == {name for name in boundaries.weights[0] if "attn" not in name}
    assert second == set()
