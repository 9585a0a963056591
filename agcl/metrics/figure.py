"""The score matrix as a picture."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..heatmaps import write_numbers

_CHARACTERS_PER_INCH = 15  # of a title in 9 points


def plot_score_matrix(
    matrix: Tensor, task_names: Sequence[str], ax: Any = None, title: str | None = None, numbers: bool = True
) -> tuple[Any, Any]:
    """Draw a score matrix as a heat map, colours fixed to [0, 1]; the number of the task just learned is bold.

    A matrix with its last row measured, but none between that and row 0, is of joint training: those two are drawn.

    Args:
        matrix: Shape ``(T + 1, T)``, NaN where not measured (left blank).
        task_names: The T names, in the order of learning.
        ax: Matplotlib axes to draw on; a new figure (outside pyplot) if left out.
        title: Heading, for instance the metrics; broken after commas where it is too long for one line.
        numbers: Whether each cell has its number in it. Writing one takes about a millisecond, of which there are
            T (T + 1) in the end.

    Returns:
        Figure and axes.
    """
    num_tasks = len(task_names)
    labels = ["before training", *(f"after {name}" for name in task_names)]
    is_joint = num_tasks > 1 and bool(matrix[1:-1].isnan().all()) and not matrix[-1].isnan().all()
    if is_joint:
        matrix, labels = matrix[[0, -1]], ["before training", "after joint training"]
    figure = None
    if ax is None:
        figure = Figure(figsize=(2.4 + 0.75 * num_tasks, 1.9 + 0.45 * num_tasks), layout="constrained")
        ax = figure.add_subplot()
    image = ax.imshow(matrix.tolist(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    ax.set_xticks(range(num_tasks), task_names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xlabel("task scored")
    if numbers:
        bold = () if is_joint else range(1, num_tasks + 1)
        write_numbers(ax, matrix.tolist(), fontsize=9, bold=bold)
    if title:
        lines = _folded(title, ax.get_window_extent().width / ax.figure.dpi)
        ax.set_title("\n".join(lines), fontsize=9)
        if figure is not None:
            figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))  # not at the cost of the cells
    ax.figure.colorbar(image, ax=ax, label="score", shrink=0.9)
    return ax.figure, ax


def score_matrix_picture(results: Mapping[str, Any]) -> bytes:
    """The score matrix of a run as a PNG, its metrics above it.

    Args:
        results: ``tasks``, ``scores`` (None where not measured) and ``metrics``, as ``scores.json`` has them.

    Returns:
        The file's content.
    """
    matrix = torch.tensor([[math.nan if value is None else value for value in row] for row in results["scores"]])
    figure, _ = plot_score_matrix(matrix, results["tasks"], title=_metrics_line(results["metrics"]))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _metrics_line(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items() if value is not None)


def _folded(title: str, inches: float) -> list[str]:
    """Lines about as wide as the axes: broken after commas, so that a name stays with its number, else at spaces."""
    if ", " in title:
        title = title.replace(" ", "\u00a0").replace(",\u00a0", ", ")
    return textwrap.wrap(title, max(1, int(inches * _CHARACTERS_PER_INCH)), break_long_words=False)
