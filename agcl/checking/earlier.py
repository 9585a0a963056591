"""Plasticity that the importance of earlier tasks leaves to each task, as far as a run has left such importance."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agcl.attribution.artefact import ImportanceFile, check_importance, open_importance
from agcl.attribution.merging import RunningMerge
from agcl.errors import AgclError
from agcl.gating.plasticity import summary
from agcl.plots import layer_of, layer_order


@dataclass(frozen=True)
class Earlier:
    """Importance files of tasks, and where they were found.

    Attributes:
        files: Task name -> its file.
        origin: In words.
        is_named: Whether the user named them, or the checkpoint that they belong to.
    """

    files: dict[str, ImportanceFile]
    origin: str
    is_named: bool = True


def find_earlier(config: Any) -> Earlier:
    """The importance files that a configuration leads to.

    Those named by the option ``importance``; else those of the checkpoint to resume from; else those of the newest run
    in the logger's folder that has some.

    Args:
        config: Of ``agcl check``.

    Raises:
        AgclError: If a file cannot be read.
    """
    if config.importance:
        return Earlier(_by_task(config.importance), "the files named by --importance")
    if config.get("ckpt_path"):
        return Earlier(_by_task(_files_of_checkpoint(config.ckpt_path)), f"the checkpoint {config.ckpt_path}")
    for folder in _run_folders(config.trainer.logger):
        if paths := sorted(folder.glob("importance/*.safetensors")):
            return Earlier(_by_task(paths), f"the run {folder}", is_named=False)
    return Earlier({}, "no earlier run", is_named=False)


def plasticity_left(
    earlier: Sequence[ImportanceFile], options: Mapping[str, Any], parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, tuple[float, int]]:
    """Mean plasticity of each layer under the gate of some tasks' importance.

    Args:
        earlier: Importance of each task before.
        options: Of ``AttributionCallback``.
        parameters: The model's, with their names; values are not looked at.

    Returns:
        Layer -> mean of ``(1 - importance) ** strength`` over its gated weights, and their number.

    Raises:
        AgclError: If a file does not fit the model or the others.
    """
    named = [(name, parameter) for name, parameter in parameters]
    merge = RunningMerge(options.get("merge", "maximum"), options.get("importance_bits", 8))
    for file in earlier:
        check_importance(file, named)
        merge.update(file)
    pattern, strength = options.get("parameters", ""), options.get("strength", 1.0)
    layers: dict[str, tuple[float, int]] = {}
    for name, levels in merge.importance().items():
        if not re.search(pattern, name):
            continue
        mean, count = layers.get(layer_of(name), (0.0, 0))
        total = count + levels.numel()
        own, _ = summary(name, levels, strength)
        layers[layer_of(name)] = ((mean * count + own * levels.numel()) / max(total, 1), total)
    return {layer: layers[layer] for layer in sorted(layers, key=layer_order)}


def _by_task(paths: Iterable[str | Path]) -> dict[str, ImportanceFile]:
    """The latest file of each task: one that was re-estimated sorts behind the first."""
    found = {}
    for path in paths:
        file = open_importance(path)
        if "task" not in file.metadata:
            raise AgclError(f"{path} does not say of which task it is; a merged file cannot be told apart by task.")
        found[file.metadata["task"]] = file
    return found


def _files_of_checkpoint(path: str) -> list[str]:
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types for a file that is not right
        raise AgclError(f"The checkpoint {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if "AttributionCallback" in key]
    return [str(file) for state in states for file in state["so_far"]["files"].values() if Path(file).exists()]


def _run_folders(logger: Any) -> list[Path]:
    """Folders of earlier runs, the newest first."""
    loggers = logger if isinstance(logger, list) else [logger]
    options = next((each.init_args for each in loggers if hasattr(each, "init_args")), None)
    if options is None or not options.get("save_dir"):
        return []
    root = Path(options.save_dir) / str(options.get("name") or "")
    numbered = [(int(match[1]), path) for path in root.glob("version_*") if (match := re.search(r"_(\d+)$", path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]
