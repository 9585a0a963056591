"""Plasticity against stability: what each method learns, and what it keeps of it."""

from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from agcl.compare.outcome import Record

_MARKERS = "oPXDsv^<>*phd"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")


def plot_stability_plasticity(record: Record) -> Figure:
    """Learning accuracy against backward transfer: a small dot for each run, a large marker for each method's mean.

    Where all runs have the same number of tasks T, dashed lines join points of equal average performance
    ``AP = LA + BWT (T - 1) / T``. Methods without backward transfer (joint training) are left out and named below.

    Args:
        record: As :func:`agcl.compare.outcome.comparison_record` gives it.

    Returns:
        A figure outside pyplot.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    absent = []
    for (name, method), marker, colour in zip(
        record["methods"].items(), cycle(_MARKERS), cycle(_COLOURS), strict=False
    ):
        points = [
            (run["metrics"]["backward_transfer"], run["metrics"]["learning_accuracy"])
            for run in method["runs"]
            if run["metrics"].get("backward_transfer") is not None
            and run["metrics"].get("learning_accuracy") is not None
        ]
        if not points:
            absent.append(name)
            continue
        transfers, accuracies = zip(*points, strict=True)
        mean = sum(transfers) / len(points), sum(accuracies) / len(points)
        axes.plot(transfers, accuracies, ".", color=colour, markersize=5, alpha=0.6, zorder=2)
        axes.plot(
            *mean, marker, color=colour, markersize=11, markeredgecolor="white", linestyle="none", label=name, zorder=3
        )
    axes.margins(0.12)
    axes.set_xlabel("backward transfer (stability: more is kept to the right)")
    axes.set_ylabel("learning accuracy (plasticity: more is learned at the top)")
    _equal_performance(axes, record)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False)
    if absent:
        figure.supxlabel(f"without a point: {', '.join(absent)}", fontsize=8)
    return figure


def _equal_performance(axes: Any, record: Record) -> None:
    """Dashed lines of equal average performance, labelled at their lower end."""
    lengths = {len(run["tasks"]) for method in record["methods"].values() for run in method["runs"] if run["tasks"]}
    if len(lengths) != 1 or (num_tasks := lengths.pop()) < 2:
        return
    share = (num_tasks - 1) / num_tasks
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for tenths in range(-10, 11):
        level = tenths / 10
        x = min(right, (level - bottom) / share)  # the lower right end of the line within the axes
        if x > left and level - share * x < top:
            axes.axline((x, level - share * x), slope=-share, color="0.75", linestyle="--", linewidth=0.8, zorder=1)
            if x < left + 0.08 * (right - left):
                continue  # its label would lie across the axis
            place: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right", "va": "bottom"}
            axes.annotate(f"AP {level:.1f}", (x, level - share * x), **place, fontsize=7, color="0.45", zorder=1)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
