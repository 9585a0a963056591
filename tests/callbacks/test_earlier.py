"""AttributionCallback with `earlier`: what a run that has ended learned is protected in another one."""

from functools import partial

import pytest
import torch
from helpers import (
    CrashAt,
    CrashError,
    WeightsAtBoundaries,
    assert_resumes,
    attribution,
    build,
    by_direction,
    trainer_for,
    write_config,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.attribution.artefact import load_importance
from agcl.callbacks import AttributionCallback, ContinualReport
from agcl.callbacks.earlier import read_earlier
from agcl.checking.checking import CheckOptions, check
from agcl.checking.configuration import LenientConfiguration
from agcl.errors import AgclError
from agcl.scoring import answer_logits

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
ROWS = 8  # more than a task has: one batch an epoch, in which the order of the rows makes no difference


def fit(folder, files, run_dir, callback, *others, batch_size=ROWS, **options):
    model, data = build(folder, files, batch_size=batch_size, **options)
    saving = ModelCheckpoint(run_dir / "checkpoints", filename="last", every_n_epochs=1)
    callbacks = [callback, *others, ContinualReport(), saving]
    trainer_for(data, run_dir, callbacks, enable_checkpointing=True).fit(model, datamodule=data)
    return model


@pytest.mark.parametrize(
    "make", [attribution, partial(by_direction, own_text=3, every=2)], ids=["entries", "directions"]
)
def test_two_runs_learn_what_one_does(llama_folder, task_files, tmp_path, knowing, make):
    boundaries = WeightsAtBoundaries()
    fit(llama_folder, task_files[:3], tmp_path / "straight", make(), boundaries)
    _, second, third = boundaries.weights
    fit(llama_folder, task_files[:1], tmp_path / "first", make())
    rest = WeightsAtBoundaries()
    callback = make(earlier=str(tmp_path / "first"))
    fit(tmp_path / "first" / "model", task_files[1:3], tmp_path / "rest", callback, rest)
    forgetful = WeightsAtBoundaries()
    fit(tmp_path / "first" / "model", task_files[1:2], tmp_path / "forgetful", attribution(), forgetful)
    assert list(callback.files) == ["task0", "task1"]  # its own
    for expected, found in ((second, rest.weights[0]), (third, rest.weights[1])):
        for name, parameter in expected.items():
            # Sums in another order: a level of importance may round the other way.
            assert torch.allclose(parameter, found[name], atol=1e-3), name
    assert max(float((forgetful.weights[0][name] - second[name]).abs().max()) for name in second) > 1e-2


def test_check_tells_what_is_left_by_it_and_whether_it_is_there(llama_folder, task_files, tmp_path, knowing):
    fit(llama_folder, task_files[:1], tmp_path / "first", attribution())

    def checked(run):
        options = {"earlier": str(tmp_path / run), "directions": None}
        callbacks = [{"class_path": "agcl.AttributionCallback", "init_args": options}]
        path = write_config(tmp_path / "first" / "model", task_files[1:], tmp_path, trainer__callbacks=callbacks)
        return check(LenientConfiguration(["--config", str(path)], prog="", description="", options=CheckOptions))

    found = checked("first")
    assert not found.problems
    assert not found.notes
    importance, _ = load_importance(tmp_path / "first" / "importance" / "00_task0.safetensors")
    levels = torch.cat([levels.flatten() for levels in importance.values()])
    for each in found.tasks:  # nothing is known of what the one before leaves
        assert each.earlier == ["task0"]
        mean = sum(m * n for m, n in each.plasticity.values()) / sum(n for _, n in each.plasticity.values())
        assert mean == pytest.approx(float(1 - levels.double().mean() / 255))
    (problem,) = checked("second").problems
    assert "second does not exist" in problem


def test_check_tells_the_budget_of_an_adapter_after_a_model_trained_whole(llama_folder, task_files, tmp_path, knowing):
    fit(llama_folder, task_files[:1], tmp_path / "first", by_direction())
    options = {"earlier": str(tmp_path / "first"), "directions": {"plasticity": 0.7}}
    callbacks = [{"class_path": "agcl.AttributionCallback", "init_args": options}]
    place = tmp_path / "first" / "model"
    path = write_config(place, task_files[1:], tmp_path, trainer__callbacks=callbacks, model__adapter=LORA)
    found = check(LenientConfiguration(["--config", str(path)], prog="", description="", options=CheckOptions))
    assert not found.problems
    for each in found.tasks:
        assert each.earlier == ["task0"]
        assert 0.7 < min(mean for mean, _ in each.plasticity.values()) < 1  # the second of a pair is free


def merged(base, run_dir, folder):
    """What a user makes of an adapter."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_dir / "model")
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", [LORA, None], ids=["an adapter", "the whole model"])
def test_an_adapter_holds_what_the_first_run_has_learned(llama_folder, task_files, tmp_path, knowing, first):
    make = partial(by_direction, 0.2)
    fit(llama_folder, task_files[:2], tmp_path / "first", make(), adapter=first)
    if first is None:
        base = tmp_path / "first" / "model"
    else:
        base = merged(llama_folder, tmp_path / "first", tmp_path / "merged")
    _, data = build(base, task_files[:1], batch_size=ROWS)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))

    def answers(model):
        return answer_logits(model.eval(), batch)[0].detach()

    before = answers(AutoModelForCausalLM.from_pretrained(base))
    change = {}
    for name, callback in (
        ("held", make(earlier=str(tmp_path / "first" / "checkpoints" / "last.ckpt"))),
        ("free", make()),
    ):
        model = fit(base, task_files[2:3], tmp_path / name, callback, adapter=LORA)
        change[name] = float((answers(model.model) - before).square().mean())
    assert change["held"] < 0.5 * change["free"]


def test_an_adapter_is_to_be_merged_first(llama_folder, task_files, tmp_path, knowing):
    fit(llama_folder, task_files[:1], tmp_path / "first", by_direction(), adapter=LORA)
    callback = by_direction(earlier=str(tmp_path / "first"))
    with pytest.raises(AgclError, match="has learned an adapter, which this model is without: merge it"):
        fit(llama_folder, task_files[1:2], tmp_path / "unmerged", callback, adapter=LORA)
    with pytest.raises(AgclError, match=r"does not know what embeddings .*train an adapter again \(`model.adapter`\)"):
        fit(merged(llama_folder, tmp_path / "first", tmp_path / "merged"), task_files[1:2], tmp_path / "w", callback)


@pytest.mark.parametrize("make", [attribution, partial(by_direction, every=4)], ids=["entries", "directions"])
def test_resumed_run_equals_the_straight_one(llama_folder, task_files, tmp_path, knowing, make):
    fit(llama_folder, task_files[:1], tmp_path / "first", make())
    start, make = tmp_path / "first" / "model", partial(make, earlier=str(tmp_path / "first"))
    assert_resumes(start, task_files[1:2], tmp_path, make, crash_at=2)


@pytest.fixture
def first(llama_folder, task_files, tmp_path, knowing):
    """A run by direction that has learned one task."""
    fit(llama_folder, task_files[:1], tmp_path / "first", by_direction())
    return tmp_path / "first"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": None}, r"last.ckpt is of a run with `directions`; keep to it"),
        ({"merge": "mean"}, "was merged by `maximum`, not by `mean`"),
        ({"importance_bits": 16}, "was merged in 8 bits, not in 16"),
    ],
)
def test_another_kind_of_gate_is_refused(first, task_files, tmp_path, options, message):
    make = attribution if "directions" in options else by_direction
    with pytest.raises(AgclError, match=message):
        fit(first / "model", task_files[1:2], tmp_path / "next", make(earlier=str(first), **options))


def test_another_model_is_refused(first, llama_folder, task_files, tmp_path):
    with pytest.raises(AgclError, match="ended with other weights than this model has: set `model_name_or_path` to"):
        fit(llama_folder, task_files[1:2], tmp_path / "next", by_direction(earlier=str(first)))
    rounded = AutoModelForCausalLM.from_pretrained(first / "model").to(torch.bfloat16).float()
    rounded.save_pretrained(first / "model")  # still the same
    fit(first / "model", task_files[1:2], tmp_path / "next", by_direction(earlier=str(first)))


def test_what_is_no_run_is_refused_before_the_model_is_loaded(llama_folder, task_files, tmp_path, knowing, monkeypatch):
    fit(llama_folder, task_files[:1], tmp_path / "plain", Callback())
    for name, step in (("begun", 2), ("beyond", 8)):  # of six a task
        model, data = build(llama_folder, task_files[:2])
        saving = ModelCheckpoint(tmp_path / name, filename="last", every_n_train_steps=1)
        trainer = trainer_for(data, tmp_path, [attribution(), CrashAt(step), saving], enable_checkpointing=True)
        with pytest.raises(CrashError):
            trainer.fit(model, datamodule=data)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("agcl.module.load_model", None)
    for name, message in (
        ("empty", "there is no whole checkpoint in .*empty"),
        ("plain", "is of a run without an AttributionCallback"),
        ("begun", "had not learned a task yet"),
        ("beyond", "has begun to learn `task1`, of which it has no importance yet"),
        ("absent", "absent does not exist"),
    ):
        with pytest.raises(AgclError, match=message):
            fit(llama_folder, task_files[:1], tmp_path / "next", attribution(earlier=str(tmp_path / name)))
    with pytest.raises(AgclError, match="`reestimate` makes the merge anew"):
        attribution(earlier="run", reestimate=2)


class Gated(AttributionCallback):
    """As users derive their own."""


def test_a_callback_of_another_name_is_known_by_what_it_keeps(llama_folder, task_files, tmp_path, knowing):
    fit(llama_folder, task_files[:1], tmp_path / "first", Gated(num_samples=2))
    assert read_earlier(tmp_path / "first").tasks == ["task0"]
