"""What files of another person cannot do: configurations, checkpoints, models, data and importance run no code."""

import importlib
import inspect
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from helpers import attribution, build, trainer_for, weights, write_config
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl import lightning_cli
from agcl.attribution import load_importance, save_importance
from agcl.callbacks import ContinualMonitor, ContinualReport
from agcl.cli import main
from agcl.errors import AgclError
from agcl.trust import check_remote_code, check_sharded_checkpoint, restrict_imports


@pytest.fixture
def marker(tmp_path) -> Path:
    """A folder that hostile input tries to make: if it is there, code ran."""
    return tmp_path / "ran"


@pytest.fixture
def fit(llama_folder, task_files, tmp_path, monkeypatch):
    """Run ``agcl fit`` to the error that it ends with."""
    only = {"fit": lightning_cli.AgclCLI.subcommands()["fit"]}  # the other parsers take their time
    monkeypatch.setattr(lightning_cli.AgclCLI, "subcommands", staticmethod(lambda: only))
    monkeypatch.setattr(sys, "argv", ["agcl"])

    def run(*arguments, **overrides):
        path = write_config(llama_folder, task_files[:1], tmp_path, **{"trainer__logger": False, **overrides})
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path), *arguments])
        return exit_info.value.code

    return run


# -------------------------------------------------------------------------------------------------- configurations

LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
HOSTILE = {
    "callback": (
        "trainer__callbacks",
        [{"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "MARKER"]}}],
    ),
    "extra callback": (
        "extra_callbacks",
        [{"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "MARKER"]}}],
    ),
    "function of a callback": ("trainer__callbacks", [{"class_path": LAMBDA, "init_args": {"setup": "os.system"}}]),
    "object of a callback": (
        "trainer__callbacks",
        [{"class_path": LAMBDA, "init_args": {"setup": {"class_path": "timeit.Timer", "init_args": {"stmt": "1"}}}}],
    ),
    "by another name": ("trainer__callbacks", [{"class_path": "lightning.pytorch.callbacks.timer.time.sleep"}]),
    "optimizer": ("model__optimizer", {"class_path": "os.system", "init_args": {"command": "mkdir MARKER"}}),
    "scheduler": ("model__lr_scheduler", {"class_path": "os.mkdir", "init_args": {"path": "MARKER"}}),
    "function of a scheduler": (
        "model__lr_scheduler",
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "builtins.exec"}},
    ),
    "logger": ("trainer__logger", {"class_path": "os.mkdir", "init_args": {"path": "MARKER"}}),
    "strategy": ("trainer__strategy", {"class_path": "torch.load", "init_args": {"f": "MARKER"}}),
    "plugin": ("trainer__plugins", [{"class_path": "pickle.load", "init_args": {"file": "MARKER"}}]),
    "profiler": ("trainer__profiler", {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b"}}),
    "accelerator": ("trainer__accelerator", {"class_path": "os.mkdir", "init_args": {"path": "MARKER"}}),
    "estimator": (
        "trainer__callbacks__0__init_args__estimator",
        {"class_path": "lightning.pytorch.cli.instantiate_class", "init_args": {"init": {"class_path": "os.mkdir"}}},
    ),
    "command of agcl's own": ("model__optimizer", {"class_path": "agcl.compare.processes.start"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_names_no_other_code(name, fit, marker, capsys):
    key, value = HOSTILE[name]
    assert fit(**{key: json.loads(json.dumps(value).replace("MARKER", str(marker)))}) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("agcl: error: The configuration names `")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["model__adapter", "data__tasks__0__where"])
def test_a_class_where_any_value_will_do_is_a_value(key, fit, marker):
    hostile = {"class_path": "os.mkdir", "init_args": {"path": str(marker)}}
    assert str(fit(**{key: {"peft_type": hostile}})).startswith("agcl: error: ")
    assert not marker.exists()


@pytest.fixture
def own_module(tmp_path, monkeypatch, request) -> str:
    """A module that only the user can allow; another name each time, since what is allowed stays so."""
    name = f"own_module_{abs(hash(request.node.name))}"
    code = (
        "import os\nos.mkdir(os.environ['MARKER'])\nfrom lightning.pytorch import Callback\nclass Own(Callback): pass\n"
    )
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("MARKER", str(tmp_path / "ran"))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_beside_the_configuration_is_not_imported(fit, marker, own_module, capsys):
    assert fit(trainer__callbacks=[{"class_path": f"{own_module}.Own"}]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"`{own_module}.Own`" in line
    assert f"AGCL_ALLOW_IMPORTS={own_module};" in line
    assert not marker.exists()


def test_the_user_allows_what_is_his_own(fit, marker, own_module, monkeypatch):
    monkeypatch.setenv("AGCL_ALLOW_IMPORTS", f"another.package, {own_module}")
    code = fit(trainer__callbacks=[{"class_path": f"{own_module}.Own"}], data__batch_size=0)
    assert code == "agcl: error: `batch_size` is 0; give at least 1."
    assert marker.exists()


def test_what_is_allowed_must_be_names(monkeypatch):
    monkeypatch.setenv("AGCL_ALLOW_IMPORTS", "own/module.py")
    with pytest.raises(SystemExit, match=r"AGCL_ALLOW_IMPORTS is 'own/module\.py': give names of packages"):
        main(["importance", "show", "/no"])


PACKAGES = [
    "agcl.attribution.estimators",
    "agcl.callbacks",
    "agcl.methods",
    *(
        f"lightning.pytorch.{part}"
        for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
    ),
    "torch.optim",
    "torch.optim.lr_scheduler",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_class_of_training_can_be_named(package):
    restrict_imports()
    module = importlib.import_module(package)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--name", type=type)
    names = [name for name in module.__all__ if inspect.isclass(getattr(module, name))]
    assert names
    for name in names:
        assert parser.parse_args([f"--name={package}.{name}"]).name is getattr(module, name)


# ----------------------------------------------------------------------------------------------------- remote code


def test_a_file_cannot_trust_a_models_code(fit):
    line = fit(model__trust_remote_code=True)
    assert "A configuration file says `trust_remote_code: true`" in line
    assert "say so yourself: `--model.trust_remote_code true`, or AGCL_TRUST_REMOTE_CODE=1" in line
    said = fit("--model.trust_remote_code=true", model__trust_remote_code=True, data__batch_size=0)
    assert said == "agcl: error: `batch_size` is 0; give at least 1."


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_file_cannot_trust_a_models_code_before_training_either(
    command, llama_folder, task_files, tmp_path, marker, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    path = write_config(folder, task_files[:1], tmp_path, model__trust_remote_code=True)
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--config", str(path)])
    said = " ".join(f"{exit_info.value.code} {capsys.readouterr().out}".split())
    assert "A configuration file says `trust_remote_code: true`" in said
    assert not marker.exists()


def test_consent_by_the_environment(monkeypatch):
    check_remote_code(False, [])
    with pytest.raises(AgclError):
        check_remote_code(True, ["fit", "--data.trust_remote_code=true"])
    monkeypatch.setenv("AGCL_TRUST_REMOTE_CODE", "1")
    check_remote_code(True, [])


def test_a_data_sets_script_is_not_run(fit, marker, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    assert "Task `task0`: split `train` of" in fit(data__tasks__0__source=str(folder))
    assert not marker.exists()


# ----------------------------------------------------------------------------------------------------- checkpoints


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def hostile_checkpoint(tmp_path, marker) -> Path:
    path = tmp_path / "hostile.ckpt"
    torch.save({"agcl": Hostile(marker), "state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
    return path


def test_a_checkpoint_runs_no_code(fit, marker, hostile_checkpoint):
    line = fit(ckpt_path=str(hostile_checkpoint))
    assert f"The checkpoint {hostile_checkpoint} cannot be read" in line
    line = fit(ckpt_path=str(hostile_checkpoint), weights_only=False)
    assert "`weights_only: false` lets a checkpoint run code" in line
    assert not marker.exists()


def test_a_checkpoint_runs_no_code_in_a_trainer_of_ones_own(
    llama_folder, task_files, tmp_path, marker, hostile_checkpoint
):
    model, data = build(llama_folder, task_files[:1])
    with pytest.raises((AgclError, pickle.UnpicklingError)):
        trainer_for(data, tmp_path).fit(model, datamodule=data, ckpt_path=hostile_checkpoint)
    assert not marker.exists()


def test_all_of_a_checkpoint_is_tensors_and_plain_values(llama_folder, task_files, tmp_path, knowing):
    callbacks = [attribution(), ContinualReport(save_model=False), ContinualMonitor()]
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    trainer = trainer_for(data, tmp_path, callbacks)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert {"AttributionCallback", "ContinualReport", "ContinualMonitor"} <= loaded["callbacks"].keys()
    for name, parameter in weights(model).items():
        assert torch.equal(loaded["state_dict"][name], parameter)


def test_shards_are_loaded_if_the_command_line_names_them(fit, tmp_path):
    assert "A configuration file names" in fit(ckpt_path=str(tmp_path))
    check_sharded_checkpoint(str(tmp_path), ["fit", "--ckpt_path", str(tmp_path)])
    check_sharded_checkpoint(str(tmp_path / "single.ckpt"), [])
    check_sharded_checkpoint(None, [])


def test_a_checkpoint_brings_along_nothing_but_importance(llama_folder, task_files, tmp_path, knowing):
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer_for(data, tmp_path, [attribution(), keep], enable_checkpointing=True).fit(model, datamodule=data)
    content = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    (tmp_path / "secret").write_text("secret")
    content["callbacks"]["AttributionCallback"]["so_far"]["files"]["task0"] = str(tmp_path / "secret")
    torch.save(content, tmp_path / "hostile.ckpt")
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    with pytest.warns(UserWarning, match=r"of task `task0` is lost: .*secret is truncated or no importance file"):
        trainer_for(data, tmp_path / "new", [attribution()]).fit(
            model, datamodule=data, ckpt_path=tmp_path / "hostile.ckpt"
        )
    assert not (tmp_path / "new" / "importance" / "secret").exists()


# ------------------------------------------------------------------------------------------------ importance files

OURS = '"__metadata__":{"format":"agcl-importance","format_version":"2","bits":"8"}'


def entry(name: str = "weight", dtype: str = "U8", shape: str = "[4]", offsets: str = "[0,4]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HEADERS = {
    "huge shape": entry(shape="[1099511627776,1099511627776]"),
    "shape beyond 64 bits": entry(shape="[4294967296,4294967296,4294967296]"),
    "negative shape": entry(shape="[-4]"),
    "shape of another size": entry(shape="[5]"),
    "offsets beyond the file": entry(shape="[400]", offsets="[0,400]"),
    "offsets backwards": entry(offsets="[4,0]"),
    "another dtype": entry(dtype="F32", shape="[1]"),
    "unknown dtype": entry(dtype="PICKLE"),
    "too many bits": entry(dtype="U16", shape="[2]"),
    "duplicate name": f"{entry()},{entry(offsets='[4,8]')}",
    "overlapping tensors": f"{entry('a')},{entry('b')}",
    "no JSON": "weight",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(name, tmp_path):
    header = f"{{{OURS},{HEADERS[name]}}}".encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 if name == "duplicate name" else 4))
    with pytest.raises(AgclError, match=r"hostile\.safetensors") as error:
        load_importance(path)
    assert "\n" not in str(error.value)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(AgclError, match=r"hostile\.safetensors is truncated or no importance file"):
        load_importance(path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..", "a\\b.safetensors"])
def test_shards_lie_beside_their_index(shard, tmp_path):
    path = tmp_path / "importance.safetensors"
    levels = {name: torch.ones(8, dtype=torch.uint8) for name in "ab"}
    save_importance(path, levels, {}, max_shard_bytes=8)
    index = tmp_path / "importance.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(AgclError, match="do not trust it"):
        load_importance(path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    path = tmp_path / "importance.safetensors"
    save_importance(path, {name: torch.ones(8, dtype=torch.uint8) for name in "ab"}, {}, max_shard_bytes=8)
    first, second = sorted(tmp_path.glob("*-of-00002.safetensors"))
    second.write_bytes(first.read_bytes().replace(b"1 of 2", b"2 of 2"))
    with pytest.raises(AgclError, match="does not agree with its index: `a` is in the shard, but not there"):
        load_importance(path)
