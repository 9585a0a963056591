"""Pictures of importance, plasticity and relevance, from plain mappings of tensors; no global plotting state."""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from agcl.attribution.artefact import LazyImportance, shapes_of
from agcl.attribution.levels import CHUNK, DTYPES, MAX_LEVEL, bits_of, chunks, histogram
from agcl.blocks import kind_of, layer_of, layer_order
from agcl.errors import AgclError
from agcl.heatmaps import write_numbers

_IMPORTANCE, _PLASTICITY = "mean importance\n0: free, 1: frozen", "mean plasticity\n0: frozen, 1: free"
_INCHES = 0.05  # height of a character in a slanted label
_DIGIT = 2**16 - 1


def plot_importance_map(importance: Mapping[str, Tensor], title: str | None = None) -> tuple[Figure, Any]:
    """Heat map of mean importance by layer (rows) and kind of module (columns).

    Args:
        importance: Parameter name -> uint8 fixed point (``value / 255``) or floating-point tensor in [0, 1].
        title: Heading.

    Returns:
        Figure and axes. Cells without a parameter are blank.

    Raises:
        AgclError: If the mapping is empty.
    """
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    path_of: dict[str, str] = {}  # kind -> where it is in a layer, so that those of one module stand side by side
    for name, values in importance.items():
        cell = layer_of(name), kind_of(name)
        path_of.setdefault(cell[1], re.sub(r"^.*?\.\d+\.", "", name))
        total, count = sums.get(cell, (0.0, 0))
        sums[cell] = total + _total(values), count + values.numel()
    layers = sorted({layer for layer, _ in sums}, key=layer_order)
    outside = {kind for layer, kind in sums if not layer.startswith("layer ")}
    kinds = sorted(path_of, key=lambda kind: (kind in outside, path_of[kind]))
    grid = [
        [sums[cell][0] / sums[cell][1] if (cell := (row, kind)) in sums else float("nan") for kind in kinds]
        for row in layers
    ]
    return _by_layer(grid, layers, kinds, title or "Mean importance by layer and module", _IMPORTANCE)


def plot_plasticity(plasticity: Mapping[str, Mapping[str, float]], title: str | None = None) -> tuple[Figure, Any]:
    """Heat map of what each layer can still learn (rows) after each task (columns), colours fixed to [0, 1].

    Args:
        plasticity: Name of the task learned -> layer, as :func:`layer_of` names it -> mean plasticity in [0, 1]; tasks
            in the order of learning.
        title: Heading.

    Returns:
        Figure and axes. Layers without a value after a task are blank.

    Raises:
        AgclError: If there is no task or no layer.
    """
    layers = sorted({layer for values in plasticity.values() for layer in values}, key=layer_order)
    grid = [[values.get(layer, math.nan) for values in plasticity.values()] for layer in layers]
    columns = [f"after {task}" for task in plasticity]
    return _by_layer(grid, layers, columns, title or "Remaining plasticity by layer", _PLASTICITY, largest=1.0)


def importance_overlap(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], top_share: float = 0.01
) -> tuple[float, float]:
    """How far two tasks rest on the same weights; the numbers of :func:`importance_overlaps` for one pair.

    Example:
        >>> a, b = torch.tensor([255, 0], dtype=torch.uint8), torch.tensor([255, 255], dtype=torch.uint8)
        >>> cosine, iou = importance_overlap({"weight": a}, {"weight": b}, top_share=0.5)
        >>> round(cosine, 4), iou
        (0.7071, 0.5)
    """
    cosine, iou = importance_overlaps({"the first": a, "the second": b}, top_share)
    return float(cosine[0, 1]), float(iou[0, 1])


def importance_overlaps(
    importances: Mapping[str, Mapping[str, Tensor]], top_share: float = 0.01
) -> tuple[Tensor, Tensor]:
    """How far each pair of tasks rests on the same weights, all in two passes over each task's importance.

    The top sets are those of all entries at or above the level that the ``top_share`` largest ones reach; ties at that
    level are all in, so that a set may be larger than its share. Importance of 0 is never in.

    Args:
        importances: Task name -> its own importance (before merging): parameter name -> fixed point (uint8, uint16) or
            floating point, non-negative; open files too. The same names and shapes in all.
        top_share: Share of all entries that counts as the top.

    Returns:
        Cosine similarity of all entries, and intersection over union of the top sets: float64 of shape (tasks, tasks),
        in [0, 1]; 0 where nothing is important.

    Raises:
        AgclError: If names or shapes differ.
    """
    tasks = list(importances)
    _check_alike(importances)
    thresholds = torch.tensor([[_top_level(importances[task], top_share)] for task in tasks], dtype=torch.float64)
    buffer = torch.empty(len(tasks), CHUNK, dtype=torch.float64)
    dots, common = torch.zeros(2, len(tasks), len(tasks), dtype=torch.float64)
    for name in importances[tasks[0]]:
        values = [importances[task][name] for task in tasks]
        for pieces in chunks(*values):
            part = buffer[:, : len(pieces[0])]
            for row, piece in zip(part, pieces, strict=True):
                row.copy_(piece)
            dots += part @ part.T
            top = (part >= thresholds).float()
            common += top @ top.T  # of a chunk, hence exact in float32
    lengths, sizes = dots.diag(), common.diag()
    return _ratio(dots, (lengths[:, None] * lengths).sqrt()), _ratio(common, sizes[:, None] + sizes - common)


def plot_importance_overlap(
    importances: Mapping[str, Mapping[str, Tensor]],
    top_share: float = 0.01,
    overlaps: tuple[Tensor, Tensor] | None = None,
) -> tuple[Figure, Any]:
    """Overlap of each pair of tasks: cosine similarity, and intersection over union of the most important weights.

    Args:
        importances: Task name -> its own importance, as for :func:`importance_overlaps`.
        top_share: See :func:`importance_overlaps`.
        overlaps: What that function gave, if it has been called already.

    Returns:
        Figure and the two axes (the paper's Fig. 1 shows such overlaps). Independent top sets of a share s of all
        entries overlap by about s / (2 - s), which stands below the second.
    """
    names = list(importances)
    panels = [panel.tolist() for panel in overlaps or importance_overlaps(importances, top_share)]
    width, height = max(7.0, 3.2 + 1.3 * len(names)), 2.1 + 0.55 * len(names) + _INCHES * max(map(len, names))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = "Cosine similarity", f"Top {100 * top_share:g} %: intersection over union"
    for ax, panel, title in zip(axes, panels, titles, strict=True):
        image = ax.imshow(panel, vmin=0, vmax=1, cmap="viridis")
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
        ax.set_title(title, fontsize=10)
        write_numbers(ax, panel, fontsize=8)
    axes[1].set_xlabel(f"unrelated tasks: about {top_share / (2 - top_share):.2g}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="overlap (1: the same weights)")
    return figure, axes


def join_characters(
    decode: Callable[[list[int]], str], input_ids: Sequence[int] | Tensor, relevance: Sequence[float] | Tensor
) -> tuple[list[str], list[float]]:
    """Tokens as text; those that are a character only together are one piece, with the sum of their relevance.

    Args:
        decode: From token ids to text, as ``tokenizer.decode``.
        input_ids: Token ids.
        relevance: One number each.

    Returns:
        Texts and numbers for :func:`token_relevance_html`.
    """
    texts: list[str] = []
    values: list[float] = []
    open_ids: list[int] = []  # of the last piece, while it ends inside a character
    for token, value in zip(input_ids, relevance, strict=True):
        is_inside = bool(open_ids)
        open_ids.append(int(token))
        text = decode(open_ids)
        if is_inside:
            texts[-1], values[-1] = text, values[-1] + float(value)
        else:
            texts.append(text)
            values.append(float(value))
        if not text.endswith("\ufffd"):
            open_ids = []
    return texts, values


def token_relevance_html(tokens: Sequence[str], relevance: Sequence[float] | Tensor) -> str:
    """Tokens on coloured ground: red for positive, blue for negative relevance, scaled by the largest magnitude.

    Args:
        tokens: Text of each token, shown with its white space; a line break with a sign before it.
        relevance: One number each; shown as tooltip.

    Returns:
        One HTML element, everything escaped; black text on a light ground, readable in dark pages too.
    """
    values = [float(value) for value in relevance]
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        faded = round(255 * (1 - 0.6 * abs(value) / largest))  # black text stays readable on it
        colour = f"rgb(255,{faded},{faded})" if value >= 0 else f"rgb({faded},{faded},255)"
        spans.append(f'<span style="background:{colour};color:black" title="{value:+.3g}">{_visible(token)}</span>')
    return f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.8">{"".join(spans)}</div>'


def _visible(token: str) -> str:
    return html.escape(token).replace("\n", "\u21b5\n")


def _by_layer(
    grid: list[list[float]],
    layers: list[str],
    columns: list[str],
    title: str,
    label: str,
    largest: float | None = None,
) -> tuple[Figure, Any]:
    """Heat map with a row for each layer; colours from 0 to ``largest``, or to the largest value."""
    if not layers:
        raise AgclError("There is nothing to draw: the mapping is empty. Values exist once the first task is learned.")
    height = 2.0 + 0.2 * len(layers) + _INCHES * max(map(len, columns))
    figure = Figure(figsize=(3.2 + 0.55 * len(columns), height), layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(grid, cmap="viridis", aspect="auto", vmin=0, vmax=largest)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(layers)), layers, fontsize=8)
    ax.set_title(title, fontsize=10)
    figure.colorbar(image, ax=ax, label=label)
    return figure, ax


def _total(values: Tensor) -> float:
    if values.is_floating_point():
        return float(values.sum(dtype=torch.float64))
    return int(values.sum(dtype=torch.int64)) / MAX_LEVEL[bits_of(values)]


def _check_alike(importances: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse importances of different names or shapes."""
    (first, before), *others = ((task, shapes_of(importance)) for task, importance in importances.items())
    for task, shapes in others:
        if different := before.keys() ^ shapes.keys():
            raise AgclError(f"Only one of {first} and {task} covers `{min(different)}`; compare the tasks of one run.")
        for name, shape in shapes.items():
            if shape != before[name]:
                raise AgclError(
                    f"`{name}` has shape {before[name]} in {first} and {shape} in {task}; compare the tasks of one run."
                )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and 0 where there is nothing."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(part))


def _top_level(importance: Mapping[str, Tensor], top_share: float) -> float:
    """Largest value that at least ``top_share`` of all entries reach; never 0, so that unimportant entries stay out."""
    rank = max(1, math.ceil(top_share * sum(math.prod(shape) for shape in shapes_of(importance).values())))
    bits = importance.bits if isinstance(importance, LazyImportance) else None  # known without reading
    for dtype_bits, dtype in DTYPES.items():
        if bits is None and all(values.dtype == dtype for values in importance.values()):
            bits = dtype_bits
    if bits is not None:
        counts = torch.zeros(MAX_LEVEL[bits] + 1, dtype=torch.int64)
        for values in importance.values():
            counts += histogram(values)
        return max(1, _reached(counts, rank)[0])
    return max(_ranked_value(importance, rank), math.ulp(0.0))


def _ranked_value(importance: Mapping[str, Tensor], rank: int) -> float:
    """The ``rank``-th largest of all entries, non-negative floats; exact, and nothing is sorted or kept.

    It is found by digits of 16 bits, the highest first (the bit patterns of such floats are in their order): each digit
    from its histogram among the entries that share the higher ones.
    """
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = torch.zeros(_DIGIT + 1, dtype=torch.int64)
        for values in importance.values():
            for (piece,) in chunks(values):
                bits = piece.double().view(torch.int64)
                if shift < 48:
                    bits = bits[bits >> (shift + 16) == prefix]
                counts += torch.bincount(bits >> shift & _DIGIT, minlength=_DIGIT + 1).cpu()
        digit, rank = _reached(counts, rank)
        prefix = prefix << 16 | digit
    return float(torch.tensor(prefix).view(torch.float64))


def _reached(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th largest entry, and its rank within that bin."""
    at_or_above = counts.flip(0).cumsum(0).flip(0)
    position = max(0, int((at_or_above >= rank).sum()) - 1)
    return position, rank - int(at_or_above[position] - counts[position])
