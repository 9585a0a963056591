"""What the display says, on a terminal and in a log file, and the time that it says is left."""

import re

import pytest
from helpers import attribution, build, trainer_for
from lightning.pytorch import Callback

from agcl.callbacks import TaskProgressBar, progress
from agcl.data.tasks import Probe
from agcl.errors import AgclError


class Clock(Callback):
    """Each batch takes ten seconds."""

    now = 1000.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 10

    def monotonic(self):
        return self.now


def shown(llama_folder, files, folder, capsys, monkeypatch, callbacks=(), **options):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock.monotonic)
    task_options = {"epochs": 2, "probes": {"first": Probe(split="train[:1]")}}
    model, data = build(llama_folder, files, task_options=task_options)
    bars = [clock, TaskProgressBar(**options), *callbacks]
    trainer_for(data, folder, bars, enable_progress_bar=True).fit(model, datamodule=data)
    return capsys.readouterr().err


def test_lines_in_a_log_file(llama_folder, task_files, tmp_path, capsys, monkeypatch):
    text = shown(llama_folder, task_files[:2], tmp_path, capsys, monkeypatch, seconds_between_lines=1e9)
    lines = [line for line in text.splitlines() if line.startswith(("Task", "Scoring"))]
    # Two tasks of two epochs of two batches. After four batches, with the fifth begun: 50 s for 4, so 50 s for 4 more.
    assert lines[:2] == ["Scoring task0: 1 batches", "Task 1/2 task0, epoch 1/2, batch 0/8"]
    assert re.fullmatch(r"Task 2/2 task1, epoch 1/2, batch 4/8, 0:00:50 left, loss [\d.]+", lines[2])
    assert len(lines) == 3


def test_lines_come_now_and_then(llama_folder, task_files, tmp_path, capsys, monkeypatch):
    text = shown(llama_folder, task_files[:2], tmp_path, capsys, monkeypatch, seconds_between_lines=20)
    batches = [int(found) for found in re.findall(r"batch (\d+)/8", text)]
    assert batches == [0, 2, 4, 6]


def test_bars_on_a_terminal(llama_folder, task_files, tmp_path, capsys, monkeypatch, knowing):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    text = shown(llama_folder, task_files[:2], tmp_path, capsys, monkeypatch, [attribution()], refresh_rate=1000)
    for part in (
        "Task 2/2 task1, epoch 2/2",
        "Attribution of task0",
        "Scoring task0 (first)",
        "left, loss",
        "8/8 batches",
    ):
        assert part in text


def test_nothing_is_shown_when_disabled(llama_folder, task_files, tmp_path, capsys, monkeypatch):
    assert "Task 1/1" not in shown(llama_folder, task_files[:1], tmp_path, capsys, monkeypatch, refresh_rate=0)


@pytest.mark.parametrize("option", ["refresh_rate", "seconds_between_lines"])
def test_negative_times_are_refused(option):
    with pytest.raises(AgclError, match=f"`{option}` is -1"):
        TaskProgressBar(**{option: -1})
