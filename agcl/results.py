"""What a run's folder says of itself in ``scores.json``, and what a model is called where others read it."""

import json
import os
from pathlib import Path
from typing import Any

from agcl.errors import AgclError

METRIC_MEANINGS = {
    "average_performance": "mean score on the tasks learned",
    "backward_transfer": "mean change of a task's score since it was learned; forgetting is negative",
    "forgetting": "mean fall of a task's score from its best",
    "forward_transfer": "mean gain of a task's score before it is learned itself",
    "learning_accuracy": "mean score of a task right after it was learned",
}
"""Name of a continual metric, as in ``agcl.metrics.functional`` and ``scores.json``, and what it says."""

_KEYS = ("tasks", "scores", "regime", "model", "metrics")


def read_results(folder: Path) -> dict[str, Any]:
    """What ``scores.json`` says: tasks, score matrix (null where nothing was measured), metrics, versions and so on.

    Args:
        folder: The run's.

    Raises:
        AgclError: If it is not a run's folder, or what it holds was not written by agcl.
    """
    path = folder / "scores.json"
    if not folder.is_dir():
        raise AgclError(f"{folder} is not a folder; name a run's folder, which holds scores.json.")
    if not path.exists():
        runs = sorted(folder.glob("*/scores.json"), key=lambda found: found.stat().st_mtime)
        hint = f"; did you mean {runs[-1].parent}?" if runs else "; it is written when the first task has been learned."
        raise AgclError(f"There is no scores.json in {folder}{hint}")
    results = read_json(path)
    for key in _KEYS:
        if key not in results:
            raise AgclError(f"{path} has no `{key}`: it is not what agcl writes.")
    return results


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AgclError: If the file holds something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AgclError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(parsed, dict):
        raise AgclError(f"{path} holds no JSON object: it is not what agcl writes.")
    return parsed


def shown_name(model: str) -> str:
    """A model's name as others may read it: of a local path its last part alone.

    Args:
        model: A name on the hub, ``builtin:...``, or a path.

    Example:
        >>> shown_name("/home/me/models/mine"), shown_name("owner/name")
        ('mine', 'owner/name')
    """
    path = Path(model)
    # A file from another machine may name a path that is not on this one.
    is_local = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2 or path.exists()
    return os.path.basename(os.path.abspath(path.expanduser())) if is_local else model
