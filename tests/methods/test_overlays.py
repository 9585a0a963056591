"""Each method's overlay trains a tiny model from the command line to the saved model."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers import write_config

from agcl.cli import main

OVERLAYS = Path(__file__).parents[2] / "lightning_configs" / "method"


@pytest.mark.parametrize("name", ["lwf", "agem", "olora", "osf", "migu", "spg", "agcl_lora"])
def test_overlay_runs(name, llama_folder, task_files, tmp_path, monkeypatch, knowing):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    base = write_config(llama_folder, task_files[:2], tmp_path)
    content = yaml.safe_load(base.read_text())
    for task in content["data"]["tasks"]:
        task["epochs"] = 1
    base.write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(base), "--config", str(OVERLAYS / f"{name}.yaml")])
    run = tmp_path / "run" / "version_0"
    assert len(json.loads((run / "scores.json").read_text())["scores"]) == 3
    assert (run / "model").is_dir()
