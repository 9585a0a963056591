"""Each method's overlay trains a tiny model from the command line to the saved model."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers import slow, write_config

from agcl.cli import main

OVERLAYS = Path(__file__).parents[2] / "lightning_configs" / "method"
NAMES = sorted(file.stem for file in OVERLAYS.glob("*.yaml"))
OVERRIDES = {  # what does not fit a model of two blocks, or the two samples of the configuration underneath
    "layer_freezing": ["--trainer.callbacks.num_layers=1"],
    "agcl_paper": ["--trainer.callbacks.importance.top_k=2"],
}
SLOW = {  # other estimators and variants of what is run by default
    *("agcl_change", "agcl_cplrp", "agcl_empirical_fisher", "agcl_fisher", "agcl_gradient_weight"),
    *("agcl_magnitude", "agcl_mas", "agcl_random", "agcl_wanda", "ewc_online", "single_task"),
}


def test_overrides_are_of_overlays():
    assert OVERRIDES.keys() | SLOW <= set(NAMES)


@pytest.mark.parametrize("name", [*sorted(set(NAMES) - SLOW), *slow(*sorted(SLOW))])
def test_overlay_runs(name, llama_folder, task_files, tmp_path, monkeypatch, knowing):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    base = write_config(llama_folder, task_files[:2], tmp_path)
    content = yaml.safe_load(base.read_text())
    content["trainer"]["logger"]["class_path"] = "lightning.pytorch.loggers.CSVLogger"  # draws no pictures: faster
    for task in content["data"]["tasks"]:
        task["epochs"] = 1
    base.write_text(yaml.safe_dump(content))
    overlay = OVERLAYS / f"{name}.yaml"
    main(["fit", "--config", str(base), "--config", str(overlay), *OVERRIDES.get(name, [])])
    run = tmp_path / "run" / "version_0"
    assert len(json.loads((run / "scores.json").read_text())["scores"]) == 3
    assert (run / "model").is_dir()
    # The configuration underneath has an AttributionCallback: an overlay of another method must have taken its place.
    is_gated = "AttributionCallback" in overlay.read_text()
    assert len(list((run / "importance").glob("*_task?.safetensors"))) == (2 if is_gated else 0)
