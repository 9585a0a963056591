"""The command line as users run it, on tiny models: results of a run, bad input, shipped configurations."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agcl.cli import main

CONFIGS = Path(__file__).parent.parent / "lightning_configs"


def config(folder, files, run_dir, **overrides):
    tasks = [
        {"name": f"task{i}", "source": str(f), "test_split": "train", "epochs": 2} for i, f in enumerate(files)
    ]
    tasks[0]["probes"] = {"first": {"split": "train[:1]"}}
    content = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_checkpointing": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(run_dir), "name": "run"},
            },
            "callbacks": [{"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 2}}],
        },
        "model": {
            "model_name_or_path": str(folder),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
        },
        "data": {"batch_size": 2, "tasks": tasks},
    }
    for path, value in overrides.items():
        *parents, last = path.split("__")
        node = content
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    file = run_dir / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def finished_run(llama_folder, task_files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    tasks = config(llama_folder, task_files, run_dir)
    output = subprocess.run(
        [sys.executable, "-m", "agcl", "fit", "--config", str(tasks)], capture_output=True, text=True, check=True
    )
    return run_dir / "run" / "version_0", output.stdout + output.stderr


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
    for text in ("Task 2/3 task1, epoch 1/2", "Scoring task0 (first)", "Attribution of task2", "backward transfer"):
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
    assert [event.step for event in board.Scalars("eval/task1/exact_match")] == [0, 3, 7, 11]
    assert "score_matrix" in board.Tags()["images"]


BAD = [
    ({"data__tasks__0__source": "/nowhere.jsonl"}, "Task `task0`: the file /nowhere.jsonl does not exist"),
    ({"data__tasks__0__prompt": "{question}"}, "Task `task0`: there is no column `question`"),
    ({"data__tasks__1__test_split": "train[9:]"}, "Task `task1`: split `train[9:]` of"),
    ({"data__tasks__1__name": "task0"}, "Two tasks are named `task0`"),
    ({"data__tasks__1__metric": "label_ranking", "data__tasks__1__labels": ["a"]}, "which is not among `labels` (a)"),
    ({"data__max_length": 5}, "more than the 5 allowed"),
    ({"data__max_length": 5000}, "`max_length` is 5000, but the model's context has 64 tokens"),
    ({"model__model_name_or_path": "/nowhere"}, "could be loaded from `/nowhere`"),
    ({"model__model_name_or_path": "builtin:nothing"}, "There is no built-in model `nothing`"),
    ({"trainer__max_epochs": 3}, "max_epochs"),
    ({"trainer__callbacks__0__init_args__strength": -1.0}, "strength"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line_and_nothing_is_written(
    llama_folder, task_files, tmp_path, overrides, message, capsys, monkeypatch
):
    path = config(llama_folder, task_files, tmp_path, **overrides)
    monkeypatch.setattr(sys, "argv", ["agcl"])
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(path)])
    text = str(exit_info.value.code) if not isinstance(exit_info.value.code, int) else capsys.readouterr().err
    assert message in text
    assert not list(tmp_path.glob("run/*/scores.json"))
    assert not list(tmp_path.glob("run/*/importance"))


def test_unsupported_architecture_is_refused_before_training(task_files, tmp_path, monkeypatch):
    from conftest import character_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=70, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    path = config(folder, task_files, tmp_path)
    monkeypatch.setattr(sys, "argv", ["agcl"])
    with pytest.raises(SystemExit, match="agcl: error: "):
        main(["fit", "--config", str(path)])
    assert not list(tmp_path.glob("run/*/scores.json"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_parse(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(path), "--print_config"])
    assert exit_info.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert len(printed["data"]["tasks"]) >= 4
