"""A comparison's tables: on the terminal, as Markdown, and a row for each run as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from agcl.compare.outcome import COSTS, GENERAL_FORGETTING, RECOVERY, Record, metric_names
from agcl.compare.runs import values_text

_HEADERS = {
    "average_performance": "AP",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer": "FWT",
    "learning_accuracy": "LA",
    GENERAL_FORGETTING: "general forgetting (nats)",
    RECOVERY["divergence"]: "KL (nats)",
    RECOVERY["score"]: "old",
    RECOVERY["recovered_score"]: "recovered",
    "wall_seconds": "wall time (s)",
    "processor_seconds": "processor time (s)",
    "peak_memory_bytes": "peak memory (GiB)",
    "extra_bytes_per_weight": "extra bytes / weight",
}
_SCALES = {"peak_memory_bytes": 2.0**-30}
_DIGITS = {"wall_seconds": 0, "processor_seconds": 0, "peak_memory_bytes": 2, "extra_bytes_per_weight": 2}
_UNDEFINED = "-"
_BETWEEN = 2  # characters between two columns of a table on the terminal

Grid = tuple[str, list[str], list[list[str]]]
"""A title, the headers, and rows of cells."""


def grids(record: Record) -> list[Grid]:
    """The tables as text: means, paired differences, chosen settings with all trials."""
    return [_scores(record), _costs(record), _differences(record), _trials(record)]


def rich_tables(record: Record, width: int) -> list[Table]:
    """The tables for the terminal.

    Args:
        record: The comparison.
        width: Of the terminal, in characters. Columns that do not fit beside the others, their words unbroken, follow
            in a table of their own.
    """
    tables = []
    for title, headers, rows in grids(record):
        # A line is broken between a mean and its deviation.
        columns = [[cell.replace(" ± ", " ±") for cell in cells] for cells in zip(headers, *rows, strict=True)]
        for number, group in enumerate(_fitting(columns, width)):
            table = Table(
                title=f"{title}, continued" if number else title,
                title_justify="left",
                title_style="bold",
                box=box.SIMPLE,
                show_edge=False,
                padding=(0, 1, 0, 0),
            )
            for cells, size in zip(group, _widths(group, width), strict=True):
                is_first = cells is columns[0]
                table.add_column(cells[0], justify="left" if is_first else "right", overflow="fold", width=size)
            for row in zip(*(cells[1:] for cells in group), strict=True):
                table.add_row(*map(Text, row))
            tables.append(table)
    return tables


def _fitting(columns: list[list[str]], width: int) -> list[list[list[str]]]:
    """The first column with as many of the others, in their order, as fit beside it, and with the next ones, ..."""
    first, *others = columns
    groups: list[list[list[str]]] = []
    room = 0
    for cells in others:
        room -= _longest_word(cells) + _BETWEEN
        if not groups or room < 0:
            groups.append([first])
            room = width - sum(_longest_word(each) + _BETWEEN for each in (first, cells))
        groups[-1].append(cells)
    return groups


def _widths(group: list[list[str]], width: int) -> list[int]:
    """Each column's: its longest word; what is left of the terminal goes to those first that want the least more."""
    widths = [_longest_word(cells) for cells in group]
    wanted = [max(map(cell_len, cells)) - least for cells, least in zip(group, widths, strict=True)]
    room = width - sum(widths) - _BETWEEN * len(widths)
    if room < 0:  # a word of one column alone does not fit
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest], room = max(widths[widest] + room, 1), 0
    for index in sorted(range(len(group)), key=wanted.__getitem__):
        more = min(room, wanted[index])
        widths[index] += more
        room -= more
    return widths


def _longest_word(cells: Sequence[str]) -> int:
    return max(cell_len(word) for cell in cells for word in cell.split() or [""])


def markdown(record: Record) -> str:
    """Everything as Markdown: tables, warnings, notes, failures."""
    parts = ["# Comparison"]
    for title, headers, rows in grids(record):
        alignment = ["---", *["---:"] * (len(headers) - 1)]
        lines = [" | ".join(cells) for cells in (headers, alignment, *rows)]
        parts += [_escaped(f"## {title}"), "\n".join(_escaped(f"| {line} |") for line in lines)]
    parts.append("![learning accuracy against backward transfer](stability_plasticity.png)")
    for title, texts in remarks(record):
        parts += [f"## {title}", "\n".join(f"- {text}" for text in texts)]
    return "\n\n".join(parts) + "\n"


def remarks(record: Record) -> list[tuple[str, list[str]]]:
    """Warnings, notes, failed and missing runs, as far as there are any."""
    failures = [f"{run['folder']}: {run['error']} (log.txt there)" for run in record["failures"]]
    missing = [f"{folder}: not run, or not to its end" for folder in record["missing"]]
    own = [("Warnings", record["warnings"]), ("Notes", record["notes"])]
    return [(title, texts) for title, texts in [*own, ("Failed runs", failures), ("Missing runs", missing)] if texts]


def csv_text(record: Record) -> str:
    """One row for each run, trials included: method, hyper-parameters, seed, order, metrics."""
    runs = [(kind, run) for method in record["methods"].values() for kind in ("trials", "runs") for run in method[kind]]
    keys = list(dict.fromkeys(key for _, run in runs for key in run["values"]))
    metrics = metric_names([run for _, run in runs])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "method", "seed", "order", "state", *keys, *metrics, "device", "folder"])
    for kind, run in runs:
        values = [run["values"].get(key, "") for key in keys]
        scores = ["" if run["metrics"].get(name) is None else run["metrics"][name] for name in metrics]
        order = "" if run["order"] is None else run["order"]
        name, ends = kind.removesuffix("s"), [run["device"] or "", run["folder"]]
        writer.writerow([name, run["method"], run["seed"], order, run["state"], *values, *scores, *ends])
    return text.getvalue()


def _scores(record: Record) -> Grid:
    names = _metrics(record, costs=False)
    rows = [
        [name, *(_mean_and_deviation(metric, method["summary"].get(metric)) for metric in names)]
        for name, method in record["methods"].items()
    ]
    return "Mean and standard deviation over the runs", ["method", *map(_header, names)], rows


def _costs(record: Record) -> Grid:
    names = _metrics(record, costs=True)
    rows = []
    for name, method in record["methods"].items():
        cells = [_mean_and_deviation(metric, method["summary"].get(metric)) for metric in names]
        done = sum(run["state"] == "finished" for run in method["runs"])
        devices = dict.fromkeys(run["device"] or "not recorded" for run in method["runs"] if run["metrics"])
        rows.append(
            [name, _chosen(method), f"{done} of {len(method['runs'])}", *cells, ", ".join(devices) or _UNDEFINED]
        )
    title = "Chosen settings (* at the edge of those tried), finished runs, and what they cost"
    return title, ["method", "chosen", "runs", *map(_header, names), "device"], rows


def _differences(record: Record) -> Grid:
    names = _metrics(record, costs=False)
    rows = []
    for name, method in record["methods"].items():
        if name != record["reference"]:
            cells = [_interval(metric, method["differences"].get(metric)) for metric in names]
            number = max((entry["number"] for entry in method["differences"].values()), default=0)
            rows.append([name, str(number), *cells])
    title = f"Paired differences to {record['reference']}, with {100 * record['confidence']:g} % bootstrap intervals"
    return title, ["method", "pairs", *map(_header, names)], rows


def _trials(record: Record) -> Grid:
    rows = []
    for name, method in record["methods"].items():
        for run in method["trials"]:
            score = run["metrics"].get(record["selection"])
            mark = "chosen" if run["values"] == method["chosen"] else ""
            text = run["state"] if score is None else _number(record["selection"], score)
            rows.append([name, values_text(run["values"]), text, mark])
    title = f"Trials, on seed {record['tuning_seed']}"
    return title, ["method", "tried", _header(record["selection"]), ""], rows


def _metrics(record: Record, *, costs: bool) -> list[str]:
    names = metric_names([run for method in record["methods"].values() for run in method["runs"]])
    return [name for name in names if (name in COSTS) == costs]


def _chosen(method: Record) -> str:
    if method["chosen"] is None:
        return _UNDEFINED
    text = {f"{key}{'*' if key in method['at_edge'] else ''}": value for key, value in method["chosen"].items()}
    return values_text(text)


def _header(metric: str) -> str:
    return _HEADERS.get(metric, metric.replace("_", " "))


def _mean_and_deviation(metric: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return _UNDEFINED
    texts = [_number(metric, value) for value in (entry["mean"], entry["standard_deviation"]) if value is not None]
    return " ± ".join(texts)


def _interval(metric: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return _UNDEFINED
    text = _number(metric, entry["mean"], "+")
    if entry["low"] is None:
        return text
    return f"{text} [{_number(metric, entry['low'], '+')}, {_number(metric, entry['high'], '+')}]"


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{value * _SCALES.get(metric, 1.0):{sign}.{_DIGITS.get(metric, 3)}f}"


def _escaped(line: str) -> str:
    """Two asterisks in a line would make what is between them italic."""
    return line.replace("*", r"\*")


def text_lines(texts: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Remarks as lines for the terminal."""
    return [f"{title}: {text}" for title, group in texts for text in group]
