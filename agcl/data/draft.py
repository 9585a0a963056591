"""From the files of a task to a declaration of it that can be trained on, with what is known of its rows."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from agcl.data.chat import split_chat
from agcl.data.columns import Column, guess_columns
from agcl.data.folder import TaskFiles
from agcl.data.sources import load_rows
from agcl.data.tasks import Task, TaskMetric, columns_of
from agcl.errors import AgclError

_ROW_PASSES = 2000  # epochs are chosen so that about so many rows are learned of a task
_MAX_EPOCHS = 20
_EXACT_WORDS = 8  # longer answers are seldom repeated word by word


@dataclass
class Draft:
    """A guessed task.

    Attributes:
        task: The declaration, its files relative to the folder.
        columns: What its columns were taken for.
        num_rows: Number of rows by split that is learned or scored on.
        notes: A sentence on everything that its user should look at.
    """

    task: Task
    columns: list[Column]
    num_rows: dict[str, int]
    notes: list[str]

    @property
    def answer(self) -> Column:
        """The answer's column, or that of the chats which hold it."""
        return _answer(self.columns)


def draft_task(folder: Path, files: TaskFiles) -> Draft:
    """Read a task's files and declare it.

    Args:
        folder: Where the files are.
        files: Their names.

    Raises:
        AgclError: If they cannot be read, or do not look like a task.
    """
    located = Task(files.name, {split: str(folder / file) for split, file in files.files.items()})
    splits = {split: load_rows(located, split, []) for split in files.files}
    try:
        columns = guess_columns(splits)
    except AgclError as error:
        raise AgclError(f"Task `{files.name}` ({', '.join(files.files.values())}): {error}") from error
    task = _declare(files, columns, {split: len(rows) for split, rows in splits.items()})
    source = replace(task, source=located.source)
    needed = columns_of(task, task.prompt)
    rows = {split: load_rows(source, split, needed) for split in (task.train_split, task.test_split)}
    draft = Draft(task, columns, {split: len(part) for split, part in rows.items()}, [])
    draft.notes += _notes(draft, rows[task.train_split], rows[task.test_split])
    return draft


def _declare(files: TaskFiles, columns: list[Column], num_rows: dict[str, int]) -> Task:
    used = [column for column in columns if column.role != "left out"]
    answer = _answer(columns)
    asking = [column.name for column in used if column.role == "prompt"]
    metric, labels = _metric(answer)
    train_split, test_split = _splits(num_rows)
    templates: dict[str, Any]
    if answer.role == "chat":
        templates = {"messages": answer.name}
    else:
        templates = {"prompt": _prompt(asking, answer.name, is_plain=labels is None), "answer": f" {{{answer.name}}}"}
    return Task(
        name=files.name,
        source=files.files["train"] if len(files.files) == 1 else files.files,
        **templates,
        drop_empty=any(column.num_empty for column in used),
        train_split=train_split,
        test_split=test_split,
        validation_split="validation" if "validation" in num_rows else None,
        epochs=min(max(round(_ROW_PASSES / num_rows["train"]), 1), _MAX_EPOCHS),
        metric=metric,
        labels=labels,
    )


def _answer(columns: list[Column]) -> Column:
    return next(column for column in columns if column.role in ("answer", "chat"))


def _prompt(asking: list[str], answering: str, is_plain: bool) -> str:
    """A single column of free text as it stands; else each part after its name, and the answer's name last."""
    if len(asking) == 1 and is_plain:
        return f"{{{asking[0]}}}"
    parts = [f"{_title(name)}: {{{name}}}" for name in asking] if len(asking) > 1 else [f"{{{asking[0]}}}"]
    return "\n".join([*parts, f"{_title(answering)}:"])


def _title(name: str) -> str:
    return name.replace("_", " ").strip().capitalize()


def _metric(answer: Column) -> tuple[TaskMetric, list[str] | None]:
    if answer.is_closed_set:
        return "label_accuracy", sorted(answer.counts)
    words = statistics.median(len(value.split()) for value in answer.counts)
    return ("exact_match" if words <= _EXACT_WORDS else "rouge_l"), None


def _splits(num_rows: dict[str, int]) -> tuple[str, str]:
    """Rows to learn and rows to be scored on; a tenth is held out where no file is meant for that."""
    if "test" in num_rows or "validation" in num_rows:
        return "train", "test" if "test" in num_rows else "validation"
    count = num_rows["train"]
    if count == 1:
        return "train", "train"
    if count < 10:
        return f"train[:{count - 1}]", f"train[{count - 1}:]"
    return "train[:90%]", "train[90%:]"


def _notes(draft: Draft, train: Dataset, test: Dataset) -> list[str]:
    task, answer, notes = draft.task, draft.answer, []
    if task.test_split == task.train_split:
        notes.append("There is a single row: it is learned and scored on.")
    elif task.test_split.startswith("train"):
        notes.append(f"No file is meant for scoring: {len(test)} of its rows (`{task.test_split}`) are held out.")
    if task.drop_empty:
        empty = {column.name: column.num_empty for column in draft.columns if column.role != "left out"}
        counted = ", ".join(f"{count} of `{name}`" for name, count in empty.items() if count)
        notes.append(f"Rows with an empty value ({counted}) are left out.")
    if task.labels is not None:
        values = train[answer.name][:]
        learned = set(map(str, values) if task.messages is None else (split_chat(turns)[1].strip() for turns in values))
        unlearned = [label for label in task.labels if label not in learned]
        if unlearned:
            notes.append(
                f"No training row has the answer {', '.join(unlearned)}: are the rows sorted by it? Then shuffle them."
            )
    return notes
