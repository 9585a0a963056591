"""Two processes on the CPU: the run ends, and each row is scored once."""

import json
import subprocess
import sys

import pytest
from conftest import write_rows
from helpers import write_config


def run(path, *options):
    command = [sys.executable, "-m", "agcl", "fit", "--config", str(path), "--trainer.enable_progress_bar", "false"]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=200)


def test_two_processes_score_each_row_once(llama_folder, task_files, tmp_path):
    rows = [
        {"prompt": f"{word} 0?", "answer": answer} for word, answer in zip(("ox", "hen", "rat"), "abc", strict=True)
    ]
    odd = write_rows(tmp_path / "odd.jsonl", rows)  # three rows do not divide by two processes
    results = []
    for name, options in (("one", ()), ("two", ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        (tmp_path / name).mkdir()
        callbacks = [
            {"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 2}},
            {"class_path": "agcl.GeneralAbility", "init_args": {"num_windows": 3, "window_tokens": 32}},
        ]
        run(
            write_config(llama_folder, [odd, task_files[1]], tmp_path / name, trainer__callbacks=callbacks),
            *options,
        )
        results.append(json.loads((tmp_path / name / "run" / "version_0" / "scores.json").read_text()))
    one, two = results
    assert two["nll"][0] == pytest.approx(one["nll"][0], rel=1e-5)  # of the untrained model
    assert two["general_ability"]["nll"][0] == pytest.approx(one["general_ability"]["nll"][0], rel=1e-5)
    assert None not in two["general_ability"]["nll"]
    assert all(value is not None for row in two["scores"] for value in row)
