"""The distributions as users get them: built, installed apart from the checkout, used from another folder."""

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
CONSUMER = """\
import agcl
from agcl.metrics import BackwardTransfer

task = agcl.Task(name="faq", source="faq.jsonl", epochs=3)
callback = agcl.AttributionCallback(gate="update", importance=agcl.ImportanceConfig(quantile=0.5))
transfer = BackwardTransfer(num_tasks=2)
version: str = agcl.__version__
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
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("agcl/**/*") if path.suffix in (".py", ".typed")}
    data = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("agcl/data/builtin/*/*") if path.is_file()}
    assert package | data <= set(names)
    assert not [name for name in names if not name.startswith(("agcl/", f"agcl-{agcl.__version__}.dist-info/"))]


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_need(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"lightning_configs/{name}" for name in configurations()} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "constraints.txt", "setup.py", "tests/conftest.py"} <= names


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
