"""The distributions as users get them: built, installed apart from the checkout, used from another folder."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import agcl

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".typed", ".html")
CONSUMER = """\
import agcl
from agcl.metrics import BackwardTransfer

task = agcl.Task(name="faq", source="faq.jsonl", epochs=3)
callback = agcl.AttributionCallback(gate="update", importance=agcl.ImportanceConfig(quantile=0.5))
transfer = BackwardTransfer(num_tasks=2)
version: str = agcl.__version__
"""
TASKS_OF_ONE_EPOCH = """\
import json
import yaml
from agcl.configurations import resolve_configuration
content = yaml.safe_load(open(resolve_configuration("builtin:quickstart")))
print(json.dumps([{**task, "epochs": 1} for task in content["data"]["tasks"]]))
"""
WRONG = """\
import agcl

task = agcl.Task(name="faq", source="faq.jsonl", epochs="three")
callback = agcl.AttributionCallback(gate="sideways")
version: int = agcl.__version__
"""


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A source distribution, and the wheel that is built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """An interpreter that has agcl from the wheel, and everything else from where the tests have it."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    site = next(folder.glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, distributions[1], cwd=folder)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def configurations():
    return {
        path.relative_to(ROOT / "lightning_configs").as_posix() for path in ROOT.glob("lightning_configs/**/*.yaml")
    }


@pytest.mark.slow
def test_the_wheel_holds_code_configurations_data_and_type_information(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert len(names) == len(set(names))
    assert {name.removeprefix("agcl/configs/") for name in names if name.endswith(".yaml")} == configurations()
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("agcl/**/*") if path.suffix in SUFFIXES}
    data = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("agcl/data/builtin/*/*") if path.is_file()}
    assert package | data <= set(names)
    assert not [name for name in names if not name.startswith(("agcl/", f"agcl-{agcl.__version__}.dist-info/"))]


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_need(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"lightning_configs/{name}" for name in configurations()} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "constraints.txt", "mkdocs.yml", "setup.py", "tests/conftest.py"} <= names
    for folder in ("benchmarks", "docs", "examples", "notebooks", "scripts"):  # tests read and run what is there
        needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.*") if path.suffix != ".pyc"}
        assert needed <= names, folder


@pytest.mark.slow
def test_the_installed_package_works_outside_the_checkout(installed, tmp_path):
    site = run(installed, "-c", "import agcl; print(agcl.__file__)", cwd=tmp_path)
    assert Path(site.strip()).is_relative_to(installed.parent.parent)
    version = run(installed, "-c", "from importlib.metadata import version; print(version('agcl'))", cwd=tmp_path)
    assert version.strip() == agcl.__version__
    command = [installed, "-m", "agcl", "fit", "--config", "builtin:quickstart", "--config", "builtin:method/ewc"]
    assert "agcl.methods.EWC" in run(*command, "--print_config", cwd=tmp_path)
    rows = "from agcl.data.sources import load_rows; from agcl import Task"
    rows += "; print(len(load_rows(Task(name='w', source='builtin:cldr/welsh'), 'train', ['prompt'])))"
    assert run(installed, "-c", rows, cwd=tmp_path).strip() == "128"


@pytest.mark.slow
def test_the_quick_start_runs_outside_the_checkout(installed, roomy_model, tmp_path):
    """With a tiny model in place of the packaged one, and for an epoch a task; its report needs the page's template."""
    words = ["--config", "builtin:quickstart", "--model.model_name_or_path", roomy_model, "--trainer.accelerator=cpu"]
    tasks = json.loads(run(installed, "-c", TASKS_OF_ONE_EPOCH, cwd=tmp_path))
    (tmp_path / "tasks.yaml").write_text(json.dumps({"data": {"tasks": tasks, "batch_size": 16}}))
    # A tiny model answers nothing right, so that there is no importance to be had.
    run(installed, "-m", "agcl", "fit", *words, "--config", "tasks.yaml", cwd=tmp_path)
    folder = tmp_path / "runs" / "quickstart" / "version_0"
    assert len(json.loads((folder / "scores.json").read_text())["tasks"]) == len(tasks) == 4
    run(installed, "-m", "agcl", "report", folder, cwd=tmp_path)
    assert "turkish" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_type_information_reaches_a_consumer(installed, tmp_path):
    (tmp_path / "right.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--python-executable", installed]
    assert "no issues" in run(*map(str, command), "right.py", cwd=tmp_path)
    result = subprocess.run([*map(str, command), "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert re.findall(r"wrong\.py:(\d): error: .*\[([\w-]+)\]", result.stdout) == [
        ("3", "arg-type"),
        ("4", "arg-type"),
        ("5", "assignment"),
    ]
