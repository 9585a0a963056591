"""Make RESULTS.md from the raw results: ``python scripts/results.py``; no figure in it is typed by hand.

The words between the tables are in ``scripts/results.md``; a line ``{{name}}`` there is replaced by what the
function of that name below returns.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "results"
QUICKSTART = RAW / "compare_quickstart"
METRICS = ("average_performance", "backward_transfer", "learning_accuracy")
# Of the kinds of `benchmarks/gates.py`; of the others, the quantile.
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "relative": ("c",),
    "relative2": ("c",),
    "ratio": ("power",),
    "directions": ("plasticity", "every"),
}
RECORDED, TRAINED = "recorded step", "task being learned"  # what a gate of `benchmarks/weights.py` is on
# Of `benchmarks/variants.py`: an estimator's ranks, another option of the gate by AttnLRP's, another optimizer.
BY_RANK, OTHER, SGD = "by rank of ", "by rank, ", "SGD"
NUMBERS = (*(metric.replace("_", " ") for metric in METRICS), "old loss", "English")
Row = tuple[object, ...]
Kinds = dict[str, dict[float, dict[str, Any]]]  # way to weigh -> plasticity -> row of `benchmarks/weights.py`


def quickstart() -> str:
    """The tables of the quick start's comparison."""
    return _comparison(QUICKSTART)


def quickstart_lora() -> str:
    """Those of the same tasks learned by a LoRA adapter."""
    return _comparison(RAW / "compare_quickstart_lora")


def qlora() -> str:
    """Runs of the quick start by an adapter on 4-bit weights."""
    rows: list[Row] = []
    for path in sorted((RAW / "qlora").glob("*.json")):
        results = json.loads(path.read_text())
        method, _, rate = path.stem.rpartition("_")
        metrics = (_cell(results["metrics"][metric]) for metric in METRICS)
        english = _cell(results["general_ability"]["forgetting"], "+.3f")
        rows.append((method, rate, results["seed"], *metrics, english, f"{results['processor_seconds']:.0f}"))
    names = (metric.replace("_", " ") for metric in METRICS)
    return _table(("method", "learning rate", "seed", *names, "English", "processor time (s)"), rows)


def concept1k() -> str:
    """Those of the reduced Concept-1K."""
    return _comparison(RAW / "compare_concept1k_reduced")


def classification_bare() -> str:
    """Those of the classification sequence without instructions."""
    return _comparison(RAW / "compare_classification_bare")


def rows_attributed() -> str:
    """Trials of that sequence by how many rows of each task are attributed: the first task's score and loss."""
    folder, rate = RAW / "compare_classification_bare", "lr=0.0003"
    numbers = {32: folder / "agcl" / rate}
    numbers |= {count: folder / "agcl_rows" / f"{rate}_num_samples={count}" for count in (16, 96)}
    rows: list[Row] = []
    for count, place in sorted(numbers.items()):
        (file,) = place.glob("seed-100-*/scores.json")
        found = json.loads(file.read_text())
        scores, losses = ([row[0] for row in found[name][1:]] for name in ("scores", "nll"))
        shown = [f"{score:.3f} / {loss:.2f}" for score, loss in zip(scores, losses, strict=True)]
        metrics = (_cell(found["metrics"][metric]) for metric in METRICS)
        rows.append((count, *shown, *metrics, f"{found['processor_seconds']:.0f}"))
    tasks = (f"DBpedia after {task}" for task in ("it", "AG News", "SST-2"))
    names = (metric.replace("_", " ") for metric in METRICS)
    return _table(("rows", *tasks, *names, "processor time (s)"), rows)


def classification() -> str:
    """Trials of the reduced classification sequence, the best of each method first."""
    found = []
    for file in (RAW / "compare_classification_reduced").glob("*/*/seed-100-*/scores.json"):
        method, settings = file.parts[-4:-2]
        metrics = json.loads(file.read_text())["metrics"]
        found.append((method, settings.replace("_", ", "), *(metrics[m] for m in METRICS)))
    best = {method: max(row[2] for row in found if row[0] == method) for method, *_ in found}
    found.sort(key=lambda row: (-best[row[0]], row[0], -row[2]))
    rows: list[Row] = [(*row[:2], *map(_cell, row[2:])) for row in found]
    return _table(("method", "settings", "average performance", "backward transfer", "learning accuracy"), rows)


def _cell(value: float | None, style: str = ".3f") -> str:
    return "-" if value is None else f"{value:{style}}"


def _comparison(folder: Path) -> str:
    """A comparison's own tables, as `agcl compare` wrote them, without the methods that it has no run of yet."""
    text = (folder / "comparison.md").read_text().partition("## Missing runs")[0]
    for method in re.findall(r"^\| ([\w.]+) \|(?: - \|)+$", text, flags=re.MULTILINE):
        if not re.search(rf"^\| {method} \| \S+=.* \d\.\d+ \|", text, flags=re.MULTILINE):  # nor a trial
            text = re.sub(rf"^(\| {method} \||- {method}:).*\n", "", text, flags=re.MULTILINE)
    text = text.replace("(stability", f"({folder.relative_to(ROOT)}/stability")
    return re.sub(r"^#", "###", text, flags=re.MULTILINE).strip()


def trials() -> str:
    """Both gates beside their shuffled controls at the same settings, on the trials' seed."""
    rows: list[Row] = []
    for method in ("agcl", "agcl_entries"):
        for folder in sorted((QUICKSTART / method).iterdir()):
            found = [_scores(QUICKSTART / kind / folder.name, seed=0) for kind in (method, f"{method}_shuffled")]
            if None in found:
                continue
            rows += [
                (method, folder.name.replace("_", ", "), name, *(f"{scores['metrics'][m]:.3f}" for m in METRICS))
                for name, scores in zip(("gate", "shuffled"), found, strict=True)
                if scores
            ]
    return _table(("method", "settings", "", "average performance", "backward transfer", "learning accuracy"), rows)


def gates() -> str:
    """Rows of `benchmarks/gates.py`: share known / loss per token on each task at the end."""
    rows = []
    for row in _lines("gates"):
        options = OPTIONS.get(row["kind"], ("quantile",))
        kind = " ".join([row["kind"], *(f"{option} {row[option]:g}" for option in options)])
        kind += f" sharpness {row.get('sharpness', 1):g}" if row["kind"] == "directions" else ""
        kind += ", shuffled" if row["shuffled"] else ""
        kind += ", unweighted" if row.get("unweighted") else ""
        kind += f", after {row['prefix']} tokens of a novel" if row.get("prefix") else ""
        is_gated = row["kind"] != "none"
        cells = _shares_and_losses(row["matrix"][-1])
        rows.append(
            (kind, row["score"] if is_gated else "", f"{row['lr']:g}", row["samples"] if is_gated else "", *cells)
        )
    width = max(map(len, rows))
    header = ("gate", "score", "learning rate", "samples", "Welsh", "Finnish", "Swahili", "Turkish")
    return _table(header[:width], [row + ("",) * (width - len(row)) for row in rows])


def variants() -> str:
    """Rows of `benchmarks/variants.py`, but for the gates by rank and for SGD."""
    rows: list[Row] = [
        (row["tasks"], row["variant"], f"{row['lr']:g}", *_numbers(row))
        for row in _lines("variants")
        if not row["variant"].startswith((BY_RANK, OTHER, SGD))
    ]
    return _table(("tasks", "variant", "learning rate", *NUMBERS), rows)


def sgd() -> str:
    """Rows of `benchmarks/variants.py` that are trained by SGD."""
    found = [row for row in _lines("variants") if row["variant"].startswith(SGD)]
    rows: list[Row] = [(row["variant"], f"{row['lr']:g}", row["seed"], *_numbers(row)) for row in found]
    return _table(("trained by", "learning rate", "seed", *NUMBERS), rows)


def estimators() -> str:
    """Rows of `benchmarks/variants.py` with an estimator each at equal plasticity, the lowest old loss first."""
    found = [row for row in _by_rank() if row["variant"].startswith(BY_RANK)]
    found.sort(key=lambda row: (row["strength"], row["lr"], row["seed"], row["old_loss"]))
    rows: list[Row] = []
    for row in found:
        settings = (
            f"{1 / (1 + row['strength']):.2f}",
            f"{row['lr']:g}",
            row["seed"],
            row["variant"].removeprefix(BY_RANK),
        )
        rows.append((*settings, *_numbers(row)))
    return _table(("plasticity", "learning rate", "seed", "importance by rank of", *NUMBERS), rows)


def entries() -> str:
    """Rows of `benchmarks/variants.py` where one thing is otherwise in a gate by rank, beside the gate as it is."""
    found = [row for row in _by_rank() if row["variant"].startswith(OTHER)]
    as_it_is = [row for row in _by_rank() if row["variant"] == f"{BY_RANK}AttnLRP, squared"]
    rows: list[Row] = []
    for settings, group in itertools.groupby(found, key=_settings):
        rows += [("as it is", *settings, *_numbers(row)) for row in as_it_is if _settings(row) == settings]
        rows += [(row["variant"].removeprefix(OTHER), *settings, *_numbers(row)) for row in group]
    return _table(("what is otherwise", "strength", "learning rate", "seed", *NUMBERS), rows)


def _by_rank() -> list[dict[str, Any]]:
    """Rows of gates by rank; where no strength was given, with ranks' own."""
    return [{"strength": 8.0} | row for row in _lines("variants") if row["variant"].startswith((BY_RANK, OTHER))]


def _settings(row: dict[str, Any]) -> Row:
    return f"{row['strength']:g}", f"{row['lr']:g}", row["seed"]


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RAW / f"{name}.jsonl").read_text().splitlines()]


def _shares_and_losses(found: Iterable[tuple[float, float]]) -> list[str]:
    return [f"{known:.2f} / {loss:.4f}" for known, loss in found]


def _numbers(row: dict[str, Any]) -> list[str]:
    return [_cell(row[key]) for key in (*METRICS, "old_loss", "general_forgetting")]


def pairs() -> str:
    """Rows of `benchmarks/pairs.py`."""
    rows: list[Row] = []
    for row in _lines("pairs"):
        cells = _shares_and_losses((row["welsh"], row["finnish"]))
        rows.append((row["kind"], row["objective"], f"{row['plasticity']:g}", *cells))
    return _table(("what is held", "gradient of", "plasticity", "Welsh", "Finnish"), rows)


def weights() -> str:
    """Rows of `benchmarks/weights.py`, and what they say at an equal loss on the new task."""
    rows: list[Row] = []
    for (task, how), kinds in _weights().items():
        for kind, points in kinds.items():
            losses = [_pair(points.get(plasticity), 1, ".4f") for plasticity in (0.95, 0.98, 0.99)]
            equal = _cell(_at_equal_learning(kinds, kind), ".4f") if how == RECORDED else ""
            rows.append((task, how, kind, *losses, _pair(points.get(0.98), 0, ".2f"), equal))
    header = ("tasks", "the gate on a", "an input counts by", "0.95", "0.98", "0.99", "known at 0.98", "equal learning")
    return _table(header, rows)


def weights_overall() -> str:
    """Over all pairs of facts: the old task's loss by each way to weigh, as a share of that with all inputs alike."""
    found: dict[str, dict[str, list[float]]] = {}
    for (task, how), kinds in _weights().items():
        if not task.startswith("facts"):
            continue
        old_loss = _at_equal_learning if how == RECORDED else _in_learning
        losses = {kind: loss for kind in kinds if (loss := old_loss(kinds, kind)) is not None}
        alike = losses.pop("alike", None)
        for kind, loss in losses.items() if alike else ():
            found.setdefault(kind, {}).setdefault(how, []).append(loss / alike)
    rows: list[Row] = [
        (kind, *(_spread(how.get(name, [])) for name in (RECORDED, TRAINED))) for kind, how in found.items()
    ]
    return _table(("an input counts by", RECORDED, TRAINED), rows)


def _weights() -> dict[tuple[str, str], Kinds]:
    """Rows of `benchmarks/weights.py` by tasks and what the gate was on."""
    found: dict[tuple[str, str], Kinds] = {}
    for row in _lines("weights"):
        task = f"names after {row['prefix']} tokens" if row["tasks"] == "names" else f"facts {row['pair']}"
        kind = row["weights"] + (", no rules" if row.get("rule") == "none" else "")
        kind += f", {row['objective']}" if row.get("objective", "logit") != "logit" else ""
        group = found.setdefault((task, TRAINED if row.get("trained") else RECORDED), {})
        group.setdefault(kind, {})[row["plasticity"]] = row
    return dict(sorted(found.items()))


def _spread(ratios: list[float]) -> str:
    """Geometric mean, and the smallest and the largest of how many."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f} (1 pair)" if ratios else ""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"


def _pair(row: dict[str, Any] | None, place: int, style: str) -> str:
    """Of the old task and the new one."""
    return "" if row is None else f"{row['old'][place]:{style}} / {row['new'][place]:{style}}"


def _at_equal_learning(kinds: Kinds, kind: str) -> float | None:
    """Loss on the old task where that on the new one is as with `alike` at 0.98: on a log-log scale between two."""
    if 0.98 not in kinds.get("alike", {}):
        return None
    target = math.log(kinds["alike"][0.98]["new"][1])
    points = sorted((math.log(row["new"][1]), math.log(row["old"][1])) for row in kinds[kind].values())
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if x <= target <= next_x:
            return math.exp(y + (next_y - y) * (target - x) / (next_x - x))
    return None


def _in_learning(kinds: Kinds, kind: str) -> float | None:
    """Loss on the old task where the new one was learned under the gate at 0.98."""
    return kinds[kind][0.98]["old"][1] if 0.98 in kinds[kind] else None


def _scores(folder: Path, seed: int) -> dict[str, dict[str, float]] | None:
    files = sorted(folder.glob(f"seed-{seed}-*/scores.json"))
    return json.loads(files[0].read_text()) if files else None


def _table(header: Row, rows: list[Row]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page() -> str:
    """RESULTS.md."""
    text = (ROOT / "scripts" / "results.md").read_text()
    return re.sub(r"^\{\{(\w+)\}\}$", lambda found: globals()[found[1]](), text, flags=re.MULTILINE)


if __name__ == "__main__":
    (ROOT / "RESULTS.md").write_text(page())
