"""Which files make which task, and what their columns are taken for."""

import datasets
import pytest
from conftest import write_rows

from agcl.data.columns import guess_columns
from agcl.data.draft import draft_task
from agcl.data.folder import TaskFiles, find_task_files
from agcl.errors import AgclError


def folder_with(path, *files):
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("")
    return path


def test_files_that_differ_in_a_split_word_are_one_task(tmp_path):
    folder = folder_with(
        tmp_path,
        "10_faq.jsonl",
        "2_train a.csv",
        "dev-mail.tsv",
        "how_to_train_a_dog.jsonl.gz",
        "mail.training.tsv",
        "mail_test.tsv",
        "news/train.json",
        "news/test.json",
        "README.md",
        ".hidden.jsonl",
        "a/b/deep.jsonl",
    )
    tasks, notes = find_task_files(folder)
    assert [(task.name, task.files) for task in tasks] == [
        ("2_train_a", {"train": "2_train a.csv"}),
        ("10_faq", {"train": "10_faq.jsonl"}),
        ("how_to_train_a_dog", {"train": "how_to_train_a_dog.jsonl.gz"}),
        ("mail", {"train": "mail.training.tsv", "validation": "dev-mail.tsv", "test": "mail_test.tsv"}),
        ("news", {"train": "news/train.json", "test": "news/test.json"}),
    ]
    assert notes == []


def test_files_named_by_their_split_alone_are_the_folders_task(tmp_path):
    (tasks, _) = find_task_files(folder_with(tmp_path / "my mail", "train.csv", "test.csv"))
    assert [(task.name, list(task.files)) for task in tasks] == [("my_mail", ["train", "test"])]


def test_what_fits_no_task_is_left_out_with_the_reason(tmp_path):
    folder = folder_with(tmp_path, "a.jsonl", "b.test.csv", "c.train.csv", "c.test.jsonl", "d.train.csv", "train-d.csv")
    tasks, notes = find_task_files(folder)
    assert [task.name for task in tasks] == ["a", "c", "d"]
    assert [note.split(" is left out: ")[0] for note in notes] == ["train-d.csv", "c.test.jsonl", "b.test.csv"]
    for note, reason in zip(
        notes, ("d.train.csv is the train", "one kind, as c.train.csv", "no training file of `b`"), strict=True
    ):
        assert reason in note


@pytest.mark.parametrize(("files", "message"), [([], "holds no JSONL"), (["a.test.csv"], "no training file of `a`")])
def test_a_folder_without_tasks_is_refused(tmp_path, files, message):
    with pytest.raises(AgclError, match=message):
        find_task_files(folder_with(tmp_path, *files))
    with pytest.raises(AgclError, match="is no folder"):
        find_task_files(tmp_path / "nowhere")


def roles(**columns):
    rows = datasets.Dataset.from_dict(columns)
    return {column.name: column.role for column in guess_columns({"train": rows})}


def test_named_columns_are_taken_by_name():
    assert roles(id=[1, 2], answer=["a", "b"], context=["c", "d"], question=["e", "f"], lang=["x", "y"]) == {
        "id": "left out",
        "answer": "answer",
        "context": "prompt",
        "question": "prompt",
        "lang": "left out",
    }


def test_columns_without_telling_names_are_taken_by_their_contents():
    texts = ["a long text about this", "a long text about that", "another text of some length", "yet another one"]
    assert roles(kind=["p", "q", "p", "q"], words=texts, place=["w", "x", "y", "z"]) == {
        "kind": "answer",  # few values that come back
        "words": "prompt",  # the longest
        "place": "left out",
    }
    assert roles(words=texts, reading=["one", "two", "three", "four"]) == {"words": "prompt", "reading": "answer"}


def test_columns_that_cannot_serve_are_left_out():
    found = roles(
        text=["a", "b"], input=["c", ""], tags=[["x"], ["y"]], constant=["k", "k"], output=["d", "e"], label=[0, 1]
    )
    assert [name for name, role in found.items() if role != "left out"] == ["text", "output"]
    assert roles(**{"free text": ["a", "b"], "body": ["c", "d"], "reply": ["e", "f"]})["free text"] == "left out"
    with pytest.raises(AgclError, match=r"usable are text, not id \(an identifier\)"):
        roles(id=[1, 2], text=["a", "b"])


def test_chats_are_taken_before_all_other_columns():
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] for answer in ("b", "c")]
    assert roles(prompt=["a", "a"], chosen=turns, rejected=turns, label=[0, 1]) == {
        "prompt": "left out",
        "chosen": "chat",
        "rejected": "left out",
        "label": "left out",
    }
    unanswered = [chat[:1] for chat in turns]
    assert roles(prompt=unanswered, text=["a", "b"], label=["b", "c"])["prompt"] == "left out"


def draft(tmp_path, rows, **more):
    files = {"train": write_rows(tmp_path / "t.train.jsonl", rows).name}
    files |= {split: write_rows(tmp_path / f"t.{split}.jsonl", part).name for split, part in more.items()}
    return draft_task(tmp_path, TaskFiles("t", files))


def test_an_answer_of_few_values_is_a_label_of_all_splits(tmp_path):
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(4)]
    found = draft(tmp_path, rows, test=[{"text": "row", "label": 2}, {"text": "row", "label": 2}])
    task = found.task
    assert (task.metric, task.labels) == ("label_accuracy", ["0", "1", "2"])
    assert (task.train_split, task.test_split, task.prompt) == ("train", "test", "{text}\nLabel:")
    assert found.notes == ["No training row has the answer 2: are the rows sorted by it? Then shuffle them."]


def test_chats_whose_answers_come_back_have_labels(tmp_path):
    def chat(answer):
        return {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}

    found = draft(tmp_path, [chat(" yes"), chat("no"), chat("no")], test=[chat("yes"), chat("")])
    assert (found.task.messages, found.task.labels, found.task.drop_empty) == ("m", ["no", "yes"], True)
    assert found.num_rows == {"train": 3, "test": 1}
    assert found.notes == ["Rows with an empty value (1 of `m`) are left out."]
    found = draft(tmp_path, [chat("no"), chat("no")], test=[chat("yes"), chat("yes")])
    assert found.notes == ["No training row has the answer yes: are the rows sorted by it? Then shuffle them."]


@pytest.mark.parametrize(
    ("count", "train_split", "rows"), [(1, "train", (1, 1)), (4, "train[:3]", (3, 1)), (30, "train[:90%]", (27, 3))]
)
def test_rows_to_be_scored_on_are_held_out(tmp_path, count, train_split, rows):
    found = draft(tmp_path, [{"question": f"q{i}", "answer": f"a{i}"} for i in range(count)])
    assert found.task.train_split == train_split
    assert (found.num_rows[found.task.train_split], found.num_rows[found.task.test_split]) == rows


def test_validation_rows_are_scored_on_where_no_test_rows_are(tmp_path):
    answers = ["an answer of rather more than eight words in all", "", "this one has more than eight words in it too"]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    found = draft(tmp_path, rows, validation=rows)
    assert (found.task.test_split, found.task.validation_split) == ("validation", "validation")
    assert (found.task.metric, found.task.drop_empty) == ("rouge_l", True)
    assert found.num_rows == {"train": 2, "validation": 2}
    assert found.notes == ["Rows with an empty value (2 of `answer`) are left out."]
