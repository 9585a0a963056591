"""The benchmarks' configurations: each parses with what it is laid over, and learns made-up rows of its columns."""

import sys
from pathlib import Path

import pytest
import yaml
from helpers import printed_config, slow
from made_up_rows import write_made_up_rows

from agcl.cli import main
from agcl.data.tasks import Task
from agcl.module import ContinualLM

CONFIGS = Path(__file__).parent.parent / "lightning_configs"
BASE = CONFIGS / "base.yaml"
DATA = {path.stem: path for path in CONFIGS.glob("data/*.yaml")}
ORDERS = {path.stem: path for path in CONFIGS.glob("data/orders/*.yaml")}
MODELS = {path.stem: path for path in CONFIGS.glob("model/*.yaml")}


def written(path):
    """A configuration file as it stands."""
    return yaml.safe_load(path.read_text())


def task_names(name):
    return [task["name"] for task in written(DATA[name])["data"]["tasks"]]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_configurations_parse(name):
    config = printed_config(BASE, DATA["concept1k_reduced"], MODELS[name])
    assert config["model"]["model_name_or_path"] == written(MODELS[name])["model"]["model_name_or_path"]
    assert [task["name"] for task in config["data"]["tasks"]] == task_names("concept1k_reduced")


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_orders_are_of_the_same_tasks(name):
    sequence, number = name.rsplit("_order", 1)
    order = written(ORDERS[name])["data"]["order"]
    assert sorted(order) == sorted(task_names(sequence))
    assert (order == task_names(sequence)) == (number == "1")
    if sequence.endswith("_reduced"):
        whole = written(ORDERS[name.replace("_reduced", "")])["data"]["order"]
        assert order == [task for task in whole if task != "yahoo"]


IN_SMALL = ("_reduced", "_bare")


LARGE = {name for name in DATA if not name.endswith(IN_SMALL)}


@pytest.mark.parametrize("name", [*sorted(DATA.keys() - LARGE), *slow(*sorted(LARGE))])
def test_data_configurations_learn_rows_of_their_columns(name, roomy_model, tmp_path, monkeypatch):
    config = written(DATA[name])
    write_made_up_rows(tmp_path, config["data"]["tasks"])
    for task in config["data"]["tasks"]:
        task["epochs"] = 1  # scoring follows a task's last epoch, and a dry run has but one
    once = tmp_path / f"{name}.yaml"
    once.write_text(yaml.safe_dump(config))
    order = ORDERS.get(f"{name}_order3")
    scores = {}
    monkeypatch.setattr(ContinualLM, "_log_scores", lambda module, values: scores.update(values))
    monkeypatch.setattr(sys, "argv", ["agcl"])
    monkeypatch.chdir(tmp_path)
    main(
        [
            "fit",
            *(argument for path in [BASE, once, *([order] if order else [])] for argument in ("--config", str(path))),
            *("--model.model_name_or_path", str(roomy_model), "--data.data_dir", str(tmp_path)),
            *("--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        ]
    )
    metrics = {task["name"]: task.get("metric", "exact_match") for task in config["data"]["tasks"]}
    names = written(order)["data"]["order"] if order else task_names(name)
    wanted = [f"eval/{task}/{metrics[task]}" for task in names]
    given = {key: value.item() for key, value in scores.items() if key in wanted}
    assert list(given) == wanted
    assert all(0 <= score <= 1 for score in given.values())


@pytest.mark.parametrize("name", ["trace", "trace_reduced"])
def test_placeholders_of_py150_are_replaced(name):
    (task,) = [task for task in written(DATA[name])["data"]["tasks"] if task["name"] == "Py150"]
    code = "f ( '<STR_LIT>' , <NUM_LIT> , <NUM_LIT:5> , '<STR_LIT:a\nb>' , '<CHAR_LIT>' ) "
    assert Task(**task).compared(code) == "f ( '' , 0 , 5 , 'a\nb' , '' )"
