"""``agcl init FOLDER``: a configuration from a folder of files."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agcl.commands.init_yaml import configuration_text
from agcl.errors import AgclError
from agcl.terminal import facts_table

if TYPE_CHECKING:
    from agcl.data.draft import Draft

# datasets and transformers take seconds to import, which the other commands do without: they are imported where used.

_ROLE_STYLES = {"prompt": "cyan", "answer": "green", "chat": "green", "left out": "dim"}


def init(
    folder: Path, *, output: Path | None = None, model_name_or_path: str = "builtin:smollm2-135m-instruct"
) -> None:
    """Write a configuration for the tasks that a folder of JSONL, JSON, CSV, TSV or Parquet files holds.

    Each file is a task, or a split of one where names differ in train, validation or test alone. What the columns
    are for is guessed and shown, with the reason.

    Args:
        folder: Where the files are.
        output: The configuration to write; FOLDER's name with the ending yaml in the working directory if left out. An
            existing file is not replaced.
        model_name_or_path: Hub name, local folder, or builtin:NAME of the model to be trained.

    Raises:
        AgclError: If no task is found, or the configuration exists.
    """
    name = folder.resolve().name or "tasks"
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise AgclError(f"{path} exists; move it away, or choose another name with --output.")
    drafts, notes = _drafts(folder)
    text = configuration_text(drafts, str(folder), str(path), name, model_name_or_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:  # not even if it has come about meanwhile
            file.write(text)
    except FileExistsError as error:
        raise AgclError(f"{path} exists; move it away, or choose another name with --output.") from error
    console = Console(highlight=False)
    for number, draft in enumerate(drafts, 1):
        _show(console, draft, f"Task {number} of {len(drafts)}")
    for note in notes:
        console.print(Text(f"! {note}", style="yellow"))
    console.print(f"\nWritten: {path}. See what the model will see, then train:", soft_wrap=True)
    for command in ("check", "fit"):
        console.print(f"  agcl {command} --config {path}", style="bold", soft_wrap=True)


def _drafts(folder: Path) -> tuple[list["Draft"], list[str]]:
    """The tasks, and a sentence on each file that is none."""
    from agcl.data.draft import draft_task
    from agcl.data.folder import find_task_files

    drafts, (tasks, notes) = [], find_task_files(folder)
    for files in tasks:
        try:
            drafts.append(draft_task(folder, files))
        except AgclError as error:
            notes += [f"Left out. {problem}" for problem in error.problems]
    if not drafts:
        raise AgclError(f"No file of {folder} makes a task.", *notes)
    return drafts, notes


def _show(console: Console, draft: "Draft", title: str) -> None:
    task = draft.task
    files = [task.source] if isinstance(task.source, str) else list(task.source.values())
    console.print(Text.assemble((f"\n{title}: {task.name}", "bold"), f"  {', '.join(files)}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    for heading in ("column", "distinct", "taken for"):
        table.add_column(heading, overflow="fold")
    table.add_column("first value", no_wrap=True, overflow="ellipsis", ratio=1)
    for column in draft.columns:
        table.add_row(
            Text(column.name),
            f"{len(column.counts)} of {column.num_values}",
            Text.assemble((column.role, _ROLE_STYLES[column.role]), f": {column.reason}"),
            Text(" ".join(column.example.split())),
        )
    console.print(table)
    if task.messages is not None:
        facts = [("prompt", "the turns of each chat but the last"), ("answer", "its last turn, the assistant's")]
    else:
        facts = [("prompt", repr(task.prompt)), ("answer", repr(task.answer))]
    facts.append(("scored by", task.metric))
    if task.labels is not None:
        shares = [f"{label} ({draft.answer.counts[label]})" for label in task.labels]
        facts.append(("labels", ", ".join(shares)))
    facts.append(("rows", _rows_text(draft)))
    facts += [("note", note) for note in draft.notes]
    console.print(facts_table(facts))


def _rows_text(draft: "Draft") -> str:
    task, counts = draft.task, draft.num_rows
    learned = f"{counts[task.train_split]} to learn, {task.epochs} times"
    return f"{learned}; {counts[task.test_split]} to be scored on"
