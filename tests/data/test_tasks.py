import gzip
import json

import datasets
import pytest
import torch
from conftest import character_tokenizer, write_rows

from agcl.data.sources import in_folder
from agcl.data.tasks import AnswerEncoder, Probe, Task, collate, load_rows
from agcl.errors import AgclError


def encoder(max_length=64, truncation="error"):
    return AnswerEncoder(character_tokenizer(), max_length, truncation)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path, kind):
    rows = [{"prompt": "cat?", "answer": "a, b"}, {"prompt": "dog?", "answer": "c"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "csv" or kind == "tsv":
        datasets.Dataset.from_list(rows).to_csv(str(path), sep="," if kind == "csv" else "\t", index=False)
    elif kind == "jsonl":
        write_rows(path, rows)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert load_rows(Task(name="t", source=str(path)), "train", ["prompt", "answer"]).to_list() == rows


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_cells_of_tables_are_taken_as_they_are_written(tmp_path, kind):
    path, separator = tmp_path / f"rows.{kind}", "," if kind == "csv" else "\t"
    cells = [("007", "None"), ("1", "yes"), ("", "1.50"), ("NA", "1e3")]
    path.write_text("\n".join(map(separator.join, [("code", "value"), *cells])) + "\n")
    rows = load_rows(Task(name="t", source=str(path)), "train", ["code", "value"])
    assert [tuple(row.values()) for row in rows] == [(code or None, value) for code, value in cells]
    chosen = load_rows(Task(name="t", source=str(path), where={"code": [1, "007"]}), "train", [])
    assert chosen["value"] == ["None", "yes"]


def test_split_mapping_and_slices(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"prompt": str(i), "answer": "x"} for i in range(4)])
    test = write_rows(tmp_path / "b.jsonl", [{"prompt": "9", "answer": "y"}])
    task = Task(name="t", source={"train": str(train), "test": str(test)})
    assert load_rows(task, "test", [])["prompt"] == ["9"]
    assert load_rows(task, "train[1:3]", [])["prompt"] == ["1", "2"]


def test_prompt_is_masked_and_answer_is_closed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}])
    task = Task(name="t", source=str(path), prompt="{q}?", answer=" {a}")
    (row,) = encoder().encode_rows(task, "train", task.prompt)
    ids = character_tokenizer()("ab? c")["input_ids"]
    assert row["input_ids"] == [*ids, 1]  # 1 is the end of sequence
    assert row["labels"] == [-100, -100, -100, *ids[3:], 1]
    assert (row["answer"], row["label"]) == ("c", -1)


def test_class_labels_are_rendered_by_name(tmp_path):
    rows = datasets.Dataset.from_dict({"q": ["x"], "a": [1]}).cast_column("a", datasets.ClassLabel(names=["no", "yes"]))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    task = Task(
        name="t",
        source=str(tmp_path / "rows.parquet"),
        prompt="{q}",
        answer=" {a}",
        metric="label_accuracy",
        labels=["no", "yes"],
    )
    (row,) = encoder().encode_rows(task, "train", task.prompt)
    assert (row["answer"], row["label"]) == ("yes", 1)


def test_left_truncation_keeps_the_answer_and_the_prompts_end(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "abcdef", "answer": "x"}])
    task = Task(name="t", source=str(path), answer="{answer}")
    (row,) = encoder(max_length=5, truncation="left").encode_rows(task, "train", task.prompt)
    assert row["input_ids"] == [*character_tokenizer()("defx")["input_ids"], 1]


def test_collate_pads_on_the_left():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "label": 0, "answer": "p"},
        {"input_ids": [8, 9], "labels": [-100, 9], "label": 1, "answer": "q"},
    ]
    batch = collate(rows, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert torch.equal(batch["label"], torch.tensor([0, 1]))
    assert batch["answer"] == ["p", "q"]


ROWS = [{"prompt": "cat?", "answer": "a"}]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"source": "/nowhere/x.jsonl"}, r"Task `t`: the file /nowhere/x.jsonl does not exist"),
        (ROWS, {"source": "./nowhere"}, r"Task `t`: ./nowhere does not exist"),
        (
            ROWS,
            {"source": "builtin:cldr/klingon"},
            r"Task `t`: there is no `builtin:cldr/klingon`; built in are .*welsh",
        ),
        (
            ROWS,
            {"prompt": "{question}"},
            r"Task `t`: there is no column `question` in .*; its columns are prompt, answer",
        ),
        (ROWS, {"train_split": "train[5:]"}, r"Task `t`: split `train\[5:\]` of .* is empty"),
        (ROWS, {"train_split": "dev"}, r"Task `t`: split `dev` of .* cannot be loaded.*dev"),
        ([{"prompt": "cat?", "answer": None}], {}, r"Task `t`: column `answer` is empty in row 0 of `train`"),
        (
            ROWS,
            {"metric": "label_accuracy", "labels": ["b", "c"]},
            r"Task `t`: row 0 of `train` has the label 'a', which is not among `labels` \(b, c\)",
        ),
        ([{"prompt": "x" * 70, "answer": "a"}], {}, r"Task `t`: row 0 of `train` has 70 \+ 3 tokens .* the 64 allowed"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, rows, options, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    task = Task(**{"name": "t", "source": str(path), **options})
    with pytest.raises(AgclError, match=message):
        encoder().encode_rows(task, task.train_split, task.prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a b"}, r"Task name 'a b'"),
        ({"epochs": 0}, r"Task `t`: `epochs` is 0"),
        ({"metric": "label_ranking"}, r"Task `t`: metric `label_ranking` needs `labels`"),
        ({"labels": ["a"], "answer": "{x}{y}"}, r"Task `t`: with `labels`, `answer` must hold exactly one"),
        ({"prompt": "{prompt"}, r"Task `t`: `prompt` is '\{prompt'; it must hold at least one \{column\}"),
        ({"prompt": "{}"}, r"Task `t`: `prompt` is '\{\}'"),
        ({"answer": " yes"}, r"Task `t`: `answer` is ' yes'"),
        ({"probes": {"p": Probe(prompt="}")}}, r"Task `t`: `prompt` is '\}'"),
    ],
)
def test_bad_declarations_are_refused_by_name(options, message):
    with pytest.raises(AgclError, match=message):
        Task(**{"name": "t", "source": "x", **options})


def test_label_answers_are_rendered_like_rows():
    task = Task(name="t", source="x", answer=' {{"a": "{y}"}}.', metric="label_ranking", labels=["yes", "no"])
    assert task.label_answer("no") == ' {"a": "no"}.'


def test_probes_default_to_the_tasks_own_rows_and_prompt():
    task = Task(
        name="t", source="x", test_split="test", probes={"a": Probe(split="train"), "b": Probe(prompt="{other}")}
    )
    assert list(task.evaluations()) == [
        (None, Probe("test", "{prompt}")),
        ("a", Probe("train", "{prompt}")),
        ("b", Probe("test", "{other}")),
    ]


def test_validation_rows_stand_in_for_the_test_rows():
    probes = {"own": Probe(split="train"), "reworded": Probe(prompt="{other}")}
    task = Task(name="t", source="x", test_split="test", validation_split="train[9:]", probes=probes)
    assert list(task.evaluations("validation")) == [
        (None, Probe("train[9:]", "{prompt}")),
        ("own", Probe("train", "{prompt}")),
        ("reworded", Probe("train[9:]", "{other}")),
    ]
    with pytest.raises(AgclError, match="Task `t` declares no `validation_split`"):
        list(Task(name="t", source="x").evaluations("validation"))


def test_long_answers_may_be_cut(tmp_path):
    path = str(
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "q?", "answer": "abc"}, {"prompt": "q?", "answer": "a"}])
    )
    rows = encoder().encode_rows(Task(name="t", source=path, max_answer_tokens=3), "train", "{prompt}")
    tokenizer = character_tokenizer()
    learned = [[token for token in labels if token != -100] for labels in rows["labels"]]
    # A cut answer does not end there, so no end-of-sequence token closes it.
    assert learned == [tokenizer(" ab")["input_ids"], [*tokenizer(" a")["input_ids"], tokenizer.eos_token_id]]
    assert rows["answer"] == ["abc", "a"]


NUMBERED = [{"prompt": str(i), "answer": "x", "part": i % 3} for i in range(12)]


@pytest.mark.parametrize(
    ("where", "split", "expected"),
    [
        ({"part": 1}, "train", ["1", "4", "7", "10"]),
        ({"part": 1}, "train[:2]", ["1", "4"]),  # of the rows that fulfil it, not of all
        ({"part": 1}, "train[50%:]", ["7", "10"]),
        ({"part": 1}, "train[:1]+train[-1:]", ["1", "10"]),
        ({"part": [0, 2], "prompt": ["0", "1", "2"]}, "train", ["0", "2"]),
        ({}, "train[:2]", ["0", "1"]),
    ],
)
def test_where_comes_before_slices(tmp_path, where, split, expected):
    path = write_rows(tmp_path / "rows.jsonl", NUMBERED)
    assert load_rows(Task(name="t", source=str(path), where=where), split, [])["prompt"] == expected


def test_where_that_nothing_fulfils_is_refused(tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", NUMBERED))
    with pytest.raises(AgclError, match="`where` names a column `chapter`"):
        load_rows(Task(name="t", source=path, where={"chapter": 1}), "train", [])
    with pytest.raises(AgclError, match="is empty"):
        load_rows(Task(name="t", source=path, where={"part": 9}), "train", [])


def test_rows_without_text_may_be_dropped(tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": " "}, {"prompt": None, "answer": "d"}]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    assert load_rows(Task(name="t", source=path, drop_empty=True), "train", ["prompt", "answer"])["prompt"] == ["a"]


def test_relative_files_come_from_the_folder(tmp_path):
    task = Task(name="t", source={"train": "a/b.jsonl", "test": "/c.csv"})
    assert in_folder(task, str(tmp_path)).source == {"train": f"{tmp_path}/a/b.jsonl", "test": "/c.csv"}
    (tmp_path / "saved").mkdir()
    assert in_folder(Task(name="t", source="saved"), str(tmp_path)).source == f"{tmp_path}/saved"
    for name in ("builtin:cldr/welsh", "owner/data", "~/rows.csv"):
        assert in_folder(Task(name="t", source=name), str(tmp_path)).source == name
    with pytest.raises(AgclError, match="`data_dir` is /nowhere, which is not a folder"):
        in_folder(task, "/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"max_answer_tokens": -1}, "`max_answer_tokens` is -1"),
        ({"substitutions": {"(a": "b"}}, "cannot be used"),
        ({"substitutions": {"a": r"\2"}}, "cannot be used"),
        ({"substitutions": {"a": "b"}, "metric": "label_accuracy", "labels": ["a"]}, "compares with `labels`"),
    ],
)
def test_unusable_scoring_options_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        Task(name="t", source="x", **options)


def test_all_problems_of_a_declaration_are_told_together():
    with pytest.raises(AgclError) as caught:
        Task(name="t", source="x.jsonl", epochs=0, prompt="no column", metric="label_accuracy", max_new_tokens=0)
    assert len(caught.value.problems) == 4
    assert str(caught.value) == "Task `t`: `epochs` is 0; give at least 1. (3 more: `agcl check` lists all)"
    assert all(problem.startswith("Task `t`: ") for problem in caught.value.problems)
