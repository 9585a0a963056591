"""A run's hooks, open files and tensors do not grow with its tasks; `benchmarks/soak.py` measures memory and time."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_later_tasks_hold_no_more_than_the_second(knowing):
    watch = load("soak").soak(num_tasks=5, epochs=1)
    second, last = watch.counts[1], watch.counts[-1]
    assert second["hooks"] > watch.counts[0]["hooks"]  # the gate's, which the count therefore sees
    # Lightning keeps the scalars that were logged under each task's name.
    allowed = {"hooks": 0, "open files": 0, "bytes of tensors": 1024}
    for what, growth in allowed.items():
        assert last[what] <= second[what] + growth, (what, [counts[what] for counts in watch.counts])


def test_the_page_shows_the_table_that_the_formula_gives():
    module = load("scale_table")
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("<!-- benchmarks/scale_table.py -->\n")[1].split("\n<!-- end -->")[0]
    assert table == module.table(module.MACHINES["h100"])
