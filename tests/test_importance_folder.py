"""Three readers of one importance folder, with shards and a re-estimate in it: each takes what its question needs."""

import json
from types import SimpleNamespace

import torch
from jsonargparse import Namespace

from agcl.attribution import importance_files, save_importance
from agcl.checking.earlier import find_earlier
from agcl.export import find_trained
from agcl.reporting.record import read_run

LEVELS = {"a": torch.zeros(4, dtype=torch.uint8), "b": torch.ones(4, dtype=torch.uint8)}


def test_shards_are_one_file_and_a_reestimate_another(tmp_path):
    run = tmp_path / "runs" / "version_0"
    folder = run / "importance"
    save_importance(folder / "00_x.safetensors", LEVELS, {"task": "x"}, max_shard_bytes=4)
    again = {"task": "x", "reestimated_after": "y"}
    save_importance(folder / "00_x_after_01.safetensors", LEVELS, again, max_shard_bytes=4)
    save_importance(folder / "01_y.safetensors", LEVELS, {"task": "y"})
    (folder / "02_z-00001-of-00002.safetensors").write_bytes(b"written when the power went")
    assert len(list(folder.iterdir())) == 8
    everything = ["00_x", "00_x_after_01", "01_y"]
    assert [file.path.stem for file in importance_files(folder)] == everything
    assert importance_files(tmp_path / "nowhere") == []

    facts = {"regime": "sequential", "model": "m", "metrics": {}}
    facts |= {"tasks": ["x", "y"], "scores": [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]}
    (run / "scores.json").write_text(json.dumps(facts))
    (run / "model").mkdir()
    # The report: each task as it was when it was learned.
    assert [file.path.stem for file in read_run(run).importance.values()] == ["00_x", "01_y"]
    # Export and check: what a gate goes by from here on.
    assert [file.path.stem for file in find_trained(run).importance] == ["00_x_after_01", "01_y"]
    options = Namespace(save_dir=str(tmp_path), name="runs")
    logger = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=options)
    trainer = Namespace(default_root_dir=None, logger=logger)
    config = SimpleNamespace(importance=None, get={}.get, trainer=trainer)
    earlier = find_earlier(config)
    assert {task: file.path.stem for task, file in earlier.files.items()} == {"x": "00_x_after_01", "y": "01_y"}

    files = {"x": str(folder / "00_x.safetensors"), "y": str(tmp_path / "gone.safetensors")}
    state = {"AttributionCallback": {"so_far": {"files": files}}}
    torch.save({"agcl": {}, "callbacks": state}, tmp_path / "some.ckpt")
    config.get = {"ckpt_path": tmp_path / "some.ckpt"}.get
    config.ckpt_path = str(tmp_path / "some.ckpt")
    assert {task: file.path.stem for task, file in find_earlier(config).files.items()} == {"x": "00_x"}
