"""``agcl importance``: what is in importance files, several merged into one, and how far they agree."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor

from agcl.attribution.artefact import ImportanceFile, open_importance, save_importance
from agcl.attribution.levels import Bits, histogram
from agcl.attribution.merging import How
from agcl.attribution.merging import merge as merge_importance
from agcl.attribution.storage import index_of
from agcl.errors import AgclError
from agcl.files import replacing
from agcl.plots import (
    importance_overlaps,
    kind_of,
    layer_of,
    layer_order,
    plot_importance_map,
    plot_importance_overlap,
)
from agcl.terminal import facts_table

_OF_THE_FORMAT = ("format", "format_version", "bits", "agcl_version")
_OF_THE_TASK = ("task", "tasks", "merged")
_SETTINGS = (
    *("model", "source", "estimator", "rule", "score", "sign"),
    *("normalisation", "scope", "quantile", "top_k", "top_k_method", "alpha"),
)


def show(file: Path, *, figure: Path | None = None, overwrite: bool = False) -> None:
    """Show what an importance file says about itself, and its values by layer and by kind of module.

    Args:
        file: The importance file, or the index of a sharded one.
        figure: Draw mean importance by layer and kind of module into this file (png, svg, pdf).
        overwrite: Replace the figure if it exists.
    """
    _check_figure(figure, overwrite)
    importance = open_importance(file)
    by_layer: dict[str, Tensor] = {}
    by_kind: dict[str, Tensor] = {}
    for name, levels in importance.items():
        counts = histogram(levels)
        for groups, group in ((by_layer, layer_of(name)), (by_kind, kind_of(name))):
            groups[group] = groups[group] + counts if group in groups else counts
    console = Console(highlight=False)
    console.print(str(importance.path), style="bold", soft_wrap=True)
    console.print(_metadata_table(importance))
    console.print(_size(importance), soft_wrap=True)
    if by_layer:
        total = torch.stack(list(by_layer.values())).sum(0)
        layers = {layer: by_layer[layer] for layer in sorted(by_layer, key=layer_order)}
        for table in (_value_table("layer", layers, total), _value_table("kind", dict(sorted(by_kind.items())), total)):
            console.print()
            console.print(table)
    _save_figure(console, figure, lambda: plot_importance_map(importance, importance.path.name)[0])


def merge(
    *files: Path,
    output: Path,
    how: How = "maximum",
    bits: Bits | None = None,
    overwrite: bool = False,
) -> None:
    """Merge the importance of several tasks into one file.

    Args:
        files: Importance files of one model.
        output: The file to write.
        how: maximum (default, as in training), mean, or probabilistic_or: 1 - (1 - a)(1 - b)...
        bits: 8 or 16 bits per weight (default: as many as the files have).
        overwrite: Replace the output if it exists.
    """
    for path in (output, index_of(output)):
        _refuse_existing(path, overwrite)
    sources = [open_importance(file) for file in files]
    merged = merge_importance(sources, how, bits)
    save_importance(output, merged, {**_shared_metadata(sources), "tasks": json.dumps(_tasks(sources)), "merged": how})
    console = Console(highlight=False)
    if merged.partial:
        console.print(
            f"Note: {len(merged.partial)} of {len(merged)} parameters are in some of the files only, such as "
            f"`{merged.partial[0]}`; in the others their importance counts as 0."
        )
    _note_differences(console, sources)
    number = f"{len(sources)} files" if len(sources) > 1 else "1 file"
    console.print(f"Merged {number} by {how} into {output}: {_size(open_importance(output))}", soft_wrap=True)


def compare(
    *files: Path,
    top_share: float = 0.01,
    figure: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare importance files pair by pair: cosine similarity, and overlap of the most important weights.

    Args:
        files: Two or more importance files of one model.
        top_share: Share of all weights that counts as the most important (default: 0.01).
        figure: Draw both tables into this file (png, svg, pdf).
        overwrite: Replace the figure if it exists.
    """
    if len(files) < 2:
        raise AgclError(f"There is nothing to compare {files[0]} with; name two importance files or more.")
    if not 0 < top_share <= 1:
        raise AgclError(f"`top_share` is {top_share:g}; choose a share above 0, at most 1.")
    _check_figure(figure, overwrite)
    sources = [open_importance(file) for file in files]
    importances = dict(zip(_labels(sources), sources, strict=True))
    overlaps = importance_overlaps(importances, top_share)
    console = Console(highlight=False)
    _note_differences(console, sources)
    titles = "Cosine similarity", f"Top {100 * top_share:g} %: intersection over union"
    for title, matrix in zip(titles, overlaps, strict=True):
        console.print(_pair_table(title, list(importances), matrix))
    _save_figure(console, figure, lambda: plot_importance_overlap(importances, top_share, overlaps)[0])


# ---------------------------------------------------------------------- text


def _size(importance: ImportanceFile) -> str:
    weights = sum(math.prod(shape) for shape in importance.shapes.values())
    num_bytes = sum(file.stat().st_size for file in importance.files)
    files = f" in {len(importance.files)} files" if len(importance.files) > 1 else ""
    return f"{len(importance):,} tensors, {weights:,} weights of {importance.bits} bits, {decimal(num_bytes)}{files}"


def _metadata_table(importance: ImportanceFile) -> Table:
    metadata = {**importance.metadata, "tasks": ", ".join(_tasks_of(importance))}
    hidden = {*_OF_THE_FORMAT, "task" if "tasks" in importance.metadata else "tasks"}
    first = [key for key in (*_OF_THE_TASK, *_SETTINGS, "num_samples") if key in metadata]
    rows = [(key, metadata[key]) for key in dict.fromkeys((*first, *sorted(metadata))) if key not in hidden]
    by = f"agcl {metadata['agcl_version']}, " if "agcl_version" in metadata else ""
    return facts_table([*rows, ("written by", f"{by}format version {metadata['format_version']}")])


def _value_table(title: str, groups: Mapping[str, Tensor], total: Tensor) -> Table:
    """Number of weights, mean and shares from the histogram of each group's levels."""
    table = Table(box=box.SIMPLE, show_footer=True, show_edge=False)
    cells = {group: _value_cells(counts) for group, counts in {**groups, "all": total}.items()}
    footers = cells.pop("all") if "all" not in groups else _value_cells(total)
    table.add_column(title, "all", overflow="fold")
    for header, footer in zip(("weights", "mean", "> 0.5", "at 0", "at 1"), footers, strict=True):
        table.add_column(header, footer, justify="right", no_wrap=True)
    for group, row in cells.items():
        table.add_row(Text(group), *row)
    return table


def _value_cells(counts: Tensor) -> list[str]:
    number = int(counts.sum())
    if not number:
        return ["0", "", "", "", ""]
    largest = len(counts) - 1
    mean = float(counts.double() @ torch.arange(len(counts), dtype=torch.float64)) / (largest * number)
    above = int(counts[largest // 2 + 1 :].sum())
    shares = (above / number, int(counts[0]) / number, int(counts[-1]) / number)
    return [f"{number:,}", f"{mean:.3f}", *map(_percent, shares)]


def _percent(share: float) -> str:
    """With one digit after the point, but what is not quite none or all does not read so."""
    if share and share < 0.001:
        return "< 0.1 %"
    if share != 1 and share > 0.999:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def _pair_table(title: str, labels: Sequence[str], matrix: Tensor) -> Table:
    """Rows are labelled, columns numbered: labels are long, and terminals narrow."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE, show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("", overflow="fold")
    for number in range(1, len(labels) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, (label, row) in enumerate(zip(labels, matrix.tolist(), strict=True), 1):
        table.add_row(str(number), Text(label), *(f"{value:.3f}" for value in row))
    return table


# ------------------------------------------------------------------ metadata


def _tasks(sources: Sequence[ImportanceFile]) -> list[str]:
    """All tasks that the files are of; a file without one is known by its name."""
    return [task for source in sources for task in _tasks_of(source)]


def _tasks_of(source: ImportanceFile) -> list[str]:
    if "tasks" not in source.metadata:
        return [source.metadata.get("task", source.path.name)]
    try:
        tasks = json.loads(source.metadata["tasks"])
    except ValueError:
        tasks = None
    return list(map(str, tasks)) if isinstance(tasks, list) else [source.metadata["tasks"]]


def _labels(sources: Sequence[ImportanceFile]) -> list[str]:
    """The tasks' names, or the files' where those are the same."""
    for labels in ([" + ".join(_tasks_of(source)) for source in sources], [source.path.name for source in sources]):
        if len(set(labels)) == len(labels):
            return labels
    paths = [str(source.path) for source in sources]
    if len(set(paths)) < len(paths):
        raise AgclError(f"{next(path for path in paths if paths.count(path) > 1)} is named twice.")
    return paths


def _shared_metadata(sources: Sequence[ImportanceFile]) -> dict[str, str]:
    """What all files say alike, but for the task."""
    first = sources[0].metadata
    shared = {key: value for key, value in first.items() if all(s.metadata.get(key) == value for s in sources)}
    return {key: value for key, value in shared.items() if key not in (*_OF_THE_FORMAT, *_OF_THE_TASK)}


def _note_differences(console: Console, sources: Sequence[ImportanceFile]) -> None:
    """Say which settings the files do not share: their numbers then mean different things."""
    for key in _SETTINGS:
        values = list(dict.fromkeys(source.metadata.get(key, "not said") for source in sources))
        if len(values) > 1:
            console.print(Text(f"Note: the files differ in `{key}`: {', '.join(values)}."))


# --------------------------------------------------------------------- files


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise AgclError(f"{path} exists; choose another name, or add --overwrite.")


def _check_figure(path: Path | None, overwrite: bool) -> None:
    """Refuse what could not be drawn before the work is done."""
    if path is None:
        return
    _refuse_existing(path, overwrite)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise AgclError(f"The figure {path} has no known ending; choose one of {', '.join(formats)}.")


def _save_figure(console: Console, path: Path | None, draw: Callable[[], Figure]) -> None:
    if path is not None:
        with replacing(path) as file:
            draw().savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=150)
        console.print(f"Figure: {path}", soft_wrap=True)
