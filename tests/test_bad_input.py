"""Bad input of every kind: one clear line that names the thing and the remedy, before training, and nothing is lost."""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from helpers import write_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from agcl import commands, lightning_cli
from agcl.attribution import save_importance
from agcl.cli import main
from agcl.module import ContinualLM

CHECKPOINT = "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Build the parser of one subcommand, not of four."""
    fit = {"fit": lightning_cli.AgclCLI.subcommands()["fit"]}
    monkeypatch.setattr(lightning_cli.AgclCLI, "subcommands", staticmethod(lambda: fit))
    monkeypatch.setattr("sys.argv", ["agcl"])


def keeping(folder: Path) -> dict[str, Any]:
    """Overrides that keep the latest checkpoint in a folder."""
    arguments = {"dirpath": str(folder), "filename": "last", "enable_version_counter": False}
    return {
        "trainer__enable_checkpointing": True,
        "trainer__callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}],
    }


def epochs(number: int) -> dict[str, Any]:
    return {f"data__tasks__{index}__epochs": number for index in range(2)}


@pytest.fixture(scope="session")
def earlier_run(llama_folder, task_files, tmp_path_factory) -> Path:
    """What a run of two tasks left: a checkpoint, importance, scores."""
    folder = tmp_path_factory.mktemp("earlier")
    path = write_config(llama_folder, task_files[:2], folder, **epochs(1), **keeping(folder / "checkpoints"))
    main(["fit", "--config", str(path)])
    save_importance(folder / "importance/one.safetensors", {"weight": torch.ones(2, 3, dtype=torch.uint8)}, {"task": "one"})
    return folder


@dataclass
class Place:
    """Where a case takes place; holds a copy of what an earlier run left."""

    folder: Path
    llama: Path
    files: list[Path]
    monkeypatch: pytest.MonkeyPatch

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def source(self, name: str, content: str | bytes, **overrides: Any) -> dict[str, Any]:
        return {"data__tasks__0__source": self.file(name, content), **overrides}

    def model(self, config: dict[str, Any] | None = None, without: str = "") -> dict[str, Any]:
        """A copy of the tiny model with other entries in its configuration, or without some files."""
        folder = self.folder / "model"
        shutil.copytree(self.llama, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **(config or {})}))
        for path in folder.glob(without or "no such file"):
            path.unlink()
        return {"model__model_name_or_path": str(folder)}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def cut(self, name: str) -> str:
        """Path of the truncated copy of a file."""
        content = (self.folder / name).read_bytes()
        return self.file(f"cut-{Path(name).name}", content[: 2 * len(content) // 3])


@pytest.fixture
def place(llama_folder, task_files, earlier_run, tmp_path, monkeypatch) -> Place:
    for part in ("checkpoints", "importance", "run"):
        shutil.copytree(earlier_run / part, tmp_path / part)
    return Place(tmp_path, llama_folder, task_files[:2], monkeypatch)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fit(place: Place, overrides: dict[str, Any]) -> None:
    path = write_config(place.llama, place.files, place.folder, **{**epochs(1), **overrides})
    main(["fit", "--config", str(path)])


def error_line(capsys, call: Callable[[], None]) -> str:
    """The only error line that a call prints before it ends the program."""
    with pytest.raises(SystemExit) as exit_info:
        call()
    code, output = exit_info.value.code, capsys.readouterr()
    printed = f"{output.out}{output.err}\n{'' if isinstance(code, int) else code}"
    assert "Traceback" not in printed
    assert code != 0
    lines = [line for line in printed.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("agcl: error: ")
    assert printed.rstrip().endswith(lines[0])  # nothing comes after it
    assert len(lines[0]) < 900
    return lines[0].removeprefix("agcl: error: ")


# ------------------------------------------------------------------ before training

ROW = '{"prompt": "cat", "answer": "a"}\n'
FROZEN = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def attribution(**options: Any) -> dict[str, Any]:
    return {f"trainer__callbacks__0__init_args__{name}": value for name, value in options.items()}


def tokenizer_of_another_model(place: Place) -> dict[str, Any]:
    overrides = place.model()
    config = tiny_config("llama")
    config.vocab_size = 20
    AutoModelForCausalLM.from_config(config).save_pretrained(place.folder / "model")
    return overrides


def truncated_weights(place: Place) -> dict[str, Any]:
    overrides = place.model()
    weights = place.folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    return overrides


def custom_code(place: Place) -> dict[str, Any]:
    place.file("run-me.txt", "")
    overrides = place.model({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})
    place.file("model/mine.py", "raise SystemExit('ran')")
    return overrides


def foreign_checkpoint(place: Place) -> dict[str, Any]:
    torch.save({"state_dict": {}}, place.folder / "foreign.ckpt")
    return {"ckpt_path": place.path("foreign.ckpt")}


def checkpoint_of_another_model(place: Place) -> dict[str, Any]:
    folder = save_tiny_model(place.folder / "gpt2", "gpt2")
    return {"model__model_name_or_path": str(folder), "ckpt_path": place.path(CHECKPOINT), "trainer__callbacks": []}


def other_order(place: Place) -> dict[str, Any]:
    return {"data__order": ["task1", "task0"], "ckpt_path": place.path(CHECKPOINT), "trainer__callbacks": []}


def read_only_folder(place: Place) -> dict[str, Any]:
    """Made by hand, since for the superuser no folder is read-only."""
    folder, mkdir = place.path("locked"), os.mkdir

    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    place.monkeypatch.setattr(os, "mkdir", refuse)
    return {"trainer__logger__init_args__save_dir": folder}


# What is wrong -> how the configuration comes to be so, and what the line says: the thing, then the remedy.
FIT: dict[str, tuple[Callable[[Place], dict[str, Any]], str]] = {
    # data
    "empty file": (lambda p: p.source("e.jsonl", ""), r"`task0`: the file .*e\.jsonl is empty; write rows"),
    "no rows": (lambda p: p.source("e.csv", "prompt,answer\n"), r"`task0`: .*e\.csv cannot be loaded: it is empty.*Mend"),
    "missing file": (lambda p: p.source("", b"") if False else {"data__tasks__0__source": "/no.csv"}, r"/no\.csv does not exist.*`data_dir`"),
    "wrong column": (lambda p: p.source("c.csv", "question,answer\nx,y\n"), r"no column `prompt` in .*c\.csv; its columns are question, answer"),
    "wrong encoding, table": (lambda p: p.source("l.csv", "prompt,answer\ncafé,a\n".encode("latin-1")), r"l\.csv .*not in UTF-8, so convert it"),
    "wrong encoding, JSON": (lambda p: p.source("l.jsonl", ROW.replace("cat", "café").encode("latin-1")), r"l\.jsonl is not in UTF-8, so convert it"),
    "broken JSON": (lambda p: p.source("b.jsonl", ROW + ROW[:9]), r"b\.jsonl cannot be loaded: JSON parse error.*Mend `source`"),
    "10 MB line": (lambda p: p.source("big.jsonl", ROW.replace("cat", "x" * 10_000_000)), r"row 0 of `train` has a prompt of 10000000 characters.*Shorten it"),
    "NaN label, table": (lambda p: p.source("n.csv", "prompt,answer\ncat,1\ndog,\n"), r"`answer` is empty in row 1 of `train`; `drop_empty`"),
    "NaN label, JSON": (lambda p: p.source("n.jsonl", ROW.replace('"a"', "NaN")), r"`answer` is empty in row 0 of `train`; `drop_empty`"),
    "label outside the set": (lambda p: {"data__tasks__0__metric": "label_accuracy", "data__tasks__0__labels": ["a"]}, r"row 1 of `train` has the label 'b', which is not among `labels` \(a\)"),
    "duplicate label": (lambda p: {"data__tasks__0__labels": ["a", "a"]}, r"`task0`: `labels` names a label twice: a, a; leave one out"),
    "duplicate task": (lambda p: {"data__tasks__1__name": "task0"}, r"Two tasks are named `task0`"),
    "duplicate column": (lambda p: p.source("d.csv", "prompt,answer,answer\ncat,a,b\n"), r"two columns `answer`; rename or remove one"),
    "answer longer than the context": (lambda p: p.source("a.jsonl", ROW.replace('"a"', f'"{"b" * 100}"'), data__truncation="left"), r"row 0 of `train` has an answer of 102 tokens.*`max_answer_tokens`"),
    "prompt longer than the context": (lambda p: p.source("a.jsonl", ROW.replace("cat", "b" * 100)), r"100 \+ 2 tokens.*64 tokens allowed.*`truncation: left`"),
    "empty split": (lambda p: {"data__tasks__0__test_split": "train[9:]"}, r"`task0`: split `train\[9:\]` of .* is empty"),
    # configuration
    "no configuration": (lambda p: {"config": "/no.yaml"}, r""),
    "unknown key": (lambda p: {"trainer__epochs": 3}, r"does not accept option 'trainer\.epochs'.*--help"),
    "unknown key of a task": (lambda p: {"data__tasks__0__epoch": 3}, r"`data\.tasks`: .*Option 'epoch' is not accepted.*--help"),
    "unknown key of a callback": (lambda p: attribution(samples=3), r"'agcl\.AttributionCallback': Option 'samples' is not accepted.*--help"),
    "wrong type": (lambda p: {"data__tasks__0__epochs": "three"}, r"`epochs`: Expected a <class 'int'>. Got value: three.*--help"),
    "unknown choice": (lambda p: attribution(gate="none"), r"`gate`: Expected .*\['auto', 'gradient', 'update'\]. Got value: none"),
    "zero epochs": (lambda p: {"data__tasks__0__epochs": 0}, r"`task0`: `epochs` is 0; give at least 1"),
    "empty batches": (lambda p: {"data__batch_size": 0}, r"`batch_size` is 0; give at least 1"),
    "no context": (lambda p: {"data__max_length": 0}, r"`max_length` is 0; give at least 2"),
    "longer than the model's context": (lambda p: {"data__max_length": 5000}, r"`max_length` is 5000, but the model's context has 64"),
    "contradictory: joint and replay": (lambda p: {"data__regime": "joint", "data__replay": {"share": 1}}, r"`replay` has no meaning with `regime: joint`.*leave it out"),
    "contradictory: single_task and reestimate": (lambda p: attribution(source="single_task", reestimate=2), r"`reestimate`.*`source: single_task`.*choose one"),
    "contradictory: gate and joint": (lambda p: {"data__regime": "joint"}, r"`regime: joint` has neither. Leave it out"),
    "contradictory: labels and substitutions": (lambda p: {"data__tasks__0__metric": "label_accuracy", "data__tasks__0__labels": list("abcd"), "data__tasks__0__substitutions": {"a": "b"}}, r"`label_accuracy` compares with `labels`, so `substitutions` cannot"),
    "gate on frozen parameters": (lambda p: {"model__adapter": FROZEN, **attribution(parameters="embed_tokens")}, r"`parameters` 'embed_tokens' matches no trainable .*only frozen ones.*choose others"),
    "K above samples": (lambda p: attribution(importance={"top_k": 8}), r"`importance.top_k` is 8, .*only 2 samples.*lower the one or raise the other"),
    "negative strength": (lambda p: attribution(strength=-1.0), r"`strength` is -1\.0; choose a finite number, 0"),
    "infinite strength": (lambda p: attribution(strength=float("inf")), r"`strength` is inf; choose a finite number"),
    "negative learning rate": (lambda p: {"model__optimizer__init_args__lr": -1.0}, r"`optimizer`.*Invalid learning rate: -1\.0.*Mend"),
    "no such device": (lambda p: {"trainer__accelerator": "tpu"}, r"TPU.*not available.*'cpu'"),
    "no optimizer": (lambda p: {"model__optimizer": {"class_path": "agcl.Task"}}, r"`model\.optimizer`: .*Expected 'agcl\.Task' to be a subclass of <class 'Optimizer'>"),
    # model
    "unknown model": (lambda p: {"model__model_name_or_path": "/nowhere"}, r"could be loaded from `/nowhere`: give a hub name"),
    "no tokenizer": (lambda p: p.model(without="token*"), r"No tokenizer could be loaded from .*model`: put the model's tokenizer beside it"),
    "custom code": (custom_code, r"model` comes with code of its own.*`--model\.trust_remote_code true`"),
    "encoder-decoder": (lambda p: p.model({"model_type": "t5", "is_encoder_decoder": True}), r"is an encoder-decoder \(t5\). Choose a decoder-only"),
    "quantised weights": (lambda p: p.model({"quantization_config": {"quant_method": "gptq", "bits": 4}}), r"are quantised \(gptq\).*take the model without quantisation"),
    "truncated weights": (truncated_weights, r"No model could be loaded from .*model`.*incomplete metadata"),
    "tokenizer of another model": (tokenizer_of_another_model, r"the token \d+, but the model knows only 20: .*put the model's own beside it"),
    "attention from the hub": (lambda p: {"model__attn_implementation": "some/kernel"}, r"`attn_implementation: some/kernel` is compiled code.*take sdpa"),
    "unusable adapter": (lambda p: {"model__adapter": {"peft_type": "NOTHING"}}, r"`adapter` .* is no usable PEFT configuration"),
    # files
    "no checkpoint": (lambda p: {"ckpt_path": "/no.ckpt"}, r"The checkpoint /no\.ckpt does not exist"),
    "truncated checkpoint": (lambda p: {"ckpt_path": p.cut(CHECKPOINT)}, r"cut-last\.ckpt is not a checkpoint, or not a whole one: take an earlier one"),
    "foreign file as a checkpoint": (lambda p: {"ckpt_path": __file__}, r"test_bad_input\.py is not a checkpoint.*take"),
    "foreign checkpoint": (foreign_checkpoint, r"foreign\.ckpt was not written by agcl.*Take a checkpoint of this run"),
    "checkpoint of another model": (checkpoint_of_another_model, r"The checkpoint is of another model: `model.*Resume with the configuration"),
    "checkpoint of another order": (other_order, r"saved while learning the tasks \[\['task0', 1\], \['task1', 1\]\].*\[\['task1', 1\], .*Resume with the configuration"),
    "read-only folder": (read_only_folder, r"Permission denied: '.*locked.*'; choose a folder that you may write to"),
    # state
    "all parameters frozen": (lambda p: {"model__adapter": {**FROZEN, "inference_mode": True}, "trainer__callbacks": []}, r"All parameters are frozen.*leave `adapter` out"),
}


@pytest.mark.parametrize("name", FIT)
def test_refused_before_training(name, place, capsys, monkeypatch):
    change, message = FIT[name]
    overrides = change(place)
    saved = contents(place.folder)

    def train(*arguments):
        raise AssertionError("training began")

    monkeypatch.setattr(ContinualLM, "training_step", train)
    line = error_line(capsys, lambda: fit(place, overrides))
    monkeypatch.undo()
    import re
    assert re.search(message, line), line
    now = contents(place.folder)
    assert {path: now.get(path) for path in saved} == saved
