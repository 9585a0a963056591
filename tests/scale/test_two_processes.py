"""DDP and FSDP2 in two processes on the CPU give what one process gives."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model, write_rows
from helpers import attribution, build, trainer_for, weights, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from two_processes import LORA

from agcl.attribution.artefact import load_importance
from agcl.callbacks import Directions
from agcl.cli import main


def write_odd_config(folder, task_file, run_dir, **options):
    """A configuration whose first task has three rows, which do not divide by two processes."""
    run_dir.mkdir()
    rows = zip(("ox", "hen", "rat"), "abc", strict=True)
    odd = write_rows(run_dir / "odd.jsonl", [{"prompt": f"{word} 0?", "answer": answer} for word, answer in rows])
    callbacks = [
        {"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 2}},
        {"class_path": "agcl.GeneralAbility", "init_args": {"num_windows": 3, "window_tokens": 32}},
    ]
    epochs = {f"data__tasks__{index}__epochs": 2 for index in range(2)}
    options = {"trainer__callbacks": callbacks, "trainer__enable_progress_bar": False, **epochs, **options}
    return write_config(folder, [odd, task_file], run_dir, **options)


def run_in_two_processes(runs, out, *arguments):
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AGCL_ALLOW_IMPORTS": "helpers"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), str(script.parents[2])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), runs]
    finished = subprocess.run(
        [*launch, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    said = [line for line in finished.stderr.splitlines() if "[rank" in line or "error: " in line]
    assert finished.returncode == 0, "\n".join(said)
    return {file.stem: torch.load(file) for file in out.glob("*.pt")}


@pytest.fixture(scope="module")
def two_processes(llama_folder, task_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return run_in_two_processes("straight", out, llama_folder, out, *task_files)


@pytest.fixture(scope="module")
def other_runs(llama_folder, task_files, tmp_path_factory):
    """Runs that are stopped and go on, and runs of the command line."""
    out = tmp_path_factory.mktemp("others")
    save_tiny_model(out / "gpt2", "gpt2")  # which has dropout
    on_two = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    write_odd_config(llama_folder, task_files[1], out / "odd", **on_two)
    strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    write_config(
        llama_folder,
        task_files[:1],
        out,
        data__tasks__0__epochs=1,
        trainer__devices=2,
        trainer__strategy={**strategy, "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1}},
        trainer__enable_progress_bar=False,
        trainer__callbacks=[{"class_path": "helpers.SaveWhole", "init_args": {"path": str(out / "fitted.pt")}}],
    )
    return {"folder": out, **run_in_two_processes("other", out, llama_folder, out, *task_files)}


def run_alone(folder, files, out, adapter=None, **options):
    optimizer = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
    model, data = build(folder, files, batch_size=4, optimizer=optimizer, adapter=adapter)
    callback = attribution(num_samples=3, **options)
    trainer_for(data, out, [callback]).fit(model, datamodule=data)
    return model, callback


@pytest.fixture
def one_process(llama_folder, task_files, tmp_path, knowing):
    model, callback = run_alone(llama_folder, task_files, tmp_path)
    return {"weights": weights(model.model), "scores": model.score_matrices["score"].compute(), "files": callback.files}


def test_importance_gate_and_scores_are_those_of_one_process(one_process, two_processes):
    for name in ("ddp", "fsdp"):
        found = two_processes[name]
        assert torch.equal(found["scores"], one_process["scores"]), name
        assert list(found["files"]) == list(one_process["files"])
        for task, file in one_process["files"].items():
            expected, metadata = load_importance(file)
            importance, other = load_importance(found["files"][task])
            assert other["num_samples"] == metadata["num_samples"] == "3"
            for parameter, levels in expected.items():
                # Sums in another order: a level may round the other way, and the weights learned are not the same bits.
                difference = (levels.int() - importance[parameter].int()).abs()
                assert difference.max() <= 2, (name, task, parameter)
                assert (difference > 0).float().mean() < 0.02, (name, task, parameter)
        # Three tasks, two of them gated: a gate that was left out or off by rows would move weights by some 0.01.
        for parameter, expected in one_process["weights"].items():
            assert torch.allclose(found["weights"][parameter], expected, atol=1e-3), (name, parameter)


@pytest.mark.parametrize(("run", "adapter"), [("directions", None), ("pairs", LORA)])
def test_directions_under_ddp_are_those_of_one_process(
    llama_folder, task_files, tmp_path, knowing, two_processes, run, adapter
):
    model, _ = run_alone(llama_folder, task_files, tmp_path, adapter, directions=Directions(0.8, every=2))
    found = two_processes[run]["weights"]
    assert found.keys() == weights(model.model).keys()
    for name, expected in weights(model.model).items():
        assert torch.allclose(found[name], expected, atol=1e-3), name


def test_importance_is_split_as_the_weights_are(two_processes):
    for shape, num_entries in two_processes["fsdp"]["kept"].values():
        rows, width = shape[0], torch.Size(shape[1:]).numel()
        assert num_entries == -(-rows // 2) * width
    for shape, num_entries in two_processes["ddp"]["kept"].values():
        assert num_entries == torch.Size(shape).numel()


@pytest.mark.slow
@pytest.mark.parametrize(("straight", "resumed"), [("fsdp", "stopped"), ("dropout.straight", "dropout")])
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_from_there(
    two_processes, other_runs, straight, resumed
):
    """Split, from the importance files; with dropout, from each process's own random numbers."""
    straight, resumed = {**two_processes, **other_runs}[straight], other_runs[resumed]
    assert torch.equal(resumed["scores"], straight["scores"])
    for parameter, expected in straight["weights"].items():
        assert torch.equal(resumed["weights"][parameter], expected), parameter


@pytest.mark.slow
def test_agcl_fit_saves_a_split_model_whole(other_runs, llama_folder):
    folder = other_runs["folder"] / "run" / "version_0" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other_runs["fitted"][name]), name
    assert load_file(folder / "model.safetensors").keys() == load_file(llama_folder / "model.safetensors").keys()


@pytest.fixture
def odd_rows_alone(llama_folder, task_files, tmp_path, monkeypatch):
    """What one process makes of rows that do not divide by two."""
    monkeypatch.setattr(sys, "argv", ["agcl"])
    main(["fit", "--config", str(write_odd_config(llama_folder, task_files[1], tmp_path / "one"))])
    return results_in(tmp_path / "one")


def results_in(run_dir):
    return json.loads((run_dir / "run" / "version_0" / "scores.json").read_text())


def assert_each_row_was_scored_once(two, one):
    assert two["nll"][0] == pytest.approx(one["nll"][0], rel=1e-5)  # of the untrained model
    for probe, before in one["probes"].items():  # one of a single row among them
        assert two["probes"][probe][0][0] == pytest.approx(before[0][0], rel=1e-5)
    assert two["general_ability"]["nll"][0] == pytest.approx(one["general_ability"]["nll"][0], rel=1e-5)
    assert None not in two["general_ability"]["nll"]
    assert all(value is not None for row in two["scores"] for value in row)


@pytest.mark.slow
def test_each_row_is_scored_once(other_runs, odd_rows_alone):
    assert_each_row_was_scored_once(results_in(other_runs["folder"] / "odd"), odd_rows_alone)


@pytest.mark.slow
def test_agcl_fit_starts_the_second_process_itself(llama_folder, task_files, tmp_path, odd_rows_alone):
    config = write_odd_config(llama_folder, task_files[1], tmp_path / "two")
    command = [sys.executable, "-m", "agcl", "fit", "--config", str(config)]
    strategy = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    subprocess.run([*command, *strategy], check=True, capture_output=True, timeout=200)
    assert_each_row_was_scored_once(results_in(tmp_path / "two"), odd_rows_alone)
