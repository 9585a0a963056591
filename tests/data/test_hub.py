"""Data sets of the hub: a repository's layout in a local folder, what the library is asked for, no connection."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from agcl.data.sources import load_rows
from agcl.data.tasks import Task
from agcl.errors import AgclError

CARD = """---
configs:
  - config_name: short
    data_files:
      - {split: train, path: short/train.jsonl}
      - {split: test, path: short/test.jsonl}
  - config_name: long
    data_files:
      - {split: train, path: long/train.jsonl}
dataset_info:
  - config_name: short
    features:
      - {name: text, dtype: string}
      - name: label
        dtype:
          class_label:
            names: {'0': bad, '1': good}
---
"""


@pytest.fixture
def repository(tmp_path):
    """A data set without a script, as it lies on the hub: a card that names configurations, splits and labels."""
    folder = tmp_path / "reviews"
    for name, rows in (
        ("short/train", [("fine", 1), ("poor", 0), ("great", 1)]),
        ("short/test", [("so so", 0)]),
        ("long/train", [("a long story", 1)]),
    ):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows))
    (folder / "README.md").write_text(CARD)
    return folder


def task(source, **options):
    return Task(name="reviews", source=str(source), prompt="{text}", answer=" {label}", **options)


@pytest.mark.parametrize(
    ("options", "split", "expected"),
    [
        ({"subset": "short"}, "train[:2]", ["fine", "poor"]),
        ({"subset": "short"}, "test", ["so so"]),
        ({"subset": "long"}, "train", ["a long story"]),
        ({"subset": "short", "where": {"label": "good"}}, "train", ["fine", "great"]),
        ({"subset": "short", "where": {"label": "good"}}, "train[1:]", ["great"]),
    ],
)
def test_repository_layout(repository, options, split, expected):
    rows = load_rows(task(repository, **options), split, ["text", "label"])
    assert rows["text"][:] == expected


def test_labels_of_the_card_are_rendered_by_name(repository):
    rows = load_rows(task(repository, subset="short"), "train", ["text", "label"])
    assert rows.features["label"].names == ["bad", "good"]


def test_missing_subset_is_named(repository):
    with pytest.raises(AgclError, match=r"Task `reviews`: split `train` of .* cannot be loaded: .*'medium' not found"):
        load_rows(task(repository, subset="medium"), "train", ["text"])


@pytest.mark.parametrize(("where", "split"), [({}, "train[:1]"), ({"label": "good"}, None)])
def test_hub_name_and_subset_reach_the_library(monkeypatch, where, split):
    """A condition needs the whole split, since slices count the rows that fulfil it."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["one", "two"], "label": [1, 1]}, features)
    asked = []

    def load_dataset(split=None, **arguments):
        asked.append((arguments, split))
        return DatasetDict(train=rows) if split is None else rows.select([0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rows(task("some-user/reviews", subset="short", where=where), "train[:1]", ["text", "label"])
    assert loaded["text"][:] == ["one"]
    assert asked == [({"path": "some-user/reviews", "name": "short"}, split)]


def test_no_connection_is_one_clear_line():
    """The tests run with the library told to be offline."""
    with pytest.raises(AgclError) as error_info:
        load_rows(task("some-user/reviews"), "train", ["text"])
    assert str(error_info.value) == (
        "Task `reviews`: the data set some-user/reviews cannot be reached on the hub and is not in its cache: load it "
        "once with a connection, or give a local file or folder."
    )
