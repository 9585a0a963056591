"""`agcl init`: the configuration that it writes, and that a run takes it as it stands."""

import json
import sys

import pytest
import yaml
from conftest import write_rows

from agcl.cli import main
from agcl.commands.init import init
from agcl.errors import AgclError

AWKWARD = 'a "b" #c: {d}\\ \u2028é'


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "my data"
    (data / "pets").mkdir(parents=True)
    rows = [{"text": f"animal {i}", "kind": "yes" if i % 2 else "no", "note": AWKWARD} for i in range(8)]
    write_rows(data / "pets" / "train.jsonl", rows)
    write_rows(data / "pets" / "test.jsonl", rows[:4])
    write_rows(data / "2024.jsonl", [{"question": f"q {i}?", "answer": f"a{i}", "odd: # name\n": i} for i in range(4)])
    write_rows(data / "broken.jsonl", [{"only": "one"}])
    return data


def test_the_written_configuration_runs_as_it_stands(folder, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agcl"])
    main(["init", "my data", "--output", "mine.yaml", "--model_name_or_path", str(llama_folder)])
    output = capsys.readouterr().out
    for text in ("Task 2 of 2: pets", "answer: few distinct values", "no (6), yes (6)", "Left out. Task `broken`"):
        assert text in output
    main(["fit", "--config", "mine.yaml", "--trainer.enable_progress_bar", "false"])
    run = tmp_path / "runs" / "my data" / "version_0"
    assert list(run.glob("checkpoints/*.ckpt"))
    results = json.loads((run / "scores.json").read_text())
    assert results["tasks"] == ["2024", "pets"]
    assert all(0 <= score <= 1 for row in results["scores"] for score in row)


def test_what_is_written_says_what_was_guessed(folder, tmp_path):
    path = tmp_path / "new" / "mine.yaml"
    init(folder, output=path)
    text = path.read_text()
    data = yaml.safe_load(text)["data"]
    assert data["data_dir"] == str(folder)
    facts, pets = data["tasks"]
    assert (facts["name"], facts["source"], facts["prompt"]) == ("2024", "2024.jsonl", "{question}")
    assert (facts["train_split"], facts["test_split"], facts["metric"]) == ("train[:3]", "train[3:]", "exact_match")
    assert pets["source"] == {"train": "pets/train.jsonl", "test": "pets/test.jsonl"}
    assert "chat_template" not in data
    assert (pets["prompt"], pets["answer"], pets["labels"]) == ("{text}\nKind:", " {kind}", ["no", "yes"])
    assert "# odd: # name: left out (rename it: no plain word)" in text
    assert "# note: left out (the same in every row)" in text


def test_a_column_of_chats_is_named_and_the_template_switched_on(folder, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(folder / "chats.jsonl", [{"turns": [*chat[:1], chat[1] | {"content": f"b{i}"}]} for i in range(4)])
    init(folder, output=tmp_path / "mine.yaml")
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())["data"]
    assert data["chat_template"] is True
    (task,) = (task for task in data["tasks"] if task["name"] == "chats")
    assert task["messages"] == "turns"
    assert not {"prompt", "answer"} & set(task)


def test_an_existing_file_is_not_replaced(folder, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kept")
    with pytest.raises(AgclError, match=r"mine.yaml exists"):
        init(folder, output=path)
    assert path.read_text() == "kept"


def test_a_folder_without_a_usable_file_is_refused_and_nothing_is_written(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"only": "one"}])
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(AgclError, match="makes a task") as caught:
        init(tmp_path, output=tmp_path / "mine.yaml")
    assert [problem.split(" ")[:3] for problem in caught.value.problems[1:]] == [["Left", "out.", "Task"]] * 2
    assert not (tmp_path / "mine.yaml").exists()
