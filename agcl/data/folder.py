"""Which of a folder's files belong to which task, by their names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agcl.data.sources import builder_suffix
from agcl.errors import AgclError

SPLIT_WORDS = {
    "train": ("train", "training", "trn", "learn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "heldout"),
}
"""What a file's name calls a split."""

_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}


@dataclass
class TaskFiles:
    """The files of one task.

    Attributes:
        name: From the files' common name, or that of their folder.
        files: Split (``train``, ``validation``, ``test``; a file that names none is ``train``) to the file's path
            relative to the folder.
    """

    name: str
    files: dict[str, str] = field(default_factory=dict)


def find_task_files(folder: Path) -> tuple[list[TaskFiles], list[str]]:
    """The tasks that a folder's files make up.

    Files that differ in a split word alone (``tickets.train.csv``, ``tickets.test.csv``; ``train_a.jsonl``, ...) are
    one task, any other file is one of its own. Files whose names are nothing but split words are the task of their
    folder's name (``tickets/train.csv``). Files in folders within it count, deeper and hidden ones do not.

    Args:
        folder: Where the files are.

    Returns:
        The tasks, in the natural order of their names (2 before 10), and a sentence on each file that is left out.

    Raises:
        AgclError: If there is no such folder, or no file in it that can be read.
    """
    if not folder.is_dir():
        raise AgclError(f"{folder} is no folder: name the one that holds your JSONL, JSON, CSV, TSV or Parquet files.")
    tasks: dict[str, TaskFiles] = {}
    notes = []
    named = [(*_name_and_split(path.relative_to(folder), folder.resolve().name), path) for path in _data_files(folder)]
    # Training files first: they decide of which kind the others must be.
    for name, split, path in sorted(named, key=lambda entry: list(SPLIT_WORDS).index(entry[1])):
        task = tasks.setdefault(name, TaskFiles(name))
        relative, first = path.relative_to(folder).as_posix(), next(iter(task.files.values()), None)
        if split in task.files:
            notes.append(f"{relative} is left out: {task.files[split]} is the {split} split of `{name}` already.")
        elif first is not None and builder_suffix(relative) != builder_suffix(first):
            notes.append(f"{relative} is left out: all files of `{name}` must be of one kind, as {first} is.")
        else:
            task.files[split] = relative
    for name in [name for name, task in tasks.items() if "train" not in task.files]:
        files = ", ".join(tasks.pop(name).files.values())
        notes.append(f"{files} is left out: there is no training file of `{name}` beside it.")
    if not tasks:
        reasons = " ".join(notes) or "It holds no JSONL, JSON, CSV, TSV or Parquet file."
        raise AgclError(f"No task was found in {folder}. {reasons}")
    return sorted(tasks.values(), key=lambda task: _natural(task.name)), notes


def _data_files(folder: Path) -> Iterator[Path]:
    """Files of a known kind in a folder and in the folders within it, in the order of their names."""
    for path in sorted(folder.iterdir()) + sorted(folder.glob("*/*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and builder_suffix(path.name) is not None:
            yield path


def _name_and_split(path: Path, folder_name: str) -> tuple[str, str]:
    stem = path.name
    while builder_suffix(stem) is not None:
        stem = stem.rpartition(".")[0]
    parts = re.split(r"[\s._-]+", stem)
    # At the beginning or the end: "train_a", "a.test"; not in "how_to_train_a_dog".
    split = next((_SPLIT_OF[part.lower()] for part in (parts[-1], parts[0]) if part.lower() in _SPLIT_OF), None)
    if split is None:
        rest = stem
    elif parts[-1].lower() in _SPLIT_OF:
        rest = stem[: len(stem) - len(parts[-1])]
    else:
        rest = stem[len(parts[0]) :]
    for words in ([*path.parent.parts, rest], [folder_name]):
        name = "_".join(word for part in words for word in re.split(r"[^\w.-]+", part) if word.strip("._-"))
        if name.strip("._-"):
            return name.strip("._-"), split or "train"
    return "task", split or "train"


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part.lower()) for part in parts]
