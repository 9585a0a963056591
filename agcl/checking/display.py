"""What `agcl check` found, for the terminal."""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agcl.checking.checking import Check, TaskCheck
from agcl.checking.rows import ShownRow, SplitCheck
from agcl.forecast import Machine
from agcl.terminal import facts_table

_NEWLINE, _SPACE = "↵", "␣"


def show(console: Console, found: Check) -> None:
    """Print it."""
    _show_run(console, found)
    for number, each in enumerate(found.tasks, 1):
        _show_task(console, found, each, number)
    _show_sum(console, found)
    console.print(Rule(style="dim"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(facts_table((f"{number}.", Text(problem)) for number, problem in enumerate(found.problems, 1)))
    count = len(found.problems)
    verdict = _plural(count, "problem") if count else "No problem found"
    console.print(Text(f"{verdict}; nothing was trained.", style="bold red" if count else "bold green"))


def _show_run(console: Console, found: Check) -> None:
    facts: list[tuple[str, str | Text]] = [("model", found.model or "unknown")]
    if found.size is not None and found.settings is not None:
        size, gated = found.size, f"{_count(found.size.gated)} gated"
        trained = "all trained" if size.trained == size.weights else f"{_count(size.trained)} trained"
        facts.append(("weights", f"{_count(size.weights)}, {trained}, {gated if size.gated else 'no gate'}"))
        machine = "" if found.machine is None else f" x {found.machine.name}"
        facts.append(("precision", f"{found.settings.precision} on {found.settings.devices}{machine}"))
    if found.max_length is not None:
        facts.append(("longest row", f"{found.max_length} tokens allowed"))
    console.print(facts_table(facts))


def _show_task(console: Console, found: Check, each: TaskCheck, number: int) -> None:
    title = f"Task {number} of {len(found.tasks)}: {each.task.name}"
    console.print()
    console.print(Rule(Text(title, style="bold"), align="left", style="cyan"))
    facts: list[tuple[str, str | Text]] = [(split.use, _rows_text(split)) for split in each.splits]
    if each.task.labels is not None:
        facts.append(("labels", _labels_text(each)))
    facts.append(("scored by", each.task.metric))
    if each.forecast is not None and found.machine is not None:
        memory, seconds = each.forecast.peak_bytes, each.forecast.total_seconds
        facts.append(("forecast", f"{each.steps} steps, {_time(seconds)}, {_memory(memory, found.machine)}"))
    if found.origin is not None:
        facts.append(("plasticity", _plasticity_text(found, number)))
    console.print(facts_table(facts))
    if each.splits[0].shown:
        console.print(_rows_table(each.splits[0].shown))
    for note in each.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _show_sum(console: Console, found: Check) -> None:
    forecasts = [each.forecast for each in found.tasks if each.forecast is not None]
    if not forecasts or found.machine is None:
        return
    seconds: dict[str, float] = {}
    for forecast in forecasts:
        for name, value in forecast.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    largest = max(forecasts, key=lambda forecast: forecast.peak_bytes)
    kept = ", ".join(f"{name} {_bytes(size)}" for name, size in largest.kept.items())
    incomplete = (
        "" if len(forecasts) == len(found.tasks) else f" for the {_plural(len(forecasts), 'task')} that could be read"
    )
    speeds = "its speed was measured" if found.machine.is_measured else "its speed is assumed from its data sheet"
    console.print()
    console.print(Rule(Text(f"Forecast for {found.machine.name}", style="bold"), align="left", style="cyan"))
    facts: list[tuple[str, str | Text]] = [
        ("time", f"{_time(sum(seconds.values()))}{incomplete}, without scoring; {speeds}"),
        ("", ", ".join(f"{name} {_time(value)}" for name, value in seconds.items())),
        ("memory", f"{_memory(largest.peak_bytes, found.machine)} at once on each device"),
        ("", f"throughout: {kept}"),
        ("on disk", f"{_bytes(largest.files['one checkpoint'])} for a checkpoint"),
    ]
    console.print(facts_table(facts))


def _rows_text(split: SplitCheck) -> Text:
    if not split.num_rows:
        return Text(f"`{split.split}` cannot be read, see the end", style="red")
    text = Text(f"{_plural(split.num_rows, 'row')} of `{split.split}`")
    if split.lengths:
        median = statistics.median(split.lengths)
        span = f"{min(split.lengths)} to {max(split.lengths)} tokens (median {median:.0f})"
        text.append(f", {span}, answers up to {max(split.answer_lengths)}")
    if split.prompts_cut:
        text.append(f"; {_plural(len(split.prompts_cut), 'prompt')} cut", style="yellow")
        text.append(f" by up to {max(split.prompts_cut)} tokens", style="yellow")
    if split.problems:
        text.append(f"; {_plural(len(split.problems), 'kind')} of problem, see the end", style="red")
    return text


def _labels_text(each: TaskCheck) -> str:
    counts = each.splits[0].labels
    return ", ".join(f"{label} ({counts[label]})" if counts else label for label in each.task.labels or ())


def _plasticity_text(found: Check, number: int) -> str:
    each = found.tasks[number - 1]
    if number == 1 and not each.earlier:
        holds_own_text = found.settings and found.settings.own_text and found.size and found.size.products
        budget = ", but the budget for matrices, which hold what the model writes itself" if holds_own_text else ""
        return f"1, there is no earlier task{budget}"
    missing = [other.task.name for other in found.tasks[: number - 1] if other.task.name not in each.earlier]
    if not each.plasticity:
        return f"not known: there is no importance of {', '.join(missing)} ({found.origin})"
    weights = sum(count for _, count in each.plasticity.values())
    mean = sum(mean * count for mean, count in each.plasticity.values()) / max(weights, 1)
    layers = ", ".join(f"{layer} {value:.2f}" for layer, (value, _) in each.plasticity.items())
    without = f" (nothing is known of {', '.join(missing)})" if missing else ""
    return f"{mean:.3f} left by {', '.join(each.earlier)}{without}, says {found.origin}: {layers}"


def _rows_table(rows: Sequence[ShownRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("answer", ratio=2, overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("cut", justify="right", no_wrap=True)
    for row in rows:
        cut = f"{row.prompt_cut} + {row.answer_cut}" if row.prompt_cut or row.answer_cut else "-"
        table.add_row(
            str(row.index),
            _clipped(row.prompt, 240, from_end=True),
            _clipped(row.answer, 120),
            f"{row.prompt_tokens} + {row.answer_tokens}",
            cut,
        )
    return table


def _clipped(text: str, length: int, from_end: bool = False) -> Text:
    """Line ends and a space in front made visible; of a long prompt its end, which the model reads last."""
    text = text.replace("\n", _NEWLINE + "\n")
    text = _SPACE + text[1:] if text.startswith(" ") else text
    if len(text) <= length:
        return Text(text)
    left_out = f"[{len(text) - length} characters]"
    if from_end:
        return Text.assemble((f"{left_out} ", "dim"), text[-length:])
    return Text.assemble(text[:length], (f" {left_out}", "dim"))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _bytes(number: int) -> str:
    return decimal(number, precision=2)


def _memory(number: int, machine: Machine) -> str:
    if machine.memory is None:
        return _bytes(number)
    fits = "" if number <= machine.memory else ", which is too much"
    return f"{_bytes(number)} of {_bytes(machine.memory)}{fits}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
