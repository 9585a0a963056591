"""Single values over a stack of configurations, and that LightningCLI takes them as meant."""

import sys

import pytest
import yaml

from agcl.cli import main
from agcl.compare.overlay import overlay
from agcl.errors import AgclError

BASE = {"trainer": {"callbacks": [{"class_path": "a.Old"}]}, "data": {"tasks": [{"name": "one", "epochs": 2}]}}
METHOD = {"trainer": {"callbacks": [{"class_path": "a.b.Gate", "init_args": {"strength": 1, "kind": "x"}}, "a.Plain"]}}


def test_value_in_a_list_repeats_the_topmost_list_with_that_value_changed():
    result = overlay([BASE, METHOD], {"trainer.callbacks.0.init_args.strength": 3})
    gate = {"class_path": "a.b.Gate", "init_args": {"strength": 3, "kind": "x"}}
    assert result == {"trainer": {"callbacks": [gate, "a.Plain"]}}
    assert METHOD["trainer"]["callbacks"][0]["init_args"]["strength"] == 1


def test_item_by_class_name_and_missing_arguments():
    result = overlay([BASE], {"trainer.callbacks.Old.init_args.share": 0.5, "data.tasks.0.epochs": 7})
    assert result["trainer"]["callbacks"] == [{"class_path": "a.Old", "init_args": {"share": 0.5}}]
    assert result["data"]["tasks"] == [{"name": "one", "epochs": 7}]


def test_two_values_in_one_list():
    settings = {"trainer.callbacks.Gate.init_args.strength": 3, "trainer.callbacks.Gate.init_args.kind": "y"}
    gate = {"class_path": "a.b.Gate", "init_args": {"strength": 3, "kind": "y"}}
    assert overlay([METHOD], settings) == {"trainer": {"callbacks": [gate, "a.Plain"]}}


def test_appended_items_belong_to_the_list():
    appended = {"trainer": {"callbacks+": {"class_path": "a.More"}}}
    result = overlay([BASE, appended], {"trainer.callbacks.More.init_args.n": 1})
    assert [item["class_path"] for item in result["trainer"]["callbacks"]] == ["a.Old", "a.More"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainer.callbacks.1.init_args.n", "`1` is not one item of the list that the configurations give .Old."),
        ("trainer.callbacks.Gate.init_args.n", "`Gate` is not one item"),
        ("data.tasks.0.epochs.n", "`data.tasks.0.epochs` is 2, which has no `n`"),
    ],
)
def test_step_that_leads_nowhere_is_refused(key, message):
    with pytest.raises(AgclError, match=message):
        overlay([BASE], {key: 1})


def test_ambiguous_class_name_is_refused():
    twice = {"trainer": {"callbacks": [{"class_path": "a.Gate"}, {"class_path": "b.Gate"}]}}
    with pytest.raises(AgclError, match="not one item"):
        overlay([twice], {"trainer.callbacks.Gate.init_args.n": 1})


def test_lightning_cli_changes_these_values_and_nothing_else(tmp_path, capsys, monkeypatch):
    layers = [
        {
            "trainer": {"callbacks": []},
            "model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.5}}},
            "data": {"tasks": [{"name": "a", "source": "a.csv"}]},
        },
        {"trainer": {"callbacks": [{"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 3}}]}},
    ]
    settings = {"model.optimizer.init_args.lr": 1.0e-5, "trainer.callbacks.0.init_args.strength": 2.0, "data.seed": 4}
    files = []
    for number, content in enumerate([*layers, overlay(layers, settings)]):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["agcl"])

    def printed(paths):
        with pytest.raises(SystemExit):
            main(["fit", *(word for path in paths for word in ("--config", str(path))), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    expected = printed(files[:-1])
    expected["model"]["optimizer"]["init_args"]["lr"] = 1.0e-5
    expected["trainer"]["callbacks"][0]["init_args"]["strength"] = 2.0
    expected["data"]["seed"] = 4
    assert printed(files) == expected
