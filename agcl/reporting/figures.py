"""Figures as inline SVG that takes its text colour from the page, so that it reads on light and dark ground."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK = "#0a0b0c"  # stands for the page's text colour until the SVG is written
_THEME: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "svg.fonttype": "path",  # the same widths everywhere
    "font.size": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LINE_COLOURS = ("#2b7fd4", "#d5651d", "#12936a", "#c25aa0", "#8a7a12", "#7a6ad8", "#d24a4a", "#0f93a8", "#7c828a")
"""Their contrast is at least 3 : 1 on the page's light and on its dark ground."""
_STYLES = ("-", "--", ":", "-.")
_FEW = 20  # points of a line that are drawn as such: of a single one there is no line
_NARROWEST = 0.7  # of a figure's own width: on a narrow screen it is scrolled rather than made smaller than that


def draw(name: str, description: str, make: Callable[[], Figure]) -> Markup:
    """Draw a figure in the page's colours.

    Args:
        name: Of the figure, unlike any other on the page: part of its identifiers.
        description: What it shows, for those who cannot see it.
        make: Builds the figure, outside pyplot.

    Returns:
        An SVG element to put into HTML, which names nothing outside itself.
    """
    with matplotlib.rc_context({**_THEME, "svg.hashsalt": name}):
        figure = make()
        for ax in figure.axes:
            for image in ax.images:
                image.set_interpolation("none")  # the cells as they are, not resampled to a resolution
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> Markup:
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))

    def own(match: re.Match[str]) -> str:  # several figures share a page, where an identifier may occur once
        return f' id="{name}-{match[1]}"' if match[1] in referenced else ""

    svg = re.sub(r' id="([^"]+)"', own, svg)
    svg = re.sub(r'(href="|url\()#([^")]+)', rf"\g<1>#{name}-\g<2>", svg)
    head, _, body = svg.partition(">")
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    style = f"width:100%;max-width:{width:.0f}pt;min-width:{_NARROWEST * width:.0f}pt"
    return Markup(f'{head} role="img" aria-label="{escape(description)}" style="{style}">{body.rstrip()}')


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ylabel: str,
    xlabel: str = "",
    xticks: Sequence[str] = (),
    marked: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Lines with a legend.

    Args:
        lines: Name to points; those that are NaN are left out.
        ylabel: What is drawn.
        xlabel: Over what.
        xticks: Names of the positions 0, 1, ...; numbers if empty.
        marked: Name to the position of a point that is drawn larger.
        log: Whether the vertical axis is logarithmic, where the points span a power of ten.
    """
    longest = max(map(len, lines), default=0)
    figure = Figure(figsize=(5.6 + 0.06 * longest, 2.9 + 0.04 * max(map(len, xticks), default=0)), layout="constrained")
    ax = figure.add_subplot()
    looks = cycle((colour, style) for style in _STYLES for colour in LINE_COLOURS)
    for (name, points), (colour, style) in zip(lines.items(), looks, strict=False):
        known = [(x, y) for x, y in points if not math.isnan(y)]
        marker = "." if xticks or len(known) < _FEW else ""
        ax.plot(*zip(*known, strict=True), style, marker=marker, color=colour, label=name, linewidth=1.4)
        for x, y in known:
            if marked and marked.get(name) == x:
                ax.plot([x], [y], "o", color=colour, markersize=7)
    values = [y for points in lines.values() for _, y in points if y > 0]
    if log and max(values, default=0.0) > 10 * min(values, default=0.0):
        ax.set_yscale("log")
    if xticks:
        ax.set_xticks(range(len(xticks)), xticks, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set(ylabel=ylabel, xlabel=xlabel)
    ax.grid(alpha=0.25, color=_INK, linewidth=0.5)
    figure.legend(loc="outside right upper", ncols=1 + len(lines) // 16)
    return figure


def plot_heat(
    grids: Sequence[tuple[Sequence[Sequence[float]], Sequence[str], Sequence[str]]], label: str, largest: float
) -> Figure:
    """Heat maps side by side, with one scale from 0.

    Args:
        grids: Of each: numbers (rows of columns; NaN is left blank), names of the rows, names of the columns.
        label: What the numbers are.
        largest: The end of the scale.
    """
    widths = [1.2 + 0.07 * max(map(len, rows)) + 0.5 * len(columns) for _, rows, columns in grids]
    longest = max(len(column) for _, _, columns in grids for column in columns)
    height = 1.0 + 0.19 * max(len(rows) for _, rows, _ in grids) + 0.05 * longest
    figure = Figure(figsize=(sum(widths) + 0.8, height), layout="constrained")
    axes: Any = figure.subplots(1, len(grids), squeeze=False, width_ratios=widths)[0]
    for ax, (grid, rows, columns) in zip(axes, grids, strict=True):
        image = ax.imshow(grid, cmap="viridis", aspect="auto", vmin=0, vmax=largest)
        ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, ax=list(axes), label=label)
    return figure
