"""A run's hooks, open files and tensors do not grow with its tasks; `benchmarks/soak.py` measures memory and time."""

import importlib.util
import re
import statistics
from pathlib import Path
from textwrap import dedent

import pytest

from agcl import forecast

ROOT = Path(__file__).parents[2]
HELD = 8 * 1024  # bytes; a task's importance, which must not stay in memory, takes ten times as much


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_later_tasks_hold_no_more_than_the_second(knowing):
    watch = load("soak").soak(num_tasks=3, epochs=1)
    second, last = watch.counts[1], watch.counts[-1]
    assert second["hooks"] > watch.counts[0]["hooks"]  # the gate's, which the count therefore sees
    # Lightning keeps the scalars that were logged under each task's name; a few directions more or less are held.
    allowed = {"hooks": 0, "open files": 0, "bytes of tensors": 1024 + HELD}
    for what, growth in allowed.items():
        assert last[what] <= second[what] + growth, (what, [counts[what] for counts in watch.counts])


def test_the_page_shows_the_table_that_the_formula_gives():
    module = load("scale_table")
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("<!-- benchmarks/scale_table.py -->\n")[1].split("\n<!-- end -->")[0]
    assert table == module.table(module.MACHINES["h100"])


def test_the_page_shows_the_formula_that_is_computed():
    page = (ROOT / "docs" / "scale.md").read_text()
    shown = page.split("<!-- agcl/forecast.py -->\n")[1].split("<!-- end -->")[0]
    formulas = re.findall(r"::\n\n((?:    .*\n|\n)+)", forecast.__doc__)
    assert len(formulas) == 2
    assert re.findall(r"```text\n(.*?)```", shown, re.DOTALL) == [dedent(text).strip("\n") + "\n" for text in formulas]


@pytest.mark.slow
def test_fifteen_tasks_take_the_memory_of_two_and_a_boundary_no_longer(knowing):
    watch = load("soak").soak(num_tasks=15, epochs=2)
    second, last = watch.counts[1], watch.counts[-1]
    assert last["resident memory"] <= 1.05 * second["resident memory"]
    assert last["bytes of tensors"] <= second["bytes of tensors"] + 13 * 1024 + HELD
    assert last["hooks"] == second["hooks"]
    assert last["open files"] <= second["open files"]
    assert statistics.median(watch.boundary[-5:]) <= 1.15 * statistics.median(watch.boundary[1:6])
