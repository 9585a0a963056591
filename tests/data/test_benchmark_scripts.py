"""The scripts that rewrite published benchmark data, on made-up rows in the published layout."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from agcl.data.sources import in_folder, load_rows
from agcl.data.tasks import Task

ROOT = Path(__file__).parents[2]
FACTS = """(Slow Ships, IsA, Ship, Or Boat)
Q1: What are Slow Ships?
A1: ship
Q2: What kind of thing is a Slow Ship?
Q2: ship

(Slow Ships, UsedFor, Cargo)
Q1: What are Slow Ships for?
A1: cargo
Q2: Why are there Slow Ships?
Q2: freight
(Glass Roads, MadeOf, Glass)
Q1: What are Glass Roads made of?
A1: glass
(Tall Trees, HasA, Crown)
Q1: What do Tall Trees have?
A1: crown
Q2: What is on top of Tall Trees?
Q2: crown
(New Things, IsA, Thing)
Q1: What are New Things?
A1: thing
Q2: How are New Things classified?
Q2: thing
"""
LAST = {"concept": "New Things", "relation": "IsA", "question": "What are New Things?", "answer": "thing"}


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script as if from the command line, and return what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def configured(name):
    return yaml.safe_load((ROOT / "lightning_configs" / "data" / f"{name}.yaml").read_text())["data"]["tasks"]


def read_rows(file):
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]


def rows_of(task, split, folder, columns):
    return load_rows(in_folder(Task(**task), str(folder)), split, columns).to_list()


def test_concept1k_from_the_published_layout(tmp_path, run_script):
    for folder, file, text in (
        ("concept_1k", "dataset.txt", FACTS),
        (
            "concept_1k_task10",
            "continual_config.json",
            json.dumps({"CONCEPT_LIST": ["Tall Trees", "Slow Ships"], "CONCEPT_2_TASK": [0, 1]}),
        ),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    output = run_script("convert_concept1k.py", tmp_path, tmp_path / "data" / "concept_1k.jsonl.gz")
    assert "3 facts in" in output
    assert "left out: 2" in output
    tasks = configured("concept1k_reduced")
    assert rows_of({**tasks[1], "probes": {}}, "train", tmp_path / "data", ["question", "answer"]) == [
        {
            "concept": "Slow Ships",
            "relation": "IsA",
            "question": "What are Slow Ships?",
            "answer": "ship",
            "rephrased_question": "What kind of thing is a Slow Ship?",
            "task": 1,
        }
    ]
    (whole,) = configured("concept1k_1")
    rows = rows_of({**whole, "probes": {}}, "train", tmp_path / "data", ["question", "answer"])
    assert [row["task"] for row in rows] == [1, 0, None]
    assert rows[-1] == {**LAST, "rephrased_question": "How are New Things classified?", "task": None}


@pytest.mark.parametrize(("name", "prompt", "answer"), [("trace", "prompt", "answer"), ("long", "sentence", "label")])
def test_reduced_files_from_the_published_ones(name, prompt, answer, tmp_path, run_script):
    """30 training rows, each twice, one of them without an answer; of 12 test rows two are training rows."""
    labels = {task["name"]: (task.get("labels") or ["one", "two"])[:2] for task in configured(name)}
    for task in configured(name):
        train = [{prompt: f"{task['name']} {i}", answer: labels[task["name"]][i % 2]} for i in range(30)]
        test = [{prompt: f"{task['name']} {i}", answer: labels[task["name"]][i % 2]} for i in range(28, 40)]
        train[3] = {prompt: f"{task['name']} 3", answer: " "}
        for split, rows in (("train", train * 2), ("test", test)):
            path = tmp_path / "published" / task["source"][split]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    data = tmp_path / "data"
    run_script("compact_benchmark.py", name, tmp_path / "published", data, "--train_rows", 20)
    for task in configured(f"{name}_reduced"):
        columns = ("prompt", "answer") if name == "trace" else ("text", "label")
        train, test = (read_rows(data / task["source"][split]) for split in ("train", "test"))
        numbers = [int(row[columns[0]].split()[1]) for row in train]
        assert len(set(numbers)) == len(numbers) == 20
        assert 3 not in numbers
        assert numbers != sorted(numbers)
        assert {int(row[columns[0]].split()[1]) for row in test} == set(range(30, 40))
        for row in [*train, *test]:
            task_name, number = row[columns[0]].split()
            assert (task_name, row[columns[1]]) == (task["name"], labels[task["name"]][int(number) % 2])
