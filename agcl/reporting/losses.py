"""Training losses from what a run's logger left."""

import csv
import re
from pathlib import Path

Curve = list[tuple[float, float]]

_MAX_POINTS = 300  # of a task's curve: a page of many thousand steps stays small
_TAG = re.compile(r"train/(?P<task>[^/]+)/loss")


def training_losses(folder: Path) -> dict[str, Curve]:
    """Task to its training loss over the steps, thinned to means of neighbours; empty where no log has it.

    Args:
        folder: The run's folder, with a ``metrics.csv`` of Lightning's CSVLogger or the event files of TensorBoard.
    """
    path = folder / "metrics.csv"
    curves = _from_csv(path) if path.exists() else _from_events(folder)
    return {task: thinned(sorted(curve)) for task, curve in curves.items() if curve}


def thinned(curve: Curve, most: int = _MAX_POINTS) -> Curve:
    """At most ``most`` points, each the mean of as many neighbours.

    Example:
        >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], most=2)
        [(0.5, 2.0), (2.5, 6.0)]
    """
    size = -(-len(curve) // most)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)] if curve else []
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _from_csv(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag and (match := _TAG.fullmatch(tag)):
                    curves.setdefault(match["task"], []).append((float(row["step"]), float(value)))
    return curves


def _from_events(folder: Path) -> dict[str, Curve]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # slow to import

    board = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    tags = {tag: match["task"] for tag in board.Tags()["scalars"] if (match := _TAG.fullmatch(tag))}
    return {task: [(event.step, event.value) for event in board.Scalars(tag)] for tag, task in tags.items()}
