"""The command line as users run it, on tiny models: results of a run, bad input, shipped configurations."""

import csv
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import printed_config, write_config
from jsonargparse import Namespace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agcl import lightning_cli
from agcl.cli import main

CONFIGS = Path(__file__).parent.parent / "lightning_configs"


def test_run_leaves_results(finished_run):
    folder, _ = finished_run
    results = json.loads((folder / "scores.json").read_text())
    assert results["tasks"] == ["task0", "task1", "task2"]
    assert len(results["scores"]) == 4
    assert results["metrics"].keys() == {
        "average_performance",
        "backward_transfer",
        "forgetting",
        "forward_transfer",
        "learning_accuracy",
    }
    assert [row[1:] for row in results["probes"]["score/first"]] == [[None, None]] * 4
    rows = list(csv.reader((folder / "scores.csv").open()))
    assert rows[0] == ["after", "task0", "task1", "task2"]
    assert [[float(v) for v in row[1:]] for row in rows[1:]] == results["scores"]
    assert (folder / "score_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "config.json").is_file()


def test_display_names_tasks_and_metrics(finished_run):
    _, output = finished_run
    for text in ("Task 2/3 task1, epoch 1/30", "left, loss", "backward transfer"):
        assert text in output


def test_tensorboard_holds_scalars_pictures_and_histograms(finished_run):
    folder, _ = finished_run
    board = EventAccumulator(str(folder)).Reload()
    scalars = set(board.Tags()["scalars"])
    assert {
        "train/task0/loss",
        "train/task2/learning_rate",
        "eval/task1/exact_match",
        "eval/task1/nll",
        "eval/task0/first/exact_match",
        "transfer/average_performance",
        "transfer/backward_transfer",
    } <= scalars
    assert [event.step for event in board.Scalars("eval/task1/exact_match")] == [0, 59, 119, 179]
    assert "score_matrix" in board.Tags()["images"]


def run_in_process(monkeypatch, folder, files, run_dir, **overrides):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    path = write_config(folder, files, run_dir, trainer__callbacks=[], **overrides)
    main(["fit", "--config", str(path)])
    return json.loads((run_dir / "run" / "version_0" / "scores.json").read_text())


def test_one_batch_is_not_all_of_them(llama_folder, task_files, tmp_path, capsys):
    config = write_config(llama_folder, task_files[:1], tmp_path, trainer__limit_train_batches=1)
    for words, value in (([], "1"), (["--trainer.limit_train_batches", "1.0"], "1.0")):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(config), *words, "--print_config"])
        assert f"\n  limit_train_batches: {value}\n" in capsys.readouterr().out


def test_a_trial_run_leaves_nothing(llama_folder, task_files, tmp_path, monkeypatch):
    config = write_config(llama_folder, task_files[:2], tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if "temporary" not in path.parts)
    main(["fit", "--config", str(config), "--trainer.fast_dev_run", "true"])
    assert sorted(path for path in tmp_path.rglob("*") if "temporary" not in path.parts) == before


def test_the_number_of_epochs_is_the_tasks(llama_folder, task_files, tmp_path):
    config = write_config(llama_folder, task_files[:1], tmp_path)
    for command in ("fit", "check"):
        with pytest.raises(SystemExit, match=r"`trainer\.max_epochs` follows from the tasks: set the `epochs` of each"):
            main([command, "--config", str(config), "--trainer.max_epochs", "3"])


def test_joint_training_from_the_command_line(llama_folder, task_files, tmp_path, monkeypatch, capsys):
    epochs = {f"data__tasks__{index}__epochs": index + 1 for index in range(3)}
    results = run_in_process(monkeypatch, llama_folder, task_files, tmp_path, data__regime="joint", **epochs)
    assert [None in row for row in results["scores"]] == [False, True, True, False]
    output = "".join(capsys.readouterr())
    assert "3 tasks together, epoch 1/3" in output
    assert "undefined" in output
    board = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert "train/joint/loss" in board.Tags()["scalars"]


def test_data_options_from_the_command_line(llama_folder, task_files, tmp_path, monkeypatch):
    epochs = {f"data__tasks__{index}__epochs": 1 for index in range(3)}
    results = run_in_process(
        monkeypatch,
        llama_folder,
        task_files,
        tmp_path,
        data__order=["task1", "task2", "task0"],
        data__replay={"share": 0.5, "buffer_size": 2},
        data__evaluate_on="validation",
        **{f"data__tasks__{index}__validation_split": "train[:2]" for index in range(3)},
        **epochs,
    )
    assert results["tasks"] == ["task1", "task2", "task0"]


def test_unsupported_architecture_is_refused_before_training(task_files, tmp_path, monkeypatch):
    from conftest import character_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=70, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    path = write_config(folder, task_files, tmp_path)
    monkeypatch.setattr(sys, "argv", ["agcl"])
    with pytest.raises(SystemExit, match="agcl: error: "):
        main(["fit", "--config", str(path)])
    assert not list(tmp_path.glob("run/*/scores.json"))


QUICKSTART = CONFIGS / "quickstart.yaml"


# The benchmarks' are tested in test_benchmark_configs.py.
RUNS = sorted([*CONFIGS.glob("quickstart*.yaml"), *CONFIGS.glob("method/*.yaml")])


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_configurations_parse(path):
    quickstart = printed_config(QUICKSTART)
    assert len(quickstart["data"]["tasks"]) >= 4
    if path != QUICKSTART:  # the others are laid over it
        assert printed_config(QUICKSTART, path) != quickstart


def test_the_overlay_of_agcl_is_the_quick_starts():
    quickstart = printed_config(QUICKSTART)
    overlay = printed_config(QUICKSTART, CONFIGS / "method" / "agcl.yaml")
    assert overlay["trainer"]["callbacks"] == quickstart["trainer"]["callbacks"][:1]


def test_the_gradient_gates_sgd_has_nothing_of_adamw():
    overlay = printed_config(QUICKSTART, CONFIGS / "method" / "agcl_gradient_sgd.yaml")
    assert overlay["model"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert overlay["model"]["optimizer"]["init_args"]["weight_decay"] == 0.0


def test_the_twin_differs_in_the_callbacks_alone():
    quickstart = printed_config(QUICKSTART)
    twin = printed_config(QUICKSTART, CONFIGS / "quickstart_sequential.yaml")
    for part in ("model", "data", "seed_everything"):
        assert quickstart[part] == twin[part]
    different = {name for name, value in quickstart["trainer"].items() if value != twin["trainer"][name]}
    assert different == {"callbacks", "logger"}
    assert twin["trainer"]["callbacks"] == []


@pytest.mark.parametrize(("bfloat16_seconds", "expected"), [(0.5, "bf16-mixed"), (0.9, "32-true"), (5.0, "32-true")])
def test_precision_is_the_clearly_faster_one(monkeypatch, bfloat16_seconds, expected):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(lightning_cli, "_product_seconds", seconds.__getitem__)
    assert lightning_cli.choose_precision("cpu") == expected
    assert lightning_cli.choose_precision("cpu", is_alone=False) == "32-true"  # other processes may find other times


@pytest.mark.parametrize(
    ("num_nodes", "devices", "is_alone"),
    [(1, "auto", True), (1, 1, True), (1, "2", False), (1, 2, False), (2, 1, False), (1, [0, 1], False)],
)
def test_several_processes_do_not_time_their_precision(num_nodes, devices, is_alone):
    assert lightning_cli._is_alone(Namespace(num_nodes=num_nodes, devices=devices)) == is_alone


def test_products_are_timed():
    assert 0 < lightning_cli._product_seconds(torch.float32) < 10


def test_extra_callbacks_stay_under_an_overlay(llama_folder, task_files, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    options = {"source": str(text), "num_windows": 3, "window_tokens": 20}
    base = write_config(
        llama_folder,
        task_files[:1],
        tmp_path,
        data__tasks__0__epochs=1,
        extra_callbacks=[{"class_path": "agcl.GeneralAbility", "init_args": options}],
    )
    monkeypatch.setattr(sys, "argv", ["agcl"])
    single = tmp_path / "single.yaml"  # a callback in place of a list
    single.write_text("trainer: {callbacks: {class_path: lightning.pytorch.callbacks.RichModelSummary}}")
    main(["fit", "--config", str(base), "--config", str(single)])
    folder = tmp_path / "run" / "version_0"
    ability = json.loads((folder / "scores.json").read_text())["general_ability"]
    assert ability["forgetting"] == pytest.approx(ability["nll"][1] - ability["nll"][0])
    saved = yaml.safe_load((folder / "config.yaml").read_text())  # it tells the same run again
    assert saved["trainer"]["callbacks"]["class_path"].endswith("RichModelSummary")
    assert saved["extra_callbacks"][0]["class_path"].endswith("GeneralAbility")
