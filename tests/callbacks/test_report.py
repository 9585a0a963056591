import io
import json

import pytest
from helpers import build, trainer_for
from lightning.pytorch import Callback
from rich.console import Console

from agcl.answers import Answer, AnswerRecord
from agcl.callbacks import ContinualReport
from agcl.callbacks.report import result_tables


class Keeper(Callback):
    """Keeps more with each task, and lets go of it at the end of training."""

    num_bytes = 0

    def extra_bytes(self):
        return self.num_bytes

    def on_train_epoch_end(self, trainer, pl_module):
        self.num_bytes += 1000

    def on_train_end(self, trainer, pl_module):
        self.num_bytes = 0


class FreezeEmbedding(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.model.get_input_embeddings().weight.requires_grad_(False)


class LookForFiles(Callback):
    def __init__(self, folder):
        self.folder, self.found = folder, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append(sorted(file.name for file in self.folder.glob("score*")))


def test_a_report_forgets_an_earlier_run(llama_folder, task_files, tmp_path):
    report = ContinualReport(save_model=False)
    for name, callbacks in (("kept", [Keeper()]), ("plain", [])):
        model, data = build(llama_folder, task_files[:1], task_options={"epochs": 1})
        trainer_for(data, tmp_path / name, [*callbacks, report]).fit(model, datamodule=data)
    extra = [
        json.loads((tmp_path / n / "scores.json").read_text())["extra_bytes_per_weight"] for n in ("kept", "plain")
    ]
    assert extra[0] > 0
    assert extra[1] == 0


@pytest.mark.parametrize("keepers", [0, 2])
def test_results_say_what_the_run_cost_and_are_drawn_at_the_end(llama_folder, task_files, tmp_path, keepers):
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    look = LookForFiles(tmp_path)
    callbacks = [FreezeEmbedding(), *(Keeper() for _ in range(keepers)), ContinualReport(save_model=False), look]
    trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)
    results = json.loads((tmp_path / "scores.json").read_text())
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    assert results["extra_bytes_per_weight"] == keepers * 2000 / weights
    assert results["trainable_weights"] == weights - model.model.get_input_embeddings().weight.numel()
    assert look.found == [["scores.csv", "scores.json"]] * 2  # drawing takes long: it is done once, at the end
    assert (tmp_path / "score_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert results["seed"] == 0
    assert 0 < results["processor_seconds"] < 3600
    assert 2**24 < results["peak_memory_bytes"] < 2**36


def test_answers_are_kept_at_each_scoring(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 2})
    trainer_for(data, tmp_path, [ContinualReport(save_model=False)]).fit(model, datamodule=data)
    results = json.loads((tmp_path / "scores.json").read_text())
    answers = json.loads((tmp_path / "answers.json").read_text())
    for index, task in enumerate(("task0", "task1")):
        assert [row["prompt"] for row in answers[task]] == [f"{key} {index}?" for key in ("cat", "dog", "owl", "eel")]
        for row in answers[task]:
            assert [entry["after"] for entry in row["answers"]] == [0, 1, 2]
            assert all((entry["given"] == row["right"]) == entry["score"] for entry in row["answers"])
        for after in range(3):  # all four rows are kept: their mean is the task's score
            scores = [row["answers"][after]["score"] for row in answers[task]]
            assert sum(scores) / 4 == pytest.approx(results["scores"][after][index])


def test_no_more_answers_are_kept_than_asked(llama_folder, task_files, tmp_path):
    for number in (3, 0):
        model, data = build(llama_folder, task_files[:1], task_options={"epochs": 1})
        folder = tmp_path / str(number)
        trainer_for(data, folder, [ContinualReport(False, num_answers=number)]).fit(model, datamodule=data)
        assert len(model.answers.as_dict().get("task0", [])) == number
        assert (folder / "answers.json").exists() == (number > 0)


def test_long_texts_are_cut():
    record = AnswerRecord()
    record.enter("task", 0, [Answer("p" * 10_000, "right", "g" * 10_000, 0.0)])
    assert len(json.dumps(record.as_dict())) < 2000


def test_a_scoring_that_is_done_again_replaces_the_former():
    record = AnswerRecord()
    for given in ("once", "again"):
        record.enter("task", 1, [Answer("prompt", "right", given, 0.0)])
    record.enter("task", 0, [Answer("prompt", "right", "before", 0.0)])
    (row,) = record.as_dict()["task"]
    assert [(entry["after"], entry["given"]) for entry in row["answers"]] == [(0, "before"), (1, "again")]


def test_scores_of_fifteen_tasks_fit_into_a_terminal():
    tasks = [f"some_dataset_{i}" for i in range(15)]
    scores = [[0.0] * 15] + [[1.0 if column <= row else 0.07 for column in range(15)] for row in range(15)]
    results = {"tasks": tasks, "regime": "sequential", "scores": scores, "metrics": {}}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_tables(results)[0])
    lines = console.export_text().splitlines()
    last = next(line for line in lines if line.startswith("15 some_dataset_14"))
    assert last.split()[2:] == ["100"] * 15
    assert next(line for line in lines if line.startswith("1 some_dataset_0")).split()[2:] == ["100"] + ["7"] * 14
