"""LoRA adapters of other trainers, gated by the directions of the inputs of the weights beside them."""

import pytest
import torch
from integrations_cases import ROWS, load, trainer_for, weights
from peft import LoraConfig, get_peft_model

import agcl
from agcl.attribution import load_input_moments
from agcl.errors import AgclError
from agcl.integrations.transformers import DirectionsGate, TaskDirections

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def adapted(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{**LORA.to_dict(), **options}))


def closed(moments):
    """Maps that hold the inputs' most important half, wholly."""
    maps = {}
    for name, moment in moments.sums.items():
        directions = torch.linalg.eigh(moment).eigenvectors
        maps[name] = directions[:, len(directions) // 2 :], False
    return maps


def answers(model):
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    return model(ids).logits.detach()


def test_a_fresh_pair_tells_the_moments_of_the_weights_beside_it(llama_folder):
    expected = agcl.compute_input_moments(load(llama_folder), ROWS, only_correct=False).normalised().sums
    found = agcl.compute_input_moments(adapted(load(llama_folder)), ROWS, only_correct=False).normalised().sums
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-5, msg=name)


def test_a_fresh_pair_is_turned_away_from_what_is_held_and_stays_so(llama_folder):
    model = adapted(load(llama_folder))
    moments = agcl.compute_input_moments(model, ROWS, only_correct=False)
    base = closed(moments)
    maps = agcl.maps_for_adapter(model, base)
    assert len(maps) == len(base) == 14
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with agcl.DirectionalGate(model.named_parameters(), maps).attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            answers_now = model(torch.tensor([row["input_ids"] for row in ROWS])).logits
            answers_now.square().mean().backward()
            optimizer.step()
    parameters = dict(model.named_parameters())
    for name, (held, is_transposed) in maps.items():
        assert not is_transposed
        assert (parameters[name] @ held).abs().max() < 1e-5
        assert parameters[name].abs().max() > 1e-2
        assert parameters[name.replace("lora_A", "lora_B")].abs().max() > 1e-2


def test_a_resumed_pair_is_left_as_it_is(llama_folder):
    model = adapted(load(llama_folder))
    maps = closed(agcl.compute_input_moments(model, ROWS, only_correct=False))
    before = weights(model)
    agcl.maps_for_adapter(model, maps, begins=False)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_weights_that_are_trained_beside_an_adapter_keep_their_maps(llama_folder):
    model = adapted(load(llama_folder), target_modules=["q_proj"], modules_to_save=["up_proj"])
    moments = agcl.compute_input_moments(model, ROWS, only_correct=False)
    assert {name.split(".")[-2] for name in moments.sums} == {"q_proj", "up_proj"}
    maps = agcl.maps_for_adapter(
        model, closed(agcl.compute_input_moments(load(llama_folder), ROWS, only_correct=False))
    )
    kinds = {name.split(".self_attn.")[-1].split(".mlp.")[-1] for name in maps}
    assert kinds == {"q_proj.lora_A.default.weight", "up_proj.modules_to_save.default.weight"}


def test_the_trainer_holds_what_an_adapter_merged_since_has_learned(llama_folder, tmp_path):
    """With Adam and a few steps: what the old rows are answered changes less where the new pairs are gated."""
    model, path = adapted(load(llama_folder)), tmp_path / "old.safetensors"
    options = {"max_steps": 6, "learning_rate": 0.02}
    trainer_for(model, tmp_path, TaskDirections(path, num_samples=4, only_correct=False), **options).train()
    assert not any("lora" in name or "base_" in name for name in load_input_moments(path).sums)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    before, change = answers(merged.eval()), {}
    for name, callbacks in (("held", [DirectionsGate(path, plasticity=0.3, every=2)]), ("free", [])):
        new = adapted(load(tmp_path / "merged"))
        rows = [{"input_ids": [21, 22, 23, 24], "labels": [-100, 30, 31, 32]}] * 4
        trainer_for(new, tmp_path / name, *callbacks, rows=rows, **options).train()
        change[name] = float((answers(new.eval()) - before).square().mean())
    assert change["held"] < 0.3 * change["free"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda load: (adapted(load()), {"x.weight": (torch.eye(2), False)}), "another model: `x.weight` is not in it"),
        (lambda load: (adapted(load(), target_modules=["q_proj"]), {}), "No map is of weights that are trained"),
        (lambda load: (adapted(load(), target_modules=["embed_tokens"]), {}), "takes in an embedding"),
    ],
    ids=["another model", "no map", "embedding"],
)
def test_what_cannot_be_gated_is_refused(llama_folder, make, message):
    model, maps = make(lambda: load(llama_folder))
    with pytest.raises(AgclError, match=message):
        agcl.maps_for_adapter(model, maps)


def test_an_adapter_that_has_learned_is_to_be_merged_first(llama_folder, tmp_path):
    model = adapted(load(llama_folder))
    moments = agcl.compute_input_moments(model, ROWS, only_correct=False)
    trainer_for(model, tmp_path).train()
    with pytest.raises(AgclError, match=r"has learned already .*merge it \(`model = model.merge_and_unload\(\)`\)"):
        trainer_for(model, tmp_path, DirectionsGate(moments)).train()


def test_a_resumed_run_of_an_adapter_ends_like_the_straight_one(llama_folder, tmp_path):
    moments = agcl.compute_input_moments(load(llama_folder), ROWS, only_correct=False)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, resumed = adapted(load(llama_folder)), adapted(load(llama_folder))
    trainer_for(straight, tmp_path, DirectionsGate(moments, plasticity=0.3), **options).train()
    trainer = trainer_for(resumed, tmp_path, DirectionsGate(moments, plasticity=0.3), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_moments_of_an_adapter_are_turned_as_the_weights_beside_it(gpt2_folder):
    whole = agcl.compute_input_moments(load(gpt2_folder), ROWS, only_correct=False)
    adapter = get_peft_model(load(gpt2_folder), LoraConfig(**{**LORA.to_dict(), "fan_in_fan_out": True}))
    found = agcl.compute_input_moments(adapter, ROWS, only_correct=False)
    assert found.transposed == whole.transposed
    assert set(found.transposed.values()) == {True}
    maps = agcl.maps_for_adapter(adapter, closed(found))
    assert not any(is_transposed for _, is_transposed in maps.values())


def test_an_adapter_beside_a_frozen_one(llama_folder, tmp_path):
    """On quantised weights nothing can be merged: the old adapter stays, active, and the new one alone is gated."""
    model = adapted(load(llama_folder))
    moments = agcl.compute_input_moments(model, ROWS, only_correct=False)
    trainer_for(model, tmp_path).train()
    model.add_adapter("next", LoraConfig(**LORA.to_dict()))
    model.base_model.set_adapter(["default", "next"])
    with pytest.raises(AgclError, match="have several adapters that are trained"):
        agcl.maps_for_adapter(model, closed(moments))
    model.set_requires_grad("default", requires_grad=False)
    before = weights(model)
    trainer_for(model, tmp_path, DirectionsGate(moments, plasticity=0.3)).train()
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".next." in name for name in moved)
    trainer = trainer_for(model, tmp_path, DirectionsGate(moments), save_strategy="steps", save_steps=1, max_steps=1)
    with pytest.raises(AgclError, match="has learned already"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "`adapter.use_dora` leaves magnitudes"),
        ({"bias": "lora_only"}, "`adapter.bias: lora_only` leaves biases"),
        ({"init_lora_weights": "olora"}, "`adapter.init_lora_weights: olora` cannot be drawn anew"),
    ],
)
def test_kinds_of_adapters_that_leave_something_free_are_refused(llama_folder, options, message):
    moments = agcl.compute_input_moments(load(llama_folder), ROWS, only_correct=False)
    with pytest.raises(AgclError, match=message):
        agcl.maps_for_adapter(adapted(load(llama_folder), **options), closed(moments))


def test_pairs_that_nothing_is_known_of_are_told(llama_folder):
    moments = agcl.compute_input_moments(
        adapted(load(llama_folder), target_modules=["q_proj"]), ROWS, only_correct=False
    )
    with pytest.warns(UserWarning, match="12 of 14 pairs are not gated: there is no map of `model.layers.0"):
        agcl.maps_for_adapter(adapted(load(llama_folder)), closed(moments))
