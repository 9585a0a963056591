"""The parts of the page, each from what is known of a run."""

import math
from typing import Any

from markupsafe import Markup

from agcl.plots import importance_overlaps, layer_order, plot_importance_overlap
from agcl.reporting.figures import draw, plot_heat, plot_lines
from agcl.reporting.importance import ImportanceSummary, summarise
from agcl.reporting.record import RunRecord, as_float
from agcl.task_pairs import num_pairs

_TOP_SHARE = 0.01  # of all weights, for the overlap of the most important ones


def matrices(record: RunRecord) -> list[dict[str, Any]]:
    """The score matrix and those of the probes: title, and rows of label and values."""
    scores = {"Score": record.results["scores"]}
    for name, matrix in (record.results.get("probes") or {}).items():
        if name.startswith("score/"):
            scores[f"Score on {name.removeprefix('score/')}"] = matrix
    labels = ["before training", *(f"after {task}" for task in record.tasks)]
    if record.is_joint:
        labels[-1] = "after joint training"
    return [
        {
            "title": title,
            "rows": [
                (index, label, values)
                for index, (label, values) in enumerate(zip(labels, matrix, strict=True))
                if any(value is not None for value in values)
            ],
        }
        for title, matrix in scores.items()
    ]


def curves(record: RunRecord) -> list[tuple[str, Markup]]:
    """Score and loss of each task over the tasks, and the training loss."""
    moments = ["before", *(f"{task}" for task in record.tasks)]
    learned = {} if record.is_joint else {task: float(index + 1) for index, task in enumerate(record.tasks)}
    curves = []
    for key, title, name, log in (
        ("scores", "Score of each task", "curve-score", False),
        ("nll", "Loss on each task's answers (nats per token)", "curve-nll", True),
    ):
        if matrix := record.results.get(key):
            columns = zip(record.tasks, zip(*matrix, strict=True), strict=True)
            lines = {task: [(x, as_float(y)) for x, y in enumerate(column)] for task, column in columns}
            lines = {task: points for task, points in lines.items() if not all(math.isnan(y) for _, y in points)}
            ylabel = "score" if key == "scores" else "nats per token"
            curves.append(
                (
                    title,
                    draw(
                        name,
                        title,
                        lambda a=(lines, ylabel), b=log: plot_lines(  # type: ignore[misc]
                            *a, xlabel="after learning", xticks=moments, marked=learned, log=b
                        ),
                    ),
                )
            )
    if record.losses:
        title = "Training loss (nats per answer token)"
        curves.append(
            (
                title,
                draw(
                    "curve-training",
                    title,
                    lambda: plot_lines(record.losses, "nats per token", xlabel="optimizer step", log=True),
                ),
            )
        )
    return curves


def importance(record: RunRecord, with_importance: bool) -> dict[str, Any]:
    """Figures of the importance files, and the summary that they are drawn from.

    Args:
        record: The run; what is left out is added to its ``missing``.
        with_importance: Whether to read the files through.

    Returns:
        ``summary``; ``overview``, ``overlap`` (SVG or None); ``no_overlap`` (why not); ``maps`` (task and SVG).
    """
    found: dict[str, Any] = {"summary": None, "overview": None, "maps": [], "overlap": None}
    found["no_overlap"] = "There is one importance file: nothing to compare it with."
    if not record.importance:
        return found
    if not with_importance:
        record.missing.append("Importance, overlap: left out, as `--no_importance` asked.")
        return found
    gate = record.gate or {}
    merge = None if noted_plasticity(record) else gate.get("merge", "maximum")
    summary = summarise(record.importance, merge, float(gate.get("strength", 1.0)))
    found["summary"] = summary
    tasks = list(summary.cells)
    layers, kinds = summary.layers, summary.kinds
    by_layer, by_kind = ({task: summary.by(task, part) for task in tasks} for part in (0, 1))
    grids = [
        ([[by_layer[task].get(layer, math.nan) for task in tasks] for layer in layers], layers, tasks),
        ([[by_kind[task].get(kind, math.nan) for task in tasks] for kind in kinds], kinds, tasks),
    ]
    label, title = (
        "mean importance\n(0: free, 1: frozen)",
        "Mean importance of each task by layer, and by kind of module",
    )
    found["overview"] = draw("importance", title, lambda: plot_heat(grids, label, _largest(grids)))
    for index, task in enumerate(tasks):
        cells = {cell: mean.value for cell, mean in summary.cells[task].items()}
        grid = [([[cells.get((layer, kind), math.nan) for kind in kinds] for layer in layers], layers, kinds)]
        title = f"Mean importance of {task} by layer and kind of module"
        figure = draw(f"importance-{index}", title, lambda g=grid: plot_heat(g, label, _largest(g)))  # type: ignore[misc]
        found["maps"].append((task, figure))
    if len(tasks) > 1 and num_pairs(record.importance[tasks[0]]):
        found["no_overlap"] = "Each task had a LoRA pair of its own: no two share weights."
    elif len(tasks) > 1:
        overlaps = importance_overlaps(record.importance, _TOP_SHARE)
        title = "Overlap of the tasks' importance: cosine similarity, and intersection over union of the top weights"
        found["overlap"] = draw(
            "overlap", title, lambda: plot_importance_overlap(record.importance, _TOP_SHARE, overlaps)[0]
        )
    return found


def _largest(grids: Any) -> float:
    return max(value for grid, _, _ in grids for row in grid for value in row if not math.isnan(value)) or 1.0


def plasticity(record: RunRecord, summary: ImportanceSummary | None, with_importance: bool) -> dict[str, Any]:
    """What each layer can still learn after each task: as the run noted it, else from the importance files."""
    noted = noted_plasticity(record)
    source, values = "as the run noted it", noted
    gate = record.gate
    if not noted and summary is not None:
        # A gate by direction (of `auto` it is not known) is not made of the files' importance.
        is_other = gate is not None and (gate.get("directions") or gate.get("reestimate"))
        if gate is None or is_other or gate.get("control", "none") == "flattened":
            record.missing.append(
                "Plasticity left: the run did not note it, and how its gate was made of the files is not known."
            )
            return {"figure": None, "source": ""}
        source, values = "computed from the importance files and the gate's settings", summary.plasticity
    if not values:
        if gate is not None and not with_importance:
            record.missing.append("Plasticity left: the run did not note it; it takes reading the importance files.")
        return {"figure": None, "source": ""}
    layers = sorted({layer for means in values.values() for layer in means}, key=layer_order)
    columns = [f"after {task}" for task in values]
    grid = [([[means.get(layer, math.nan) for means in values.values()] for layer in layers], layers, columns)]
    figure = draw(
        "plasticity",
        "Mean plasticity left in each layer after each task",
        lambda: plot_heat(grid, "mean plasticity\n(0: frozen, 1: free)", 1.0),
    )
    return {"figure": figure, "source": source, "lowest": min(min(m.values()) for m in values.values())}


def noted_plasticity(record: RunRecord) -> dict[str, dict[str, float]]:
    """Task learned to layer to mean plasticity, where the run noted it."""
    return {task: layers for task, layers in (record.results.get("plasticity") or {}).items() if layers}


def cost(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run took and ran on, as text."""
    rows: list[tuple[str, Any]] = []
    if (seconds := results.get("wall_seconds")) is not None:
        rows.append(("wall time", f"{seconds:,.0f} s"))
    if (peak := results.get("peak_memory_bytes")) is not None:
        rows.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    if (weights := results.get("trainable_weights")) is not None:
        rows.append(("trained weights", f"{weights:,}"))
    if (extra := results.get("extra_bytes_per_weight")) is not None:
        rows.append(("kept between steps", f"{extra:.2f} bytes per weight beyond plain training"))
    rows += [(key, results.get(key)) for key in ("precision", "seed")]
    rows += [(key.replace("_", " "), value) for key, value in (results.get("environment") or {}).items()]
    rows += [(f"{name} version", version) for name, version in (results.get("versions") or {}).items()]
    return [(key, str(value)) for key, value in rows if value is not None]
