"""Every example forgets less with the gate than without, having learned the new task equally well."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GIVEN = {  # by the reader
    *("model", "old_rows", "optimizer", "trainer", "importance_file", "directions_file"),
    *("tasks", "model_folder", "callbacks", "folder"),
}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_module


def check(results):
    """Losses on the old and on the new task, in nats per answer token."""
    (old_plain, new_plain), (old_gated, new_gated) = results["without the gate"], results["with the gate"]
    # Training stops at the first epoch below 0.1, so that both have learned the new task to the same loss.
    assert 0.05 < new_plain < 0.1
    assert 0.05 < new_gated < 0.1
    assert old_plain > 2  # forgotten
    assert old_gated < 0.75 * old_plain


def check_by_direction(results):
    """It forgets less than entry by entry."""
    (old, new), (old_gated, _) = results["by direction"], results["with the gate"]
    assert 0.05 < new < 0.1
    assert old < 0.6 * old_gated


def test_plain_pytorch_and_no_example_loads_lightning():
    code = (
        f"import json, sys; sys.path[:0] = [{str(EXAMPLES)!r}, {str(ROOT)!r}]\n"
        "import importlib.util, agcl, plain_pytorch, hf_trainer\n"
        "if importlib.util.find_spec('trl'): import trl_sft\n"
        "results = plain_pytorch.run()\n"
        "assert not [name for name in sys.modules if 'lightning' in name], 'Lightning is loaded'\n"
        "print(json.dumps(results))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    check(results)
    check_by_direction(results)


@pytest.mark.slow  # the notebook, which is always run, goes the same way
def test_hugging_face_trainer(example, tmp_path):
    results = example("hf_trainer").run(tmp_path)
    check(results)
    check_by_direction(results)


@pytest.mark.slow
def test_lightnings_trainer(example, tmp_path):
    results = example("lightning_trainer").run(tmp_path)
    (old_plain, new_plain), (old, new) = results["without the gate"], results["by direction"]
    assert max(new_plain, new) < 0.5
    assert old_plain > 2
    assert old < 0.5 * old_plain


@pytest.mark.slow
def test_trl(example, tmp_path):
    pytest.importorskip("trl")
    results = example("trl_sft").run(tmp_path)
    check(results)
    (old_plain, new_plain), (old, new) = results["adapter, without the gate"], results["adapter, by direction"]
    assert max(new_plain, new) < 0.6  # an adapter learns it more slowly here, within the epochs that there are
    assert old < 0.5 * old_plain


def test_what_the_documentation_shows_is_in_the_examples_and_under_ten_lines():
    """Its blocks name the example they are from; every line of them is there, but for the indentation."""
    text = (ROOT / "docs" / "other_trainers.md").read_text("utf-8")
    blocks = re.findall(r"<!-- from examples/(\w+\.py) -->\n\n```python\n(.*?)```", text, re.DOTALL)
    assert {name for name, _ in blocks} == {path.name for path in EXAMPLES.glob("*.py")} - {"two_tasks.py"}
    for name, block in blocks:
        example = (EXAMPLES / name).read_text("utf-8")
        lines = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith("...")]
        assert len(lines) < 10, name
        known = [line.strip() for line in example.splitlines()]
        assert [line for line in lines if line not in known and not line.startswith("from ")] == [], name
        assert imports(block) <= imports(example), name
        assert undefined(block) <= GIVEN, name


def imports(code):
    """Pairs of module and name."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {(node.module, alias.name) for node in nodes for alias in node.names}


def undefined(code):
    """Names that code takes from outside: what its reader has already."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    names = [node for node in nodes if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - imported - stored
