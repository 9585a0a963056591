"""`benchmarks/variants.py`: what it puts in place of the package's own fits there and does what its name says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import attribution, build, trainer_for, weights
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from agcl.attribution import directions as directions_module
from agcl.callbacks import Directions
from agcl.callbacks import directions as gate_module

FILE = Path(__file__).parents[2] / "benchmarks" / "variants.py"


@pytest.fixture
def variants(monkeypatch):
    for owner, name in (
        (gate_module.DirectionsSoFar, "learn"),
        (gate_module.DirectionsSoFar, "attach"),
        (gate_module, "find_matrices"),
        (directions_module.MomentSums, "observe"),
        (directions_module.InputMoments, "maps"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that they are put back
    spec = importlib.util.spec_from_file_location("variants", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fit(folder, files, run_dir):
    callback = attribution(directions=Directions(every=2, own_text=4, own_tokens=16))
    model, data = build(folder, files[:2])
    plasticity = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            plasticity.update(callback.plasticity())

    trainer_for(data, run_dir, [callback, Look()]).fit(model, datamodule=data)
    return callback, weights(model.model), plasticity


def test_the_models_own_text_counts_less(variants, llama_folder, task_files, tmp_path, knowing):
    variants.text_counts(0.25)
    callback, _, _ = fit(llama_folder, task_files, tmp_path)
    assert all(moment.trace() == pytest.approx(2.25) for moment in callback._directions.moments.sums.values())


def test_what_is_to_stand_still_stands_still(variants, llama_folder, task_files, tmp_path, knowing):
    variants.stand_still("norm")
    before = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    _, after, _ = fit(llama_folder, task_files, tmp_path)
    stood = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert stood == {name for name in after if "norm" in name}


def test_the_head_is_gated_by_direction(variants, llama_folder, task_files, tmp_path, knowing):
    variants.gate_the_head()
    callback, after, _ = fit(llama_folder, task_files, tmp_path)
    assert {name for name in after if "norm" not in name} == callback._directions.names()


def test_one_threshold_gives_each_matrix_a_budget_of_its_own(variants, llama_folder, task_files, tmp_path, knowing):
    variants.one_threshold()
    callback, _, plasticity = fit(llama_folder, task_files, tmp_path)
    means = [plasticity[name] for name in callback._directions.names()]
    assert max(means) - min(means) > 0.05
    sizes = [len(callback._directions.moments.sums[name]) for name in callback._directions.names()]
    mean = sum(size * p for size, p in zip(sizes, means, strict=True)) / sum(sizes)
    assert mean == pytest.approx(0.8, abs=0.01)


def test_each_variant_and_rival_is_known_to_fit(variants, tmp_path):
    for tasks in variants.TASKS:
        for name in (*variants.VARIANTS, *variants.RIVALS):
            options = variants.options_of([name, "--tasks", tasks, "--data_dir", "DATA"])
            words = variants.arguments(options, tmp_path)
            assert words[::2] == ["--config"] * (len(words) // 2)
            assert all(Path(path).is_file() for path in words[1::2])
