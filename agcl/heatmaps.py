"""What the heat maps of scores and of importance share."""

import math
from collections.abc import Sequence
from typing import Any

DARK_BELOW = 0.43  # viridis: with white text below and black above, the contrast is at least 4.5 : 1 everywhere


def write_numbers(ax: Any, grid: Sequence[Sequence[float]], *, fontsize: float, bold: Sequence[int] = ()) -> None:
    """Write each number, with two digits, into its cell of a heat map in viridis whose colours run from 0 to 1.

    Args:
        ax: Matplotlib axes that show the grid as an image.
        grid: Rows of numbers in [0, 1]; NaN is left blank.
        fontsize: In points.
        bold: For each column the row whose number is bold; none if left out.
    """
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value):
                ax.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=fontsize,
                    color="white" if value < DARK_BELOW else "black",
                    fontweight="bold" if bold and bold[column] == row else "normal",
                    in_layout=False,  # a number stays inside of its cell, so that nobody need measure it
                )
