"""Built-in configurations by name, from any folder."""

import sys
from pathlib import Path

import pytest
import yaml

from agcl import configurations
from agcl.cli import main
from agcl.compare import read_comparison
from agcl.compare.plan import Plan
from agcl.configurations import configuration_names, resolve_arguments, resolve_configuration
from agcl.errors import AgclError

CONFIGS = Path(__file__).parent.parent / "lightning_configs"


def test_every_shipped_configuration_has_a_name():
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert sorted(Path(resolve_configuration(f"builtin:{name}")) for name in configuration_names()) == files
    assert Path(resolve_configuration("builtin:data/orders/long_order2")) == CONFIGS / "data/orders/long_order2.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--config", "builtin:base", "-c", "x.yaml"], ["fit", "--config", "{base}", "-c", "x.yaml"]),
        (["fit", "-c", "builtin:base"], ["fit", "-c", "{base}"]),
        (["--config=builtin:base", "-c=builtin:base"], ["--config={base}", "-c={base}"]),
        (["--model.model_name_or_path", "builtin:base"], ["--model.model_name_or_path", "builtin:base"]),
        (["builtin:base"], ["builtin:base"]),
        ([], []),
    ],
)
def test_only_configurations_are_replaced(words, expected):
    assert resolve_arguments(words) == [word.format(base=CONFIGS / "base.yaml") for word in expected]


@pytest.mark.parametrize(
    ("name", "near", "far"), [("quikstart", "quickstart, ", "method/..."), ("method/ewd", "method/ewc, ", "data/...")]
)
def test_an_unknown_name_is_one_line_that_says_what_there_is(name, near, far):
    with pytest.raises(AgclError, match=f"no built-in configuration `{name}`") as error:
        resolve_configuration(f"builtin:{name}")
    assert near in str(error.value)
    assert far in str(error.value)
    assert "\n" not in str(error.value)


def test_an_installed_package_has_its_own(tmp_path, monkeypatch):
    (tmp_path / "agcl" / "configs" / "method").mkdir(parents=True)
    (tmp_path / "agcl" / "configs" / "method" / "mine.yaml").write_text("{}")
    monkeypatch.setattr(configurations, "__file__", str(tmp_path / "agcl" / "configurations.py"))
    assert configuration_names() == ["method/mine"]


def test_the_command_line_takes_names_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for quickstart, overlay in (
        ("builtin:quickstart", "builtin:method/ewc"),
        (str(CONFIGS / "quickstart.yaml"), str(CONFIGS / "method" / "ewc.yaml")),
    ):
        monkeypatch.setattr(
            sys, "argv", ["agcl", "fit", "--config", quickstart, f"--config={overlay}", "--print_config"]
        )
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0]["trainer"]["callbacks"][0]["class_path"].endswith("EWC")


def test_a_comparison_takes_names_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Plan(read_comparison(Path(resolve_configuration("builtin:compare/quickstart")))).trial_runs("ewc")[0]
    assert run.command()[2:9] == [
        "agcl",
        "fit",
        "--config",
        "builtin:quickstart",
        "--config",
        "builtin:method/ewc",
        "--config",
    ]
    assert run.config["model"]["optimizer"]["init_args"]["lr"] == 1e-4
