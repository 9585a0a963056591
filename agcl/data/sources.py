"""Where a task's rows come from: files, data sets on the hub, and what is built in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pandas
from datasets import ClassLabel, Dataset, Features, ReadInstruction, Value, concatenate_datasets

from agcl.data.chat import holds_chats, split_chat
from agcl.errors import AgclError, one_line, raise_any

if TYPE_CHECKING:
    from agcl.data.tasks import Task

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def in_folder(task: Task, folder: str) -> Task:
    """The task with its relative files and folders taken from a folder; other, hub and built-in names stay as they are.

    Raises:
        AgclError: If there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise AgclError(f"`data_dir` is {folder}, which is not a folder: name the one that holds the tasks' files.")

    def located(source: str) -> str:
        if source.startswith(("builtin:", "~")):
            return source
        is_file = builder_suffix(source) is not None or (root / source).is_dir()
        return str(root / source) if is_file else source

    if isinstance(task.source, str):
        return replace(task, source=located(task.source))
    return replace(task, source={split: located(file) for split, file in task.source.items()})


def load_rows(task: Task, split: str, columns: Sequence[str]) -> Dataset:
    """Load the rows of one split of a task, class labels already turned into their names.

    Args:
        task: The task.
        split: Split in the slicing syntax of ``datasets``. Slices count the rows that fulfil the task's ``where``.
        columns: Columns that must be there.

    Raises:
        AgclError: If the source, split or a column is missing, or there is no row; names the task.
    """
    with quiet_datasets():
        try:
            rows = (
                _load_where(task, split) if task.where else datasets.load_dataset(**_load_arguments(task), split=split)
            )
        except AgclError:
            raise
        except ConnectionError as error:
            raise AgclError(
                f"Task `{task.name}`: the data set {task.source} cannot be reached on the hub and is not in its cache: "
                "load it once with a connection, or give a local file or folder."
            ) from error
        except Exception as error:  # the library raises a dozen unrelated types for a file or split that is not right
            reason = one_line(error.__cause__ or error).rstrip(".")
            if "corresponds to no data" in reason:
                reason = "it is empty"
            elif re.search(r"utf-?8|codec|encoding", reason, re.IGNORECASE):
                reason = f"it is not in UTF-8, so convert it ({reason})"
            raise AgclError(
                f"Task `{task.name}`: split `{split}` of {task.source} cannot be loaded: {reason}. Mend `source`, "
                "or the split's name."
            ) from error
    raise_any(
        f"Task `{task.name}`: there is no column `{column}` in {task.source}; "
        f"its columns are {', '.join(rows.column_names)}."
        for column in columns
        if column not in rows.column_names
    )
    raise_any(
        f"Task `{task.name}`: {task.source} has two columns `{column}`; rename or remove one."
        for column in columns
        if f"{column}.1" in rows.column_names  # as the reader of tables renames a second one
    )
    raise_any(
        f"Task `{task.name}`: column `{column}` of {task.source} holds lists or structures, not text; write what the "
        f"model is to read into a column of its own{_naming_chats(rows)}."
        for column in columns
        if column != task.messages and not isinstance(rows.features[column], (Value, ClassLabel))
    )
    if task.messages is not None and task.messages in columns and not holds_chats(rows, task.messages):
        raise AgclError(
            f"Task `{task.name}`: column `{task.messages}` of {task.source} holds no chats, which are lists of turns "
            "with their `role` and `content` as text; bring it into this form, or use `prompt` and `answer`."
        )
    if task.drop_empty:
        texts = [
            [split_chat(turns)[1] for turns in rows[column][:]] if column == task.messages else rows[column][:]
            for column in columns
        ]
        rows = rows.select([i for i, row in enumerate(zip(*texts, strict=True)) if not any(map(is_empty, row))])
    if len(rows) == 0:
        raise AgclError(f"Task `{task.name}`: split `{split}` of {task.source} is empty: it holds no row.")
    return rows


def _naming_chats(rows: Dataset) -> str:
    chats = [f"`messages: {column}`" for column in rows.column_names if holds_chats(rows, column)]
    return f", or read its chats by {' or '.join(chats)}" if chats else ""


def is_empty(value: Any) -> bool:
    """Whether a row's value is missing (NaN included, as tables write it), or white space alone."""
    return value is None or value != value or not str(value).strip()


def _load_where(task: Task, split: str) -> Dataset:
    """One split of the rows that fulfil ``task.where``, its slices taken after the others are gone."""
    whole = datasets.load_dataset(**_load_arguments(task))
    kept = {str(name): _fulfilling(task, rows) for name, rows in whole.items()}
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in kept.items()})
    return concatenate_datasets([kept[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _fulfilling(task: Task, rows: Dataset) -> Dataset:
    indices: Sequence[int] = range(len(rows))
    for column, wanted in task.where.items():
        if column not in rows.column_names:
            raise AgclError(
                f"Task `{task.name}`: `where` names a column `{column}` that is not in {task.source}; "
                f"its columns are {', '.join(rows.column_names)}."
            )
        feature, values = rows.features[column], rows[column][:]  # a list: single items of a column are slow
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if feature == Value("string"):  # as tables have them
            allowed = [str(value) for value in allowed]
        if isinstance(feature, ClassLabel):
            allowed = [feature.str2int(value) if isinstance(value, str) else value for value in allowed]
        indices = [index for index in indices if values[index] in allowed]
    return rows.select(indices)


def builtin_file(name: str, suffix: str, complaint: str) -> Path:
    """The file of a ``builtin:`` name.

    Args:
        name: Its name.
        suffix: Of files of that kind.
        complaint: How the error begins if there is none.

    Raises:
        AgclError: If there is none.
    """
    path = BUILTIN_FOLDER / (name.removeprefix("builtin:") + suffix)
    if not path.is_file():
        names = sorted(str(p.relative_to(BUILTIN_FOLDER).with_suffix("")) for p in BUILTIN_FOLDER.glob(f"*/*{suffix}"))
        raise AgclError(f"{complaint} `{name}`; built in are {', '.join(names)}.")
    return path


def builder_suffix(source: str) -> str | None:
    """The suffix that says how a file is to be read; None if ``source`` is no file."""
    return next((suffix for suffix in reversed(Path(source).suffixes) if suffix in _BUILDERS), None)


def _load_arguments(task: Task) -> dict[str, Any]:
    """Arguments of ``datasets.load_dataset`` for the task's source."""
    files = task.source if isinstance(task.source, dict) else {"train": task.source}
    first = next(iter(files.values()))
    if first.startswith("builtin:"):
        path = builtin_file(first, ".jsonl", f"Task `{task.name}`: there is no")
        return {"path": "json", "data_files": {"train": str(path)}}
    suffix = builder_suffix(first)
    if suffix is None:
        if first.startswith((".", "/", "~")) and not Path(first).expanduser().exists():
            raise AgclError(f"Task `{task.name}`: {first} does not exist.")
        return {"path": first, "name": task.subset}
    raise_any(
        f"Task `{task.name}`: the file {file} does not exist. Relative files are looked for in `data_dir`."
        for file in files.values()
        if not Path(file).expanduser().is_file()
    )
    raise_any(
        f"Task `{task.name}`: the file {file} is empty; write rows into it, or leave the task out."
        for file in files.values()
        if not Path(file).expanduser().stat().st_size
    )
    if len(kinds := {builder_suffix(file) for file in files.values()}) > 1:
        raise AgclError(
            f"Task `{task.name}`: its files are of several kinds ({', '.join(sorted(map(str, kinds)))}); make them one."
        )
    arguments: dict[str, Any] = {"path": _BUILDERS[suffix]}
    arguments["data_files"] = {name: str(Path(file).expanduser()) for name, file in files.items()}
    if _BUILDERS[suffix] == "csv":
        arguments |= as_written(Path(first).expanduser())
    return arguments


def as_written(file: Path) -> dict[str, Any]:
    """Arguments of ``datasets.load_dataset`` for a CSV or TSV file: each cell as text, empty ones missing.

    Types that are guessed would make `0` of `007`, `1.0` of `1` where a cell is empty, and nothing of `None`.
    """
    separator = "\t" if builder_suffix(file.name) == ".tsv" else ","
    columns = pandas.read_csv(file, sep=separator, nrows=0).columns
    return {
        "sep": separator,
        "features": Features({str(column): Value("string") for column in columns}),
        "keep_default_na": False,
        "na_values": [""],
    }


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the library's progress bars, which would cut into the run's own display, and what it says before it raises.

    Both are put back afterwards.
    """
    were_disabled, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not were_disabled:
            datasets.enable_progress_bars()
