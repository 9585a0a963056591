"""The comparison from end to end: trials, choice, runs, tables."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from agcl.compare.figure import plot_stability_plasticity
from agcl.compare.outcome import Record, comparison_record, method_record
from agcl.compare.plan import Plan
from agcl.compare.processes import Report, run_in_processes
from agcl.compare.ray_tasks import run_on_ray
from agcl.compare.runs import Run, values_text
from agcl.compare.selection import at_edge, choose
from agcl.compare.settings import Comparison, Values
from agcl.compare.tables import csv_text, markdown, remarks, rich_tables, text_lines
from agcl.files import replacing, write_whole

Runner = Callable[[Sequence[Run], Comparison, Report], None]


def compare_methods(
    comparison: Comparison, console: Console, *, report_only: bool = False, runner: Runner | None = None
) -> Record:
    """Run what is not there yet, and write and print the tables.

    Args:
        comparison: What to compare.
        console: Where progress and tables are printed.
        report_only: Run nothing, and report on what is there.
        runner: What runs the runs; by ``comparison.runner`` if left out.

    Returns:
        The comparison as plain values, as ``comparison.json`` holds it.
    """
    plan = Plan(comparison)
    if runner is None:
        runner = run_on_ray if comparison.runner == "ray" else run_in_processes
    trials = {name: plan.trial_runs(name) for name in comparison.methods}
    if not report_only:
        _run("Trials", [run for runs in trials.values() for run in runs], comparison, console, runner)
    chosen = {name: _choose(comparison, name, runs) for name, runs in trials.items()}
    finals = {name: plan.final_runs(name, values) if values is not None else [] for name, values in chosen.items()}
    if not report_only:
        for name, values in chosen.items():
            if values:
                console.print(f"Chosen for {name}: {values_text(values)}", markup=False, soft_wrap=True)
        _run("Runs", [run for runs in finals.values() for run in runs], comparison, console, runner)
    methods = {}
    for name, method in comparison.methods.items():
        edges = at_edge(method, chosen[name] or {})
        methods[name] = method_record(trials[name], chosen[name], edges, finals[name])
    record = comparison_record(comparison, methods)
    write_record(Path(comparison.output), record)
    _print(console, record, Path(comparison.output))
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write ``comparison.json``, ``comparison.csv``, ``comparison.md`` and ``stability_plasticity.png``."""
    write_whole(folder / "comparison.json", json.dumps(record, indent=2, ensure_ascii=False))
    write_whole(folder / "comparison.csv", csv_text(record))
    write_whole(folder / "comparison.md", markdown(record))
    with replacing(folder / "stability_plasticity.png") as file:
        plot_stability_plasticity(record).savefig(file, format="png", dpi=150)


def _choose(comparison: Comparison, method: str, trials: Sequence[Run]) -> Values | None:
    if not trials:
        return comparison.methods[method].all_trials()[0]
    scores = []
    for run in trials:
        results = run.results()
        scores.append((run.values, None if results is None else results["metrics"].get(comparison.selection)))
    return choose(scores)


def _run(kind: str, runs: Sequence[Run], comparison: Comparison, console: Console, runner: Runner) -> None:
    missing = [run for run in runs if run.results() is None]
    if runs:
        console.print(f"{kind}: {len(runs)}, of which {len(runs) - len(missing)} are there already.")
    ended = 0

    def report(run: Run, command: list[str] | None, error: str | None) -> None:
        nonlocal ended
        if command is not None:
            text = f"Started {run.label}:\n  {shlex.join(command)}"
        else:
            ended += 1
            outcome = "Finished" if error is None else "Failed"
            detail = "" if error is None else f": {error} ({run.log})"
            text = f"{outcome} ({ended} of {len(missing)}) {run.label}{detail}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    runner(missing, comparison, report)


def _print(console: Console, record: Record, folder: Path) -> None:
    for table in rich_tables(record, console.width):
        console.print()
        console.print(table)
    for line in text_lines(remarks(record)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Everything is in {folder}", markup=False, highlight=False, soft_wrap=True)
