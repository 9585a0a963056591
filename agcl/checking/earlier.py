"""Plasticity that the importance of earlier tasks leaves to each task, as far as a run has left such importance."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from agcl.attribution.artefact import ImportanceFile, check_importance, importance_files, open_importance
from agcl.attribution.directions import is_of_pair
from agcl.attribution.merging import RunningMerge
from agcl.attribution.storage import index_of
from agcl.blocks import mean_by_layer
from agcl.callbacks.earlier import read_earlier
from agcl.checkpoints import attribution_state, look_into
from agcl.errors import AgclError
from agcl.gating.plasticity import mean_plasticity
from agcl.planning import attribution_options
from agcl.resuming import run_folders


@dataclass(frozen=True)
class Earlier:
    """Importance files of tasks, and where they were found.

    Attributes:
        files: Task name -> its file.
        origin: In words.
        is_named: Whether the user named them, or the checkpoint that they belong to.
        precede: Whether these tasks were learned before all of the configuration's.
    """

    files: dict[str, ImportanceFile]
    origin: str
    is_named: bool = True
    precede: bool = False


def find_earlier(config: Any) -> Earlier:
    """The importance files that a configuration leads to.

    Those named by the option ``importance``; else those of the run that the callback names as ``earlier``; else those
    of the checkpoint to resume from; else those of the newest run in the logger's folder that has some, which is
    ``lightning_logs`` where no logger is named.

    Args:
        config: Of ``agcl check``.

    Raises:
        AgclError: If a file cannot be read.
    """
    if config.importance:
        named = [open_importance(path) for path in config.importance]
        return Earlier(_by_task(named), "the files named by --importance")
    if path := (attribution_options(config) or {}).get("earlier"):
        run = read_earlier(path)
        return Earlier(_by_task(_files_of(run.state)), f"the earlier run {run.path}", precede=True)
    if config.get("ckpt_path"):
        state = attribution_state(look_into(Path(config.ckpt_path)))
        return Earlier(_by_task(_files_of(state)), f"the checkpoint {config.ckpt_path}")
    for folder in sorted(filter(Path.is_dir, run_folders(config.trainer)[1]), key=_age, reverse=True):
        if files := importance_files(folder / "importance"):
            return Earlier(_by_task(files), f"the run {folder}", is_named=False)
    return Earlier({}, "no earlier run", is_named=False)


def plasticity_left(
    earlier: Sequence[ImportanceFile],
    options: Mapping[str, Any],
    parameters: Iterable[tuple[str, Tensor]],
    budgets: Mapping[str, float],
) -> dict[str, tuple[float, int]]:
    """Mean plasticity of each layer under the gate of some tasks' importance.

    Args:
        earlier: Importance of each task before.
        options: Of ``AttributionCallback``.
        parameters: The model's, with their names; values are not looked at.
        budgets: Mean plasticity of the matrices that are gated by direction, by name: the same after any task.

    Returns:
        Layer -> mean of the budget, or of ``(1 - importance) ** strength``, over its gated weights, and their number.

    Raises:
        AgclError: If a file does not fit the model or the others.
    """
    named = [(name, parameter) for name, parameter in parameters]
    sizes = {name: parameter.numel() for name, parameter in named}
    merge = RunningMerge(options.get("merge", "maximum"), options.get("importance_bits", 8))
    for file in earlier:
        if any(map(is_of_pair, budgets)) and not sizes.keys() & set(file):
            continue  # of weights that an adapter is beside now: their directions are held, in its pairs
        check_importance(file, named)
        merge.update(file)
    pattern, strength = options.get("parameters", ""), options.get("strength", 1.0)
    merged = {name: levels for name, levels in merge.importance().items() if re.search(pattern, name)}
    means = {name: mean_plasticity(name, levels, strength)[0] for name, levels in merged.items() if name not in budgets}
    return mean_by_layer({name: (mean, sizes[name]) for name, mean in {**means, **budgets}.items() if name in sizes})


def _by_task(files: Iterable[ImportanceFile]) -> dict[str, ImportanceFile]:
    """The latest file of each task: one that was re-estimated sorts behind the first."""
    found = {}
    for file in files:
        if "task" not in file.metadata:
            raise AgclError(f"{file.path} does not say of which task it is; a merged file cannot be told apart.")
        found[file.metadata["task"]] = file
    return found


def _files_of(state: Mapping[str, Any] | None) -> list[ImportanceFile]:
    """What is still there of the files that a callback's state names."""
    files = [] if state is None else [Path(file) for file in state["so_far"]["files"].values()]
    return [open_importance(file) for file in files if file.exists() or index_of(file).exists()]


def _age(folder: Path) -> tuple[int, float]:
    """Grows with later runs: Lightning numbers their folders; where something else names them, it is the clock's."""
    number = re.fullmatch(r"version_(\d+)", folder.name)
    return int(number[1]) if number else -1, folder.stat().st_mtime
