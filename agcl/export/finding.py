"""From a run's folder or a checkpoint to a model and what is known of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agcl.attribution.artefact import ImportanceFile, importance_files
from agcl.checkpoints import attribution_state, look_into
from agcl.errors import AgclError
from agcl.metrics.functional import num_learned
from agcl.results import read_results


@dataclass(frozen=True)
class Trained:
    """A model that a run has trained, as it was after one of its tasks.

    Attributes:
        tasks: The run's tasks in the order of learning.
        num_learned: How many of them the model has learned.
        scores: Score matrix, shape ``(T + 1, T)``, NaN where nothing was measured and after the last task learned.
        regime: ``sequential`` or ``joint``.
        model_name: What the training began with, as its user gave it.
        facts: What ``scores.json`` says besides: metrics of the tasks, precision, seed, versions; empty without one.
        weights: A folder in Hugging Face format, or a checkpoint.
        importance: The latest importance file of each task learned.
    """

    tasks: list[str]
    num_learned: int
    scores: Tensor
    regime: str
    model_name: str
    facts: dict[str, Any]
    weights: Path
    importance: list[ImportanceFile]


def find_trained(source: Path, task: str | None = None) -> Trained:
    """Find the model of a run after a task.

    Args:
        source: The folder of a run, in which ``scores.json`` is, or a checkpoint (``.ckpt``) of one.
        task: Name of the task just learned; the last one if left out. For another one of a run, a checkpoint from its
            end is looked for in the folder.

    Raises:
        AgclError: If there is no such run, checkpoint or task, or no checkpoint was saved at the task's end.
    """
    if not source.exists():
        raise AgclError(f"{source} does not exist; name the folder of a run, or a checkpoint.")
    return _of_run(source, task) if source.is_dir() else _of_checkpoint(source, task)


def _of_run(folder: Path, task: str | None) -> Trained:
    facts = read_results(folder)
    tasks, scores = facts["tasks"], _matrix(facts["scores"])
    learned = num_learned(scores)
    count = learned if task is None else _index(task, tasks) + 1
    if facts["regime"] == "joint" and 0 < count < len(tasks):
        raise AgclError(f"`regime: joint` learned all tasks at once, so there is no model of `{task}` alone.")
    if not 0 < count <= learned:
        raise AgclError(f"The run in {folder} has not learned {f'`{task}`' if task else 'a task'} to its end yet.")
    if count == len(tasks) and (folder / "model").is_dir():
        return _trained(tasks, count, scores, facts, folder / "model", folder)
    found: dict[int, Path] = {}
    for path in sorted(filter(Path.is_file, folder.rglob("*.ckpt")), key=lambda path: path.stat().st_mtime):
        try:
            checkpoint = look_into(path, "cpu", checksums=False)
        except AgclError:  # damaged or somebody else's: another may do
            continue
        if _task_names(checkpoint) == tasks and (end := _finished(checkpoint)) is not None:
            found[end] = path
    if count not in found:
        ends = ", ".join(f"`{tasks[end - 1]}`" for end in sorted(found)) or "none"
        raise AgclError(
            f"No checkpoint below {folder} was saved at the end of task `{tasks[count - 1]}` (there are of: {ends}). "
            "Train with a ModelCheckpoint that has `save_top_k: -1`, or name a checkpoint that lies elsewhere."
        )
    return _trained(tasks, count, scores, facts, found[count], folder)


def _of_checkpoint(path: Path, task: str | None) -> Trained:
    checkpoint = look_into(path, "cpu", checksums=False)
    tasks = _task_names(checkpoint)
    count = _finished(checkpoint)
    if count is None:
        raise AgclError(
            f"{path} was saved in the middle of a task, where its model has no scores; take one from a task's end."
        )
    if task is not None and _index(task, tasks) + 1 != count:
        raise AgclError(f"{path} was saved at the end of task `{tasks[count - 1]}`, not of `{task}`.")
    scores = checkpoint["agcl"]["scores"]["score"]
    folder = next((run for run in _folders(path, checkpoint) if _is_of(run, tasks, count, scores)), None)
    model = checkpoint["hyper_parameters"]["model_name_or_path"]
    facts = {"regime": checkpoint["agcl"].get("regime", "sequential"), "model": model}
    facts = facts if folder is None else read_results(folder)
    return _trained(tasks, count, scores, facts, path, folder)


def _trained(
    tasks: list[str], count: int, scores: Tensor, facts: dict[str, Any], weights: Path, folder: Path | None
) -> Trained:
    seen = scores.clone()
    seen[count + 1 :] = torch.nan
    importance = [] if folder is None else _importance(folder / "importance", tasks[:count])
    return Trained(tasks, count, seen, facts["regime"], facts["model"], facts, weights, importance)


def _importance(folder: Path, learned: list[str]) -> list[ImportanceFile]:
    """Of each of these tasks, in their order, what the gate went by when the last of them was learned."""
    latest: dict[str, ImportanceFile] = {}
    for file in importance_files(folder):  # a re-estimated one comes later
        if file.metadata.get("reestimated_after") in (None, *learned):
            latest[file.metadata.get("task", "")] = file
    return [latest[task] for task in learned if task in latest]


def _finished(checkpoint: dict[str, Any]) -> int | None:
    """Number of tasks learned, if the checkpoint is from a task's end and its model was scored."""
    saved = checkpoint["agcl"]
    count = num_learned(saved["scores"]["score"])
    epochs = [number for _, number in saved["tasks"]]
    ends = [max(epochs)] * len(epochs) if saved.get("regime") == "joint" else list(accumulate(epochs))
    return count if count and checkpoint["epoch"] + 1 == ends[count - 1] else None


def _folders(path: Path, checkpoint: dict[str, Any]) -> Iterator[Path]:
    """Where the run of a checkpoint may be: around it, and around the importance files that it names."""
    yield from (path.resolve().parent, path.resolve().parent.parent)
    if (state := attribution_state(checkpoint)) is not None:
        yield from (Path(file).parent.parent for file in state["so_far"]["files"].values())


def _is_of(folder: Path, tasks: list[str], count: int, scores: Tensor) -> bool:
    if not (folder / "scores.json").is_file() or (facts := read_results(folder))["tasks"] != tasks:
        return False
    return torch.equal(_matrix(facts["scores"])[: count + 1].nan_to_num(-1), scores[: count + 1].nan_to_num(-1))


def _matrix(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)


def _task_names(checkpoint: dict[str, Any]) -> list[str]:
    return [name for name, _ in checkpoint["agcl"]["tasks"]]


def _index(task: str, tasks: list[str]) -> int:
    if task not in tasks:
        raise AgclError(f"The run has no task `{task}`; its tasks are {', '.join(f'`{name}`' for name in tasks)}.")
    return tasks.index(task)
