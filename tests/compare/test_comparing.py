"""Comparisons from end to end: with a runner that writes results of its own, and once for real on a tiny model."""

import csv
import io
import json
import re
import sys

import pytest
import yaml
from helpers import slow, write_config
from rich.console import Console

from agcl.cli import main
from agcl.compare import Comparison, Method, compare_methods
from agcl.compare.figure import plot_stability_plasticity
from agcl.compare.processes import run_in_processes
from agcl.compare.selection import choose
from agcl.compare.tables import grids, rich_tables

LR, STRENGTH = "model.lr", "model.strength"


class TableRunner:
    """Gives each run the learning accuracy and backward transfer that a function of method, values and seed says."""

    def __init__(self, scores, more=None):
        self.scores, self.more, self.ran = scores, more or {}, []

    def __call__(self, runs, comparison, report):
        for run in runs:
            self.ran.append((run.method, tuple(run.values.values()), run.seed))
            report(run, run.prepare(), None)
            outcome = self.scores(run.method, run.values, run.seed)
            if outcome is None:
                run.log.write_text("Traceback\nRuntimeError: no luck\n")
                report(run, None, run.conclude(1, False))
                continue
            learning, transfer = outcome
            metrics = {
                "average_performance": learning + transfer / 2,
                "backward_transfer": transfer,
                "forgetting": -transfer,
                "forward_transfer": None,
                "learning_accuracy": learning,
            }
            results = {"tasks": ["a", "b"], "scores": [[0, 0], [1, 0], [1, 1]], "metrics": metrics, "wall_seconds": 9.0}
            (run.folder / "scores.json").write_text(json.dumps({**results, "peak_memory_bytes": 2**30, **self.more}))
            report(run, None, run.conclude(0, False))


@pytest.fixture
def setting(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")

    def make(methods=None, **options):
        methods = methods or {name: Method(grid={LR: [1.0, 2.0, 3.0]}) for name in ("plain", "other")}
        return Comparison(
            base=[str(tmp_path / "base.yaml")],
            output=str(tmp_path / "out"),
            methods=methods,
            **{"seeds": [0, 1, 2], **options},
        )

    return make


def run(comparison, scores=None, *, more=None, **options):
    console = Console(file=io.StringIO(), width=200)
    runner = TableRunner(scores, more)
    record = compare_methods(comparison, console, runner=runner, **options)
    return record, runner.ran, console.file.getvalue()


def best_at_two(method, values, seed):
    return 0.5 + seed / 8 - abs(values[LR] - 2) / 4 + (method == "other") / 16, -0.25 - seed / 8


def test_chosen_on_the_tuning_seed_and_run_on_all_seeds_without_repeating(setting):
    record, ran, text = run(setting(tuning_seed=1), best_at_two)
    trials = [(method, (lr,), 1) for method in ("plain", "other") for lr in (1.0, 2.0, 3.0)]
    assert ran == trials + [(method, (2.0,), seed) for method in ("plain", "other") for seed in (0, 2)]
    assert {name: method["chosen"] for name, method in record["methods"].items()} == {
        "plain": {LR: 2.0},
        "other": {LR: 2.0},
    }
    assert record["warnings"] == []
    assert "Chosen for other: lr=2.0" in text
    assert "agcl fit --config" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_terminal_tables_fit_and_break_no_word(setting, width):
    record, _, _ = run(setting(), best_at_two)
    console = Console(file=io.StringIO(), width=width)
    for table in rich_tables(record, width):
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = set(text.split())
    for title, headers, rows in grids(record):
        assert set(title.split()) <= words
        cells = [cell.replace("± ", "±") for row in (headers, *rows) for cell in row]
        assert {word for cell in cells for word in cell.split()} <= words
    assert ("continued" in text) == (width < 80)


def test_where_a_word_is_wider_than_the_terminal_no_other_is_broken(setting):
    record, _, _ = run(setting({"a" * 40: Method(grid={LR: [1.0]})}, reference="a" * 40), best_at_two)
    console = Console(file=io.StringIO(), width=36)
    for table in rich_tables(record, 36):
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 36
    assert {"method", "forgetting", "AP", "chosen"} <= set(text.split())


def test_means_deviations_and_paired_differences(setting):
    record, _, _ = run(setting(), best_at_two)
    summary = record["methods"]["plain"]["summary"]
    assert summary["learning_accuracy"] == {"mean": 0.625, "standard_deviation": 0.125, "number": 3}
    assert summary["forward_transfer"]["mean"] is None
    assert summary["wall_seconds"]["mean"] == 9.0
    # The seeds differ by 0.125 each, which the pairs do not see.
    assert record["methods"]["other"]["differences"]["learning_accuracy"] == {
        "mean": 0.0625,
        "low": 0.0625,
        "high": 0.0625,
        "number": 3,
    }
    assert record["methods"]["plain"]["differences"] == {}
    assert any("75 % of such experiments" in note for note in record["notes"])


def test_nothing_is_run_again_and_a_new_seed_alone_is_added(setting):
    first, _, _ = run(setting(), best_at_two)
    again, ran, _ = run(setting(), None)
    assert ran == []
    assert again == first
    _, ran, _ = run(setting(seeds=[0, 1, 2, 5]), best_at_two)
    assert ran == [("plain", (2.0,), 5), ("other", (2.0,), 5)]


def test_validation_trials_choose_but_are_not_in_the_table(setting):
    comparison = setting(trial_settings={"data.evaluate_on": "validation"}, seeds=[0])
    record, ran, _ = run(comparison, best_at_two)
    assert len(ran) == 6 + 2
    assert not any("validation" in note for note in record["notes"])
    assert [len(method["runs"]) for method in record["methods"].values()] == [1, 1]


def test_failed_runs_are_named_and_tried_again(setting):
    def scores(method, values, seed):
        return (
            None
            if (method, values[LR], seed) in {("plain", 2.0, 0), ("other", 2.0, 1)}
            else best_at_two(method, values, seed)
        )

    record, _, text = run(setting(), scores)
    assert [(failure["method"], failure["seed"], failure["error"]) for failure in record["failures"]] == [
        ("plain", 0, "RuntimeError: no luck"),
        ("other", 1, "RuntimeError: no luck"),
    ]
    assert "log.txt" in text
    assert record["methods"]["plain"]["chosen"] == {LR: 1.0}  # the best of the two that are left
    assert record["methods"]["other"]["differences"]["learning_accuracy"]["number"] == 2
    record, ran, _ = run(setting(), best_at_two)
    assert record["failures"] == []
    assert ("plain", (2.0,), 0) in ran
    assert ("other", (2.0,), 1) in ran


def test_method_whose_trials_all_fail_leaves_the_others_comparable(setting, tmp_path):
    record, _, _ = run(setting(), lambda method, *rest: None if method == "plain" else best_at_two(method, *rest))
    assert record["methods"]["plain"]["chosen"] is None
    assert any(warning.startswith("plain: no trial gave a score") for warning in record["warnings"])
    assert record["methods"]["other"]["summary"]["learning_accuracy"]["number"] == 3
    assert "| plain | - |" in (tmp_path / "out" / "comparison.md").read_text()


def test_report_only_runs_nothing_and_says_what_is_missing(setting):
    record, ran, _ = run(setting(), None, report_only=True)
    assert ran == []
    assert len(record["missing"]) == 6
    run(setting(), best_at_two)
    record, ran, _ = run(setting(seeds=[0, 7]), None, report_only=True)
    assert ran == []
    assert ["seed-7" in folder for folder in record["missing"]] == [True, True]


@pytest.mark.parametrize(
    ("learning", "transfer", "warned"),
    [(0.7, -0.1, True), (0.89, -0.1, False), (0.7, -0.5, False), (0.95, -0.1, False)],
)
def test_backward_transfer_bought_by_learning_less_is_named(setting, learning, transfer, warned):
    scores = {"plain": (0.9, -0.4), "other": (learning, transfer)}
    comparison = setting({"plain": Method(), "other": Method()}, learning_accuracy_tolerance=0.05)
    record, _, text = run(comparison, lambda method, *_: scores[method])
    assert [warning.partition(":")[0] for warning in record["warnings"]] == ["other"] * warned
    assert ("bought by low learning accuracy, lower by 0.200" in text) == warned


def test_choice_at_the_edge_of_the_grid_is_flagged(setting, tmp_path):
    grid = {LR: [1.0, 2.0, 3.0], STRENGTH: [5.0]}
    record, _, text = run(setting({"plain": Method(grid=grid)}), lambda method, values, seed: (values[LR] / 4, -0.1))
    assert record["methods"]["plain"]["at_edge"] == [LR]
    assert "lr*=3.0, strength=5.0" in text
    assert "lr=3.0 is at the edge of its grid" in text
    assert r"| plain | lr\*=3.0, strength=5.0 |" in (tmp_path / "out" / "comparison.md").read_text()


def test_of_equal_scores_the_smaller_learning_rate_is_chosen():
    trials = [({LR: 3.0, STRENGTH: 1}, 0.5), ({LR: 2.0, STRENGTH: 2}, 0.5), ({LR: 2.0, STRENGTH: 1}, 0.5)]
    assert choose([*trials, ({LR: 1.0}, 0.25), ({LR: 0.5}, None), ({LR: 0.1}, float("nan"))]) == {LR: 2.0, STRENGTH: 2}
    assert choose([({LR: 1.0}, None)]) is None


def test_the_table_of_costs_says_where_runs_ran(setting, tmp_path):
    run(setting(), best_at_two, more={"environment": {"device": "NVIDIA H200"}})
    (file,) = (tmp_path / "out" / "other").glob("*2.0/seed-1-*/scores.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"environment": {"device": "cpu (x86_64)"}}))
    (file,) = (tmp_path / "out" / "other").glob("*2.0/seed-2-*/scores.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"environment": {}}))
    run(setting(), report_only=True)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert re.search(r"^\| plain \| lr=2.0 .*\| NVIDIA H200 \|$", text, re.MULTILINE)
    assert re.search(r"^\| other \| lr=2.0 .*\| NVIDIA H200, cpu \(x86_64\), not recorded \|$", text, re.MULTILINE)
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert {row["device"] for row in rows if row["method"] == "plain"} == {"NVIDIA H200"}


def test_csv_has_a_row_for_each_run(setting, tmp_path):
    run(setting(), best_at_two)
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(row["kind"], row["method"], row["seed"], row[LR]) for row in rows[:4]] == [
        ("trial", "plain", "0", "1.0"),
        ("trial", "plain", "0", "2.0"),
        ("trial", "plain", "0", "3.0"),
        ("run", "plain", "0", "2.0"),
    ]
    assert len(rows) == 2 * (3 + 3)
    assert float(rows[3]["learning_accuracy"]) == 0.5
    assert rows[3]["forward_transfer"] == ""


def test_general_forgetting_and_processor_time_are_reported(setting, tmp_path):
    ability = {"nll": [3.0, 3.5, 3.25], "forgetting": 0.25, "standard_error": 0.0625}
    record, _, _ = run(setting(), best_at_two, more={"general_ability": ability, "processor_seconds": 7.0})
    assert record["methods"]["plain"]["summary"]["general_forgetting"]["mean"] == 0.25
    assert record["methods"]["other"]["differences"]["general_forgetting"]["mean"] == 0.0
    assert any("standard error is 0.062 or less" in note for note in record["notes"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| LA | general forgetting (nats) |\n" in text
    assert "± 0.125 | 0.250 ± 0.000 |" in text
    assert "| wall time (s) | processor time (s) |" in text
    assert "| 3 of 3 | 9 ± 0 | 7 ± 0 |" in text
    (row, *_) = csv.DictReader((tmp_path / "out" / "comparison.csv").open())
    assert (row["general_forgetting"], row["processor_seconds"]) == ("0.25", "7.0")


def test_recovery_of_old_tasks_is_reported(setting, tmp_path):
    recovery = {"divergence": [1.0, 3.0, None], "score": [0.0, 0.5, None], "recovered_score": [0.5, 1.0, None]}
    record, _, _ = run(setting(), best_at_two, more={"recovery": recovery})
    assert record["methods"]["plain"]["summary"]["old_tasks_divergence"]["mean"] == 2.0
    assert any("a lost answer format took away comes back" in note for note in record["notes"])
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| KL (nats) | old | recovered |\n" in text
    assert "| 2.000 ± 0.000 | 0.250 ± 0.000 | 0.750 ± 0.000 |" in text


def test_markdown_tables_are_well_formed(setting, tmp_path):
    run(setting(), best_at_two)
    text = (tmp_path / "out" / "comparison.md").read_text()
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "| other | 0.500 ± 0.062 | -0.375 ± 0.125 | 0.375 ± 0.125 | - | 0.688 ± 0.125 |" in text
    assert "| plain | lr=2.0 | 3 of 3 | 9 ± 0 | - | 1.00 ± 0.00 |" in text
    assert "general" not in text


def test_figure_shows_each_run_and_lines_of_equal_performance(setting):
    record, _, _ = run(setting(), best_at_two)
    axes = plot_stability_plasticity(record).axes[0]
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([-0.25, -0.375, -0.5], [0.5, 0.625, 0.75]) in shown
    assert ([-0.375], [0.625]) in shown
    lines = [annotation for annotation in axes.texts if annotation.get_text().startswith("AP ")]
    assert lines
    for annotation in lines:
        transfer, learning = annotation.xy
        assert learning + transfer / 2 == pytest.approx(float(annotation.get_text().removeprefix("AP ")))


def test_data_folder_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("{}")
    content = {"base": [str(tmp_path / "base.yaml")], "methods": {"plain": {}}, "seeds": [0], "output": "out"}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(content))
    given = []
    monkeypatch.setattr("agcl.compare.comparing.run_in_processes", lambda runs, *_: given.extend(runs))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # nothing has run
        main(["compare", "--config", str(tmp_path / "comparison.yaml"), "--data_dir", "some/folder"])
    assert [run.config["data"]["data_dir"] for run in given] == ["some/folder"]


def run_in_this_process(runs, comparison, report):
    """The commands without processes, each of which takes seconds to import everything."""
    for run in runs:
        command = run.prepare()
        report(run, command, None)
        try:
            status = main(command[3:])
        except SystemExit as error:
            status = error.code
        run.log.write_text(str(status))
        report(run, None, run.conclude(int(bool(status)), comparison.keep_models))


@pytest.mark.parametrize("runner", [run_in_this_process, *slow(run_in_processes)])
def test_real_runs(llama_folder, task_files, tmp_path, monkeypatch, runner):
    """Two methods, and a third whose configuration cannot work."""
    monkeypatch.setattr("agcl.compare.comparing.run_in_processes", runner)
    monkeypatch.setattr(sys, "argv", ["agcl"])
    (tmp_path / "fit").mkdir()
    base = write_config(llama_folder, task_files[:2], tmp_path / "fit")
    (tmp_path / "plain.yaml").write_text("trainer: {callbacks: []}")
    strength = "trainer.callbacks.AttributionCallback.init_args.strength"
    content = {
        "base": [str(base)],
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "parallel": 2,
        "threads": 1,
        "settings": {"data.tasks.0.epochs": 8, "data.tasks.1.epochs": 8},
        "allow_unequal_trials": True,
        "methods": {
            "plain": {"configs": [str(tmp_path / "plain.yaml")]},
            "gated": {"settings": {strength: 2.0}},
            "broken": {"settings": {strength: -1.0}},
        },
    }
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--config", str(file)])
    assert exit_info.value.code == 1
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (failure,) = record["failures"]
    assert failure["method"] == "broken"
    assert "strength" in failure["error"]
    for name in ("plain", "gated"):
        (one,) = record["methods"][name]["runs"]
        assert one["state"] == "finished"
        assert one["metrics"]["peak_memory_bytes"] > 2**24
        full = yaml.safe_load((tmp_path / "out" / one["folder"] / "config.yaml").read_text())
        callbacks = full["trainer"]["callbacks"]
        assert [callback["init_args"]["strength"] for callback in callbacks] == ([2.0] if name == "gated" else [])
        assert [task["epochs"] for task in full["data"]["tasks"]] == [8, 8]
        assert json.loads((tmp_path / "out" / one["folder"] / "scores.json").read_text())["seed"] == 0
