"""Likelihood of ordinary text: against transformers' own loss, and as a part of a run."""

import csv
import json
import math
from functools import partial

import pytest
import torch
from helpers import CrashAt, CrashError, build, by_direction, trainer_for, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.callbacks import ContinualReport, GeneralAbility
from agcl.callbacks.general_ability import window_nll
from agcl.errors import AgclError

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box: five dozen jugs, or six? No. "
NUM_WINDOWS, WINDOW = 5, 24


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4)
    return str(file)


def callback(text_file):
    return GeneralAbility(text_file, num_windows=NUM_WINDOWS, window_tokens=WINDOW, batch_size=2)


def reference(model, folder, text_file):
    """Mean of transformers' loss over the windows, one at a time; all are equally long."""
    with open(text_file) as file:
        ids = AutoTokenizer.from_pretrained(folder)(file.read(), return_tensors="pt")["input_ids"]
    spacing = ids.shape[1] // NUM_WINDOWS
    windows = [ids[:, i * spacing : i * spacing + WINDOW] for i in range(NUM_WINDOWS)]
    with torch.no_grad():
        return sum(model.eval()(input_ids=window, labels=window).loss.item() for window in windows) / NUM_WINDOWS


class CopyAtBoundaries(Callback):
    """The model's state after each task."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self.states.append({name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()})


@pytest.mark.parametrize("regime", ["sequential", "joint"])
def test_it_is_the_loss_of_plain_transformers(gpt2_folder, task_files, tmp_path, text_file, regime):
    """GPT-2 has dropout and learned positions: the mode and the positions must be right too."""
    module, data = build(gpt2_folder, task_files, data_options={"regime": regime})
    copies = CopyAtBoundaries()
    trainer = trainer_for(data, tmp_path, [callback(text_file), copies, ContinualReport(save_model=False)])
    trainer.fit(module, datamodule=data)
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    expected = [reference(model, gpt2_folder, text_file)]
    for state in copies.states:
        model.load_state_dict(state)
        expected.append(reference(model, gpt2_folder, text_file))
    results = json.loads((tmp_path / "scores.json").read_text())["general_ability"]
    assert len(expected) == (4 if regime == "sequential" else 2)
    assert [value for value in results["nll"] if value is not None] == pytest.approx(expected, rel=1e-5)
    assert [value is None for value in results["nll"]] == [False, *[regime == "joint"] * 2, False]
    assert results["forgetting"] == pytest.approx(expected[-1] - expected[0], rel=1e-4)
    assert results["standard_error"] > 0


def test_a_models_own_distribution_bounds_it():
    """Uniform logits over V tokens give log V nats, whatever the text."""

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 7)})

    nll = window_nll(Uniform(), torch.randint(7, (5, 4)), batch_size=2)
    assert nll.tolist() == pytest.approx([math.log(7)] * 5)


def test_forgetting_and_its_standard_error_are_over_the_windows_changes():
    """Changes 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 2."""
    ability = GeneralAbility()
    ability.load_state_dict({"nll": {0: [1.0, 5.0, 2.0], 1: [9.0, 9.0, 9.0], 2: [2.0, 7.0, 8.0]}})
    results = ability.results()["general_ability"]
    assert results["forgetting"] == pytest.approx(3.0)
    assert results["standard_error"] == pytest.approx(math.sqrt(7 / 3))


def test_measuring_leaves_training_as_it_was(gpt2_folder, task_files, tmp_path, text_file):
    states = []
    for callbacks in ([], [callback(text_file)]):
        model, data = build(gpt2_folder, task_files)
        trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)
        states.append(weights(model))
    for name, parameter in states[0].items():
        assert torch.equal(parameter, states[1][name]), name


def test_an_adapter_is_measured_with_its_base(llama_folder, task_files, tmp_path, text_file):
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "lora_dropout": 0.5}
    model, data = build(llama_folder, task_files, adapter=adapter)
    ability = callback(text_file)
    trainer_for(data, tmp_path, [ability]).fit(model, datamodule=data)
    nll = ability.results()["general_ability"]["nll"]
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert nll[0] == pytest.approx(reference(base, llama_folder, text_file), rel=1e-5)  # LoRA starts at zero
    assert nll[-1] == pytest.approx(reference(model.model.merge_and_unload(), llama_folder, text_file), rel=1e-4)


# Task 2 takes steps 6 to 11: inside of it, and from a checkpoint taken after its last step, before scoring.
# A gate that maps the weights before they are scored may stand behind.
@pytest.mark.parametrize(("crash_at", "gates"), [(8, []), (12, []), (12, [partial(by_direction, every=4)])])
def test_a_resumed_run_reports_the_same(llama_folder, task_files, tmp_path, text_file, knowing, crash_at, gates):
    def callbacks():
        return [callback(text_file), *(make() for make in gates)]

    model, data = build(llama_folder, task_files)
    straight = callbacks()
    trainer_for(data, tmp_path, straight).fit(model, datamodule=data)
    model, data = build(llama_folder, task_files)
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{step}", every_n_train_steps=1)
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, [*callbacks(), CrashAt(crash_at), keep], enable_checkpointing=True).fit(
            model, datamodule=data
        )
    model, data = build(llama_folder, task_files)
    resumed = callbacks()
    checkpoint = tmp_path / "checkpoints" / f"step={crash_at}.ckpt"
    trainer_for(data, tmp_path, resumed).fit(model, datamodule=data, ckpt_path=checkpoint)
    assert resumed[0].results() == straight[0].results()


def test_it_is_logged_at_each_scoring(llama_folder, task_files, tmp_path, text_file):
    model, data = build(llama_folder, task_files)
    ability = callback(text_file)
    trainer_for(data, tmp_path, [ability], logger=CSVLogger(tmp_path)).fit(model, datamodule=data)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["general/nll"]]
    nll = ability.results()["general_ability"]["nll"]
    assert [float(row["general/nll"]) for row in rows] == pytest.approx(nll)
    assert [float(row["general/perplexity"]) for row in rows] == pytest.approx([math.exp(value) for value in nll])


def test_bad_options_are_refused_before_training(llama_folder, task_files, tmp_path, text_file):
    with pytest.raises(AgclError, match="`num_windows` is 0; give at least 1"):
        GeneralAbility(num_windows=0)
    with pytest.raises(AgclError, match="`window_tokens` is 1; give at least 2"):
        GeneralAbility(window_tokens=1)
    for ability, message in (
        (GeneralAbility(text_file, num_windows=2, window_tokens=65), "windows of 65 tokens .* context, which has 64"),
        (GeneralAbility(text_file), "The text has 348 tokens, too few for 32 windows of 256"),
        (GeneralAbility("/nowhere.txt"), "The text /nowhere.txt cannot be read"),
    ):
        model, data = build(llama_folder, task_files)
        with pytest.raises(AgclError, match=message):
            trainer_for(data, tmp_path, [ability]).fit(model, datamodule=data)
