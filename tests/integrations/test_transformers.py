"""The callbacks in Hugging Face's Trainer: one gate per step, nothing left behind, attribution of its own rows."""

from types import SimpleNamespace

import pytest
import torch
from helpers import slow
from integrations_cases import ROWS, load, trainer_for, weights
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import agcl
from agcl.attribution import load_importance, load_input_moments
from agcl.errors import AgclError
from agcl.integrations.transformers import (
    DirectionsGate,
    ImportanceGate,
    TaskDirections,
    TaskImportance,
    training_rows,
)


class InterruptedError(RuntimeError):
    """Stands for a crash in training."""


class Interrupt(TrainerCallback):
    """Raises at the end of the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        raise InterruptedError


class Watch(TrainerCallback):
    """Whether the optimizer inside accelerate's wrapper has a step hook while it trains, and after."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer = optimizer.optimizer
        self.hooks_while_training = len(self.optimizer._optimizer_step_pre_hooks)


def random_importance(model):
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randint(256, p.shape, generator=generator).to(torch.uint8)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_an_accumulated_step_moves_each_weight_by_its_plasticity(llama_folder, tmp_path, kind):
    """Against the ungated twin: two micro-batches, one SGD step, through accelerate's optimizer wrapper."""
    plain, gated = load(llama_folder), load(llama_folder)
    start, importance = weights(plain), random_importance(plain)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    trainer_for(plain, tmp_path, optimizer=sgd).train()
    trainer_for(gated, tmp_path, ImportanceGate(importance, kind=kind), optimizer=sgd).train()
    moved = weights(plain)
    for name, weight in gated.named_parameters():
        plasticity = 1 - importance[name].float() / 255
        expected = start[name] + plasticity * (moved[name] - start[name])
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)
    assert any((moved[name] - start[name]).abs().max() > 1e-3 for name in start)


def effect(moments, start, after):
    """By how much matrices have moved in the directions that the moments weigh, relative to how far they moved."""
    moved = {name: after[name] - start[name] for name in moments.sums}
    parts = [float((moved[n] @ a * moved[n]).sum() / moved[n].square().sum()) for n, a in moments.sums.items()]
    return sum(parts) / len(parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 3},  # two steps pass after the last product
        {"bf16": True},
    ],
    ids=["plain", "every", "bf16"],
)
def test_matrices_hardly_move_in_the_directions_of_an_earlier_task(llama_folder, tmp_path, options):
    path, model = tmp_path / "old.safetensors", load(llama_folder)
    recorder = TaskDirections(path, num_samples=4, only_correct=False)
    trainer_for(model, tmp_path, recorder, max_steps=2).train()
    learned = weights(model)
    moments = load_input_moments(path)
    expected = agcl.compute_input_moments(model, ROWS, num_samples=4, only_correct=False)
    for name, moment in expected.sums.items():
        torch.testing.assert_close(moments.sums[name], moment, rtol=1e-3, atol=1e-5 * float(moment.max()), msg=name)
    moments = moments.normalised()
    every = {"every": options.pop("every", 1)}
    importance = {name: torch.full(p.shape, 255, dtype=torch.uint8) for name, p in model.named_parameters()}
    gate = DirectionsGate(path, importance, plasticity=0.3, **every)
    trainer_for(model, tmp_path, gate, max_steps=5, **options).train()
    plain = load(llama_folder)
    plain.load_state_dict(learned, strict=False)  # the head is tied
    trainer_for(plain, tmp_path, max_steps=5, **options).train()
    assert effect(moments, learned, weights(model)) < 0.05 * effect(moments, learned, weights(plain))
    for name, weight in weights(model).items():
        assert torch.equal(weight, learned[name]) == (name not in moments.sums), name


class Weights(TrainerCallback):
    """What is saved and scored."""

    def __init__(self):
        self.seen = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen["scored"] = weights(model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = weights(model)


def test_what_is_scored_and_saved_has_been_mapped_and_a_resumed_run_goes_on_so(llama_folder, tmp_path):
    model = load(llama_folder)
    start = weights(model)
    moments = agcl.compute_input_moments(model, ROWS, only_correct=False)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    seen = Weights()
    trainer = trainer_for(model, tmp_path, DirectionsGate(moments, every=100, plasticity=0.3), seen, **options)
    trainer.train()
    free = trainer_for(load(llama_folder), tmp_path / "free", max_steps=4)
    free.train()
    held = 0.05 * effect(moments, start, weights(free.model))
    assert all(effect(moments, start, after) < held for after in (*seen.seen.values(), weights(model)))
    resumed = load(llama_folder)
    trainer = trainer_for(resumed, tmp_path, DirectionsGate(moments, every=100, plasticity=0.3), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(model)[name]), name


def test_an_interrupted_run_leaves_nothing_in_weights_loaded_since(llama_folder, tmp_path):
    model = load(llama_folder)
    start = weights(model)
    gate = DirectionsGate(agcl.compute_input_moments(model, ROWS, only_correct=False), every=100)
    trainer = trainer_for(model, tmp_path, gate, Interrupt())
    with pytest.raises(InterruptedError):
        trainer.train()
    model.load_state_dict(start, strict=False)  # the head is tied
    trainer.remove_callback(Interrupt)
    begun = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            begun.update(weights(model))

    trainer.add_callback(Begin())
    trainer.train()
    assert all(torch.equal(begun[name], start[name]) for name in start)


class Rows:
    """A data set that says which of its rows were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        self.read.append(index)
        return ROWS[index % len(ROWS)]


def test_directions_are_found_from_no_more_rows_than_asked_for(llama_folder, tmp_path):
    trainer = trainer_for(load(llama_folder), tmp_path)
    trainer.train_dataset = Rows()
    loader = trainer.get_train_dataloader()
    recorder = TaskDirections(num_samples=3, only_correct=False)
    recorder.on_train_end(None, SimpleNamespace(), None, model=trainer.model, train_dataloader=loader)
    assert recorder.moments.sums
    assert len(trainer.train_dataset.read) == 3


def test_moments_of_several_tasks_count_alike(llama_folder, tmp_path):
    model = load(llama_folder)
    parts = [agcl.compute_input_moments(model, [row], only_correct=False) for row in ROWS[:2]]
    gate = DirectionsGate(parts)
    for name, moment in gate.moments.sums.items():
        assert moment.trace() == pytest.approx(2, rel=1e-4)
        expected = sum(part.sums[name] / part.sums[name].trace() for part in parts)
        torch.testing.assert_close(moment, expected, msg=name)
    interrupted, watch = trainer_for(model, tmp_path, gate, Interrupt()), Watch()
    with pytest.raises(InterruptedError):
        interrupted.train()
    assert gate.plasticity().keys() == gate.moments.sums.keys()
    assert all(0.75 < value < 1 for value in gate.plasticity().values())
    interrupted.remove_callback(Interrupt)
    interrupted.add_callback(watch)
    interrupted.train()
    assert not watch.optimizer._optimizer_step_post_hooks
    assert gate.plasticity() == {}
    with pytest.raises(AgclError, match="DirectionsGate cannot act under DeepSpeed"):
        gate.on_train_begin(SimpleNamespace(deepspeed={}), None, None)
    other = agcl.attribution.InputMoments({"x": torch.eye(2)}, {"x": False})
    with pytest.raises(AgclError, match="no parameter of that name"):
        trainer_for(model, tmp_path, DirectionsGate(other)).train()


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "max_grad_norm": 0.1},
        *slow({}, {"optim": "adafactor"}),
    ],
)
def test_important_weights_stand_still_under_the_trainers_own_optimizers(llama_folder, tmp_path, options):
    model = load(llama_folder)
    start = weights(model)
    importance = {name: torch.zeros(p.shape, dtype=torch.uint8) for name, p in model.named_parameters()}
    for levels in importance.values():
        levels.view(-1)[::2] = 255
    trainer_for(model, tmp_path, ImportanceGate(importance), max_steps=2, weight_decay=0.1, **options).train()
    for name, weight in model.named_parameters():
        moved = (weight.detach() != start[name]).view(-1)
        assert not moved[::2].any(), name
    assert moved[1::2].any()


def test_an_adapter_is_gated_under_its_own_names(llama_folder, tmp_path):
    model = get_peft_model(load(llama_folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = weights(model)
    frozen = {
        name: torch.full(p.shape, 255, dtype=torch.uint8) for name, p in model.named_parameters() if "lora_A" in name
    }
    trainer_for(model, tmp_path, ImportanceGate(frozen), max_steps=2).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), start[name])}
    assert moved == {name for name in start if "lora_B" in name}


def test_the_gate_leaves_no_hook_and_survives_an_interruption(llama_folder, tmp_path):
    model, watch = load(llama_folder), Watch()
    gate = ImportanceGate(random_importance(model))
    trainer = trainer_for(model, tmp_path, gate, watch, Interrupt())
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(Interrupt)
    assert gate.plasticity()
    trainer.train()
    assert watch.hooks_while_training == 1
    assert not watch.optimizer._optimizer_step_pre_hooks
    assert gate.plasticity() == {}


def test_deepspeed_is_refused():
    gate = ImportanceGate({})
    with pytest.raises(AgclError, match="cannot act under DeepSpeed"):
        gate.on_train_begin(SimpleNamespace(deepspeed={}), None, None)


def test_importance_of_a_task_is_that_of_the_model_at_the_end(llama_folder, tmp_path):
    """From the Trainer's rows; neither its random numbers nor its model are touched on the way."""
    path = tmp_path / "task.safetensors"
    plain, model = load(llama_folder), load(llama_folder)
    recorder = TaskImportance(path, "names", num_samples=4, only_correct=False)
    trainer = trainer_for(model, tmp_path, recorder, max_steps=2)
    trainer.train()
    trainer_for(plain, tmp_path, max_steps=2).train()
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(model).values(), strict=True))
    expected = agcl.compute_importance(model, ROWS, num_samples=4, only_correct=False)
    for name, levels in expected.items():
        assert (levels.int() - recorder.importance[name].int()).abs().max() <= 1, name  # another order of the sum
    loaded, metadata = load_importance(path)
    assert all(torch.equal(loaded[name], recorder.importance[name]) for name in loaded)
    assert metadata["task"] == "names"


def test_rows_are_the_data_sets_own_in_a_fixed_order(llama_folder, tmp_path):
    loader = trainer_for(load(llama_folder), tmp_path).get_train_dataloader()
    first, again, other = ([row["input_ids"][0].tolist() for row in training_rows(loader, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == sorted(row["input_ids"] for row in ROWS)


def test_rows_that_attribution_cannot_use_are_refused_before_training(llama_folder, tmp_path):
    model = load(llama_folder)
    start = weights(model)
    trainer = trainer_for(model, tmp_path, TaskImportance())
    trainer.train_dataset = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 4
    with pytest.raises(AgclError, match="none has an answer"):
        trainer.train()
    trainer.pop_callback(TaskImportance)
    trainer.add_callback(TaskDirections())
    with pytest.raises(AgclError, match="none has an answer"):
        trainer.train()
    (tmp_path / "file").write_text("")
    for recorder in (TaskImportance, TaskDirections):
        trainer = trainer_for(model, tmp_path, recorder(save_to=tmp_path / "file" / "task.safetensors"))
        with pytest.raises(AgclError, match=r"task\.safetensors cannot be written \(Not a directory.*choose"):
            trainer.train()
    trainer = trainer_for(model, tmp_path, TaskDirections(parameters="norm"))
    with pytest.raises(AgclError, match="weight matrix of a linear map"):
        trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    for recorder in (TaskImportance, TaskDirections):
        with pytest.raises(AgclError, match="`num_samples` is 0"):
            recorder(num_samples=0)
