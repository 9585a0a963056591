"""The shipped comparisons: alike for all their methods, tuned on rows that the table does not see, and each dry-run."""

import sys
from pathlib import Path

import pytest
from datasets import ReadInstruction
from helpers import slow
from made_up_rows import write_made_up_rows

from agcl.cli import main
from agcl.compare import read_comparison
from agcl.compare.plan import Plan
from agcl.compare.runs import read_config
from agcl.module import ContinualLM

ROOT = Path(__file__).parents[2]
DATA = ROOT / "lightning_configs" / "data"
COMPARISONS = {path.stem: path for path in sorted((ROOT / "lightning_configs" / "compare").glob("*.yaml"))}
UNTUNED = {"concept1k_10"}  # with the settings that its reduced variant chose
BENCHMARKS = sorted(name for name in COMPARISONS.keys() - UNTUNED if not name.startswith("quickstart"))
RUNS = [(name, method) for name, path in COMPARISONS.items() for method in read_config(str(path))["methods"]]
SIZES = {"train": 250, "test": 50}  # of the smallest task


@pytest.fixture
def comparison(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return read_comparison(COMPARISONS[request.param])


def layers(run):
    """The run's configurations, the first one lowest, as LightningCLI merges them."""
    return [*(read_config(path) for path in run.configs), run.config]


def topmost(run, *keys):
    """The list at a key: a later configuration replaces an earlier one's."""
    found = None
    for node in layers(run):
        for key in keys:
            node = node.get(key, {})
        found = node or found
    return found


def test_every_benchmark_has_a_comparison():
    assert {path.stem for path in DATA.glob("*.yaml") if path.stem.endswith(("_reduced", "_bare"))} == set(BENCHMARKS)


@pytest.mark.parametrize("comparison", COMPARISONS, indirect=True)
def test_every_method_is_measured_alike(comparison):
    """An overlay replaces `trainer.callbacks`; nothing may replace what stands beside it."""
    plan = Plan(comparison)
    for name, method in comparison.methods.items():
        for values in method.all_trials():
            (run, *_) = plan.final_runs(name, values)
            measured = [item["class_path"] for item in topmost(run, "extra_callbacks")]
            benchmark = ["agcl.RecoveryProbe"] if "quickstart" not in comparison.output else []
            assert measured == ["agcl.GeneralAbility", *benchmark], name


def scored_rows(run):
    """(file, condition, index) of every row that the run is scored on."""
    validation = run.config.get("data", {}).get("evaluate_on") == "validation"
    rows = set()
    for task in topmost(run, "data", "tasks"):
        for part in ReadInstruction.from_spec(task["validation_split" if validation else "test_split"]).to_absolute(
            SIZES
        ):
            source = task["source"] if isinstance(task["source"], str) else task["source"][part.splitname]
            rows |= {(source, str(task.get("where")), index) for index in range(part.from_, part.to)}
    return rows


@pytest.mark.parametrize("comparison", BENCHMARKS, indirect=True)
def test_trials_are_scored_on_other_rows_than_the_table_and_on_another_seed(comparison):
    plan = Plan(comparison)
    assert comparison.tuning_seed not in comparison.seeds
    for name, method in comparison.methods.items():
        trials = plan.trial_runs(name)
        assert len(trials) in (2, 3)
        (final, *_) = plan.final_runs(name, method.all_trials()[0])
        for trial in trials:
            assert scored_rows(trial)
            assert not scored_rows(trial) & scored_rows(final)


QUICK = ("standard_reduced", "agcl")


@pytest.mark.parametrize(
    ("comparison", "method"),
    [QUICK, *slow(*(run for run in RUNS if run != QUICK))],
    indirect=["comparison"],
)
def test_each_method_runs_dry(comparison, method, roomy_model, tmp_path, monkeypatch):
    comparison.output = str(tmp_path / "out")
    (run, *_) = Plan(comparison).final_runs(method, comparison.methods[method].all_trials()[-1])
    tasks = topmost(run, "data", "tasks")
    write_made_up_rows(tmp_path, [task for task in tasks if not str(task["source"]).startswith("builtin:")])
    run.config.setdefault("data", {})["tasks"] = [
        {**task, "epochs": 1} for task in tasks
    ]  # so that the first is scored
    for callback in run.config["trainer"].get("callbacks", []):
        if callback["class_path"].endswith("LayerFreezing"):
            callback["init_args"]["num_layers"] = 1  # of two
    run.prepare()
    scores = {}
    monkeypatch.setattr(ContinualLM, "_log_scores", lambda module, values: scores.update(values))
    monkeypatch.setattr(sys, "argv", ["agcl"])
    main(
        [
            *run.command()[3:],
            *("--model.model_name_or_path", str(roomy_model), "--data.data_dir", str(tmp_path)),
            *("--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"),
            *("--trainer.default_root_dir", str(tmp_path)),  # a dry run has no logger's folder
        ]
    )
    names = run.config["data"].get("order", [task["name"] for task in tasks])
    assert {key.split("/")[1] for key in scores} >= set(names)
