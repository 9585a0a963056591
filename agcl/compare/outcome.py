"""What a comparison found, as plain values that tables, files and the figure are made of."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agcl.compare.runs import Run, values_text
from agcl.compare.settings import Comparison, Values
from agcl.compare.statistics import (
    attainable_confidence,
    bootstrap_interval,
    mean,
    paired_differences,
    standard_deviation,
)
from agcl.recovery import recovery_means

COSTS = ("wall_seconds", "processor_seconds", "peak_memory_bytes", "extra_bytes_per_weight")

GENERAL_FORGETTING = "general_forgetting"
"""Loss of ordinary text after the last task minus that before training, in nats per token; more is worse."""

RECOVERY = {name: f"old_tasks_{name}" for name in ("divergence", "score", "recovered_score")}
"""Means over the old tasks of what ``RecoveryProbe`` measured, to their names among a run's metrics."""

Record = dict[str, Any]
"""Plain values only: what ``comparison.json`` holds."""


def run_record(run: Run) -> Record:
    """What one run was and what came of it; ``metrics`` is empty unless it finished."""
    state, results = run.state(), run.results()
    ability = {} if results is None else results.get("general_ability", {})
    metrics: dict[str, Any] = {}
    if results is not None:
        metrics |= results["metrics"]
        metrics |= {GENERAL_FORGETTING: ability["forgetting"]} if ability else {}
        metrics |= {RECOVERY[name]: value for name, value in recovery_means(results).items()}
        metrics |= {name: results.get(name) for name in COSTS}
    return {
        "method": run.method,
        "values": run.values,
        "seed": run.seed,
        "order": run.order,
        "folder": str(run.folder),
        "command": run.command(),
        "state": state.get("state", "missing"),
        "error": state.get("error"),
        "tasks": None if results is None else results["tasks"],
        "device": None if results is None else results.get("environment", {}).get("device"),
        "metrics": metrics,
        "general_forgetting_standard_error": ability.get("standard_error"),
    }


def method_record(trials: Sequence[Run], chosen: Values | None, edges: list[str], runs: Sequence[Run]) -> Record:
    """One method's trials, chosen values, runs, and mean and standard deviation of each metric over its runs."""
    records = [run_record(run) for run in runs]
    summary = {}
    for name in metric_names(records):
        values = list(_by_pair(records, name).values())
        summary[name] = {
            "mean": _plain(mean(values)),
            "standard_deviation": _plain(standard_deviation(values)),
            "number": len(values),
        }
    return {
        "trials": [run_record(run) for run in trials],
        "chosen": chosen,
        "at_edge": edges,
        "runs": records,
        "summary": summary,
    }


def comparison_record(comparison: Comparison, methods: dict[str, Record]) -> Record:
    """The whole comparison: its methods, their paired differences to the reference, warnings and failures."""
    assert comparison.reference is not None
    reference = methods[comparison.reference]
    for method in methods.values():
        method["differences"] = {} if method is reference else _differences(comparison, method, reference)
    everything = [run for method in methods.values() for run in (*method["trials"], *method["runs"])]
    failed = {run["folder"]: run for run in everything if run["state"] == "failed"}
    return {
        "reference": comparison.reference,
        "selection": comparison.selection,
        "tuning_seed": comparison.tuning_seed,
        "seeds": comparison.seeds,
        "orders": comparison.orders,
        "confidence": comparison.confidence,
        "learning_accuracy_tolerance": comparison.learning_accuracy_tolerance,
        "methods": methods,
        "warnings": [
            *_bought_transfer(comparison, methods),
            *_choice_warnings(methods),
        ],
        "notes": _notes(comparison, methods),
        "failures": list(failed.values()),
        "missing": sorted({run["folder"] for run in everything if run["state"] in ("missing", "started")}),
    }


def metric_names(runs: Sequence[Record]) -> list[str]:
    """Names of all metrics that some run has, those of the score matrix first, the costs last."""
    names = dict.fromkeys(name for run in runs for name in run["metrics"])
    return [name for name in names if name not in COSTS] + [name for name in COSTS if name in names]


def _by_pair(runs: Sequence[Record], metric: str) -> dict[Any, float]:
    """Values by what makes runs of two methods a pair; runs without a value are left out."""
    values = {(run["seed"], run["order"]): run["metrics"].get(metric) for run in runs}
    return {pair: value for pair, value in values.items() if value is not None}


def _differences(comparison: Comparison, method: Record, reference: Record) -> Record:
    differences = {}
    for name in metric_names(method["runs"]):
        values = paired_differences(_by_pair(method["runs"], name), _by_pair(reference["runs"], name))
        low, high = bootstrap_interval(values, comparison.confidence)
        differences[name] = {
            "mean": _plain(mean(values)),
            "low": _plain(low),
            "high": _plain(high),
            "number": len(values),
        }
    return differences


def _bought_transfer(comparison: Comparison, methods: Mapping[str, Record]) -> list[str]:
    """Methods that forget less than the reference since they learned less, by mean difference over the pairs."""
    warnings = []
    for name, method in methods.items():
        transfer, learning = (
            method["differences"].get(metric, {}).get("mean") for metric in ("backward_transfer", "learning_accuracy")
        )
        if transfer is None or learning is None:
            continue
        if transfer > 0 and -learning > comparison.learning_accuracy_tolerance:
            warnings.append(
                f"{name}: its backward transfer is better than {comparison.reference}'s by {transfer:.3f}, but bought "
                f"by low learning accuracy, lower by {-learning:.3f}: what was not learned cannot be forgotten."
            )
    return warnings


def _choice_warnings(methods: Mapping[str, Record]) -> list[str]:
    warnings = []
    for name, method in methods.items():
        if method["chosen"] is None:
            warnings.append(f"{name}: no trial gave a score to choose by, so that there are no settings and no runs.")
        for key in method["at_edge"]:
            value = {key: method["chosen"][key]}
            warnings.append(f"{name}: {values_text(value)} is at the edge of its grid; a better value may lie beyond.")
    numbers = {name: max(1, len(method["trials"])) for name, method in methods.items()}
    if len(set(numbers.values())) > 1:
        text = ", ".join(f"{name} {number}" for name, number in numbers.items())
        warnings.append(f"The methods had different numbers of trials: {text}.")
    return warnings


def _notes(comparison: Comparison, methods: Mapping[str, Record]) -> list[str]:
    notes = []
    if not (comparison.trial_configs or comparison.trial_settings) and any(m["trials"] for m in methods.values()):
        notes.append("Settings were chosen by the scores on the rows that the table is about, not on validation rows.")
    if comparison.runner == "processes" and (comparison.parallel or 1) > 1:
        notes.append(
            "Where runs shared a machine, their wall times are longer than alone. Processor time is of all threads of "
            "a run's process."
        )
    if text := _text_precision(methods):
        notes.append(text)
    if any(RECOVERY["divergence"] in run["metrics"] for method in methods.values() for run in method["runs"]):
        notes.append(
            "KL: of what is predicted for old tasks' answers, from when each was learned to the end, in nats per "
            "token. Old, recovered: score of the old tasks at the end, and after a few steps on a few of their rows, "
            "which are not scored: what a lost answer format took away comes back so, what was forgotten does not."
        )
    numbers = {d["number"] for m in methods.values() for d in m["differences"].values()} - {0}
    fewest = min(numbers, default=0)
    if fewest == 1:
        notes.append("A single pair says nothing about chance: there is no interval.")
    elif fewest and (bound := attainable_confidence(fewest)) < comparison.confidence:
        notes.append(
            f"The intervals are of {fewest} pairs. They lie within the range of the pairs' differences, which holds "
            f"the true median difference in {100 * bound:.3g} % of such experiments at most: read them as a range "
            f"seen, not as {100 * comparison.confidence:g} % confidence."
        )
    return notes


def _text_precision(methods: Mapping[str, Record]) -> str | None:
    errors = [run["general_forgetting_standard_error"] for method in methods.values() for run in method["runs"]]
    largest = max((error for error in errors if error is not None), default=None)
    if largest is None:
        return None
    return (
        "General forgetting is the loss of ordinary text after the last task minus that before training, in nats per "
        f"token. For another text of the kind, a run's standard error is {largest:.3f} or less, by the spread over the "
        "windows read; as all methods read the same, they are compared more precisely on these."
    )


def _plain(value: float) -> float | None:
    """JSON has no NaN: what is not defined is null."""
    return None if math.isnan(value) else value
