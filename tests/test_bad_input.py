"""Bad input of every kind: one clear line that names the thing and the remedy, before training, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from helpers import attribution, build, trainer_for, write_config
from lightning.pytorch.accelerators import CUDAAccelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from agcl import lightning_cli, models
from agcl.attribution import save_importance
from agcl.cli import main
from agcl.models import load_model
from agcl.module import ContinualLM

Overrides = dict[str, Any]
ROW = '{"prompt": "cat", "answer": "a"}\n'
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
LAST, IMPORTANCE = "last.ckpt", "importance/one.safetensors"


@pytest.fixture(scope="module")
def earlier_run(llama_folder, task_files, tmp_path_factory) -> Path:
    """What a run of two tasks left."""
    folder = tmp_path_factory.mktemp("earlier")
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    trainer = trainer_for(data, folder)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / LAST)
    save_importance(folder / IMPORTANCE, {"weight": torch.ones(20, 30, dtype=torch.uint8)}, {"task": "one"})
    (folder / "scores.json").write_text("{}")
    return folder


@dataclass
class Place:
    """The folder of a run; it holds what an earlier run left."""

    folder: Path
    llama: Path
    files: list[Path]
    monkeypatch: pytest.MonkeyPatch

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def file(self, name: str, content: str | bytes) -> str:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return self.path(name)

    def source(self, name: str, content: str | bytes, **overrides: Any) -> Overrides:
        """The first task's rows."""
        return {"data__tasks__0__source": self.file(name, content), **overrides}

    def model(self, without: str = "no such file", **config: Any) -> Overrides:
        """A copy of the tiny model with other entries in its configuration, or without some files."""
        folder = self.folder / "model"
        shutil.copytree(self.llama, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        for path in folder.glob(without):
            path.unlink()
        return {"model__model_name_or_path": str(folder)}

    def cut(self, name: str) -> str:
        """A truncated copy of a file."""
        content = (self.folder / name).read_bytes()
        return self.file(f"cut-{Path(name).name}", content[: 2 * len(content) // 3])

    def configuration(self, **overrides: Any) -> str:
        """A file beside the run's folder."""
        basic = {
            "trainer__logger": False,
            "trainer__default_root_dir": str(self.folder),
            "trainer__enable_progress_bar": False,
            **{f"data__tasks__{index}__epochs": 1 for index in range(2)},
        }
        return str(write_config(self.llama, self.files, self.folder.parent, **{**basic, **overrides}))

    def fit(self, **overrides: Any) -> None:
        main(["fit", "--config", self.configuration(**overrides)])


@pytest.fixture
def place(llama_folder, task_files, earlier_run, tmp_path, monkeypatch) -> Place:
    fit = {"fit": lightning_cli.AgclCLI.subcommands()["fit"]}  # the other subcommands' parsers take their time
    monkeypatch.setattr(lightning_cli.AgclCLI, "subcommands", staticmethod(lambda: fit))
    monkeypatch.setattr("sys.argv", ["agcl"])
    shutil.copytree(earlier_run, tmp_path / "run")
    return Place(tmp_path / "run", llama_folder, task_files[:2], monkeypatch)


def error_line(capsys, call: Callable[[], None]) -> str:
    """What a call says in one line, the last and the only one of its kind, when it ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        call()
    code, output = exit_info.value.code, capsys.readouterr()
    printed = f"{output.out}{output.err}\n{'' if isinstance(code, int) else code}".rstrip()
    assert code not in (0, None)
    assert "Traceback" not in printed
    assert len(re.findall(r"^(?:\w+: )?error: ", printed, re.MULTILINE)) == 1, printed
    line = printed.splitlines()[-1]
    assert line.startswith("agcl: error: "), printed
    assert len(line) < 900
    return line.removeprefix("agcl: error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gate(**options: Any) -> Overrides:
    return {f"trainer__callbacks__0__init_args__{name}": value for name, value in options.items()}


# ------------------------------------------------------------------------------------- agcl fit, before training


def tokenizer_of_another_model(place: Place) -> Overrides:
    overrides = place.model()
    config = tiny_config("llama")
    config.vocab_size = 20
    AutoModelForCausalLM.from_config(config).save_pretrained(place.folder / "model")
    return overrides


def truncated_weights(place: Place) -> Overrides:
    overrides = place.model()
    weights = place.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    return overrides


def custom_code(place: Place) -> Overrides:
    overrides = place.model(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    place.file("model/mine.py", "raise SystemExit('ran')")
    return overrides


def foreign_checkpoint(place: Place) -> Overrides:
    torch.save({"state_dict": {}}, place.folder / "foreign.ckpt")
    return {"ckpt_path": place.path("foreign.ckpt")}


def no_gpu(place: Place) -> Overrides:
    place.monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    return {"trainer__accelerator": "cuda"}


def read_only_folder(place: Place) -> Overrides:
    """Made by hand, since for the superuser no folder is read-only."""
    folder, mkdir = place.path("locked"), os.mkdir

    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    place.monkeypatch.setattr(os, "mkdir", refuse)
    return {"trainer__default_root_dir": folder}


# What is wrong: how the configuration comes to be so, and what the line says of the thing and of the remedy.
FIT: dict[str, tuple[Callable[[Place], Overrides], str]] = {
    # ---------------------------------------------------------------------------------------------------- data
    "empty file": (
        lambda place: place.source("e.jsonl", ""),
        r"Task `task0`: the file .*e\.jsonl is empty; write rows into it",
    ),
    "no rows": (
        lambda place: place.source("e.csv", "prompt,answer\n"),
        r"Task `task0`: .*e\.csv cannot be loaded: it is empty\. Mend `source`",
    ),
    "missing file": (
        lambda place: {"data__tasks__0__source": "/no.csv"},
        r"Task `task0`: the file /no\.csv does not exist.*`data_dir`",
    ),
    "missing file in a folder": (
        lambda place: {"data__data_dir": "/", "data__tasks__0__source": "no.csv"},
        r"Task `task0`: the file /no\.csv does not exist",
    ),
    "missing folder": (lambda place: {"data__data_dir": "/no"}, r"`data_dir` is /no, which is not a folder: name"),
    "wrong column": (
        lambda place: place.source("c.csv", "question,answer\nx,y\n"),
        r"no column `prompt` in .*c\.csv; its columns are question, answer",
    ),
    "wrong encoding, table": (
        lambda place: place.source("l.csv", "prompt,answer\ncafé,a\n".encode("latin-1")),
        r"l\.csv .*not in UTF-8, so convert it",
    ),
    "wrong encoding, JSON": (
        lambda place: place.source("l.jsonl", ROW.replace("cat", "café").encode("latin-1")),
        r"l\.jsonl is not in UTF-8, so convert it",
    ),
    "broken JSON": (
        lambda place: place.source("b.jsonl", ROW + ROW[:9]),
        r"b\.jsonl cannot be loaded: JSON parse error.*Mend `source`",
    ),
    "10 MB line": (
        lambda place: place.source("big.jsonl", ROW.replace("cat", "x" * 10_000_000)),
        r"row 0 of `train` has a prompt of 10000000 characters, more than 64 tokens hold; shorten it",
    ),
    "NaN label, table": (
        lambda place: place.source("n.csv", "prompt,answer\ncat,1\ndog,\n"),
        r"column `answer` is empty in row 1 of `train`; `drop_empty` leaves such rows out",
    ),
    "NaN label, JSON": (
        lambda place: place.source("n.jsonl", ROW.replace('"a"', "NaN")),
        r"column `answer` is empty in row 0 of `train`; `drop_empty` leaves such rows out",
    ),
    "label outside the set": (
        lambda place: {"data__tasks__0__metric": "label_ranking", "data__tasks__0__labels": ["a"]},
        r"row 1 of `train` has the label 'b', which is not among `labels` \(a\)",
    ),
    "duplicate label": (
        lambda place: {"data__tasks__0__labels": ["a", "b", "a"]},
        r"Task `task0`: `labels` names a label twice: a, b, a; leave one out",
    ),
    "duplicate task": (lambda place: {"data__tasks__1__name": "task0"}, r"Two tasks are named `task0`"),
    "duplicate column": (
        lambda place: place.source("d.csv", "prompt,answer,answer\ncat,a,b\n"),
        r"d\.csv has two columns `answer`; rename or remove one",
    ),
    "answer longer than the context": (
        lambda place: place.source("a.jsonl", ROW.replace('"a"', f'"{"b" * 100}"'), data__truncation="left"),
        r"row 0 of `train` has an answer of 102 tokens.*`max_answer_tokens`",
    ),
    "prompt longer than the context": (
        lambda place: place.source("a.jsonl", ROW.replace("cat", "b" * 100)),
        r"row 0 of `train` has 100 \+ 3 tokens.*more than the 64 allowed.*`truncation: left`",
    ),
    "files of several kinds": (
        lambda place: {
            "data__tasks__0__source": {"train": place.file("k.jsonl", ROW), "test": place.file("k.csv", "prompt\n1\n")}
        },
        r"Task `task0`: its files are of several kinds \(\.csv, \.jsonl\); make them one",
    ),
    "a chat's messages": (
        lambda place: place.source("m.jsonl", '{"prompt": [{"role": "user", "content": "cat"}], "answer": "a"}\n'),
        r"column `prompt` of .*m\.jsonl holds lists or structures, .*, or read its chats by `messages: prompt`\.",
    ),
    "empty split": (
        lambda place: {"data__tasks__1__test_split": "train[9:]"},
        r"Task `task1`: split `train\[9:\]` of .* is empty",
    ),
    # ------------------------------------------------------------------------------------------- configuration
    "unknown key": (lambda place: {"trainer__epochs": 3}, r"does not accept option 'trainer\.epochs'.*--help"),
    "unknown key of a task": (
        lambda place: {"data__tasks__0__epoch": 3},
        r"`data\.tasks`: .*Option 'epoch' is not accepted.*--help",
    ),
    "unknown key of a callback": (
        lambda place: gate(samples=3),
        r"`trainer\.callbacks`: .*'agcl\.AttributionCallback': Option 'samples' is not accepted.*--help",
    ),
    "wrong type": (
        lambda place: {"data__tasks__0__epochs": "three"},
        r"`epochs`: Expected a <class 'int'>\. Got value: three.*--help",
    ),
    "unknown choice": (
        lambda place: gate(gate="none"),
        r"`gate`: Expected .*\['auto', 'gradient', 'update'\]\. Got value",
    ),
    "labels that are no text": (
        lambda place: {"data__tasks__0__labels": [0, 1]},
        r"`labels`: Expected a <class 'str'>\. Got value: 0\. In YAML, put it in quotes",
    ),
    "zero epochs": (lambda place: {"data__tasks__0__epochs": 0}, r"Task `task0`: `epochs` is 0; give at least 1"),
    "empty batches": (lambda place: {"data__batch_size": 0}, r"`batch_size` is 0; give at least 1"),
    "no context": (lambda place: {"data__max_length": 0}, r"`max_length` is 0; give at least 2"),
    "more than the context": (
        lambda place: {"data__max_length": 5000},
        r"`max_length` is 5000, but the model's context has 64 tokens",
    ),
    "incomplete order": (lambda place: {"data__order": ["task0"]}, r"`order` leaves out task1"),
    "negative replay": (
        lambda place: {"data__replay": {"share": -1.0}},
        r"`replay\.share` is -1\.0; give a number above",
    ),
    "nothing to validate on": (
        lambda place: {"data__evaluate_on": "validation"},
        r"Task `task0` declares no `validation_split`.*leave `evaluate_on` at `test`",
    ),
    "contradiction: joint, replay": (
        lambda place: {"data__regime": "joint", "data__replay": {"share": 1}},
        r"`replay` has no meaning with `regime: joint`.*leave it out",
    ),
    "contradiction: joint, gate": (
        lambda place: {"data__regime": "joint"},
        r"`regime: joint` has neither\. Leave it out",
    ),
    "contradiction: single_task, reestimate": (
        lambda place: gate(source="single_task", reestimate=2),
        r"`reestimate` .*`source: single_task`.*choose one of them",
    ),
    "gate on frozen parameters": (
        lambda place: {"model__adapter": LORA, **gate(parameters="embed_tokens")},
        r"`parameters` 'embed_tokens' matches no trainable parameter .*only frozen ones.*choose others",
    ),
    "K above samples": (
        lambda place: gate(importance={"top_k": 8}),
        r"`importance\.top_k` is 8, but there are only 2 samples .*lower the one or raise the other",
    ),
    "scoring in between": (
        lambda place: {"trainer__check_val_every_n_epoch": 2},
        r"Tasks are scored at their end: leave the Trainer's `check_val_every_n_epoch` out",
    ),
    "negative strength": (lambda place: gate(strength=-1.0), r"`strength` is -1\.0; choose a finite number, 0"),
    "infinite strength": (lambda place: gate(strength=float("inf")), r"`strength` is inf; choose a finite number"),
    "negative learning rate": (
        lambda place: {"model__optimizer__init_args__lr": -1.0},
        r"`optimizer` .*: Invalid learning rate: -1\.0\. Mend its `init_args`",
    ),
    "no optimizer": (
        lambda place: {"model__optimizer": {"class_path": "agcl.Task"}},
        r"`model\.optimizer`: .*Expected 'agcl\.Task' to be a subclass of <class 'Optimizer'>",
    ),
    "no such device": (no_gpu, r"`CUDAAccelerator` can not run on your system.*can be passed into `accelerator`"),
    # --------------------------------------------------------------------------------------------------- model
    "unknown model": (
        lambda place: {"model__model_name_or_path": "/nowhere"},
        r"could be loaded from `/nowhere`: give a hub name",
    ),
    "unknown built-in model": (
        lambda place: {"model__model_name_or_path": "builtin:nothing"},
        r"There is no built-in model `nothing`\. Choose one of",
    ),
    "no tokenizer": (
        lambda place: place.model(without="token*"),
        r"No tokenizer could be loaded from .*model`: put the model's tokenizer beside it",
    ),
    "custom code": (custom_code, r"model` comes with code of its own.*`--model\.trust_remote_code true`"),
    "encoder-decoder": (
        lambda place: place.model(model_type="t5", is_encoder_decoder=True),
        r"model` is an encoder-decoder \(t5\)\. Choose a decoder-only",
    ),
    "encoder": (
        lambda place: place.model(model_type="bert"),
        r"model` is an encoder \(bert without `is_decoder`\)\. Choose a decoder-only",
    ),
    "quantised weights": (
        lambda place: place.model(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"model` are quantised \(gptq\).*take the model without quantisation",
    ),
    "weights to be quantised": (
        lambda place: {"model__quantization_config": {"load_in_4bit": True}},
        r"that `quantization_config` quantises cannot be trained: train an `adapter`",
    ),
    "truncated weights": (truncated_weights, r"No model could be loaded from .*model`.*incomplete metadata"),
    "tokenizer of another model": (
        tokenizer_of_another_model,
        r"has the token \d+, but the model knows only 20: .*put the model's own beside it",
    ),
    "attention from the hub": (
        lambda place: {"model__attn_implementation": "some/kernel"},
        r"`attn_implementation: some/kernel` is compiled code from the hub.*take sdpa or eager",
    ),
    "prompt learning": (
        lambda place: {"model__adapter": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}},
        r"`adapter\.peft_type: PROMPT_TUNING` puts tokens of its own before each row.*take one that changes weights",
    ),
    "unusable adapter": (
        lambda place: {"model__adapter": {"peft_type": "NOTHING"}},
        r"`adapter` {'peft_type': 'NOTHING'} is no usable PEFT configuration",
    ),
    # --------------------------------------------------------------------------------------------------- files
    "no checkpoint": (lambda place: {"ckpt_path": "/no.ckpt"}, r"The checkpoint /no\.ckpt does not exist"),
    "truncated checkpoint": (
        lambda place: {"ckpt_path": place.cut(LAST)},
        r"cut-last\.ckpt is not a checkpoint, or not a whole one: take an earlier one",
    ),
    "foreign file": (lambda place: {"ckpt_path": __file__}, r"test_bad_input\.py is not a checkpoint.*: take"),
    "foreign checkpoint": (foreign_checkpoint, r"foreign\.ckpt was not written by agcl.*Take a checkpoint of this run"),
    "checkpoint of another model": (
        lambda place: {
            "model__model_name_or_path": str(save_tiny_model(place.folder / "gpt2", "gpt2")),
            "ckpt_path": place.path(LAST),
        },
        r"The checkpoint is of another model: `model.*Resume with the configuration that it was saved with",
    ),
    "checkpoint of another task order": (
        lambda place: {"data__order": ["task1", "task0"], "ckpt_path": place.path(LAST)},
        r"the tasks \[\['task0', 1\], \['task1', 1\]\] .*\[\['task1', 1\], \['task0', 1\]\]\. Resume with",
    ),
    "read-only folder": (read_only_folder, r"Permission denied: '.*locked.*'; choose a folder that you may write to"),
    # --------------------------------------------------------------------------------------------------- state
    "all parameters frozen": (
        lambda place: {"model__adapter": {**LORA, "inference_mode": True}, "trainer__callbacks": []},
        r"All parameters are frozen, so nothing can be learned: leave `adapter` out",
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_refused_before_training_in_one_line(name, place, capsys, monkeypatch):
    change, message = FIT[name]
    overrides = change(place)
    before = contents(place.folder)

    def train(*arguments):
        raise AssertionError("training began")

    monkeypatch.setattr(ContinualLM, "training_step", train)
    line = error_line(capsys, lambda: place.fit(**overrides))
    assert re.search(message, line), line
    after = contents(place.folder)
    assert {name: after.get(name) for name in before} == before
    assert not after.keys() - before.keys() - {"config.yaml"}


# ------------------------------------------------------------------------------------------- the other commands


def foreign_importance(place: Place) -> str:
    save_file({"weight": torch.ones(2)}, place.folder / "foreign.safetensors")
    return place.path("foreign.safetensors")


def importance_of_another_model(place: Place) -> str:
    path = place.folder / "other.safetensors"
    save_importance(path, {"weight": torch.ones(3, 2, dtype=torch.uint8)}, {"task": "other"})
    return str(path)


def words(text: str) -> Callable[[Place], list[str]]:
    return lambda place: text.replace("ONE", place.path(IMPORTANCE)).split()


COMMANDS: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "no configuration": (words("fit --config /no.yaml"), r"`config`: File does not exist: '/no\.yaml'"),
    "broken configuration": (
        lambda place: ["fit", "--config", place.file("broken.yaml", "trainer: [1,\nmodel: 3")],
        r"Problems parsing config: while parsing .*line 1.*--help",
    ),
    "no command": (words(""), r"expected \"subcommand\" to be one of {fit.*See `agcl --help`"),
    "unknown command": (words("fti"), r"invalid choice: 'fti' \(choose from 'fit'"),
    "unknown option": (words("fit --modle x"), r"unrecognized arguments: --modle x\. See `agcl fit --help`"),
    "missing importance": (
        words("importance show /no"),
        r"There is no importance file /no; name a file written by agcl",
    ),
    "truncated importance": (
        lambda place: ["importance", "show", place.cut(IMPORTANCE)],
        r"cut-one\.safetensors is truncated or no importance file.*copy it again, or compute it anew",
    ),
    "foreign importance": (
        lambda place: ["importance", "show", foreign_importance(place)],
        r"foreign\.safetensors is not an importance file; name a file written by agcl",
    ),
    "importance of another model": (
        lambda place: [*words("importance merge --output new ONE")(place), importance_of_another_model(place)],
        r"`weight` has shape \(3, 2\), in an earlier task \(20, 30\); merge tasks of one model",
    ),
    "existing output": (
        words("importance merge ONE --output ONE"),
        r"one\.safetensors exists; choose another name, or add --overwrite",
    ),
    "unknown option of a command": (
        words("importance show ONE --foo"),
        r"unrecognized arguments: --foo\. See `agcl importance show --help`",
    ),
    "too large a share": (
        words("importance compare ONE ONE --top_share 2"),
        r"`top_share` is 2; choose a share above 0, at most 1",
    ),
    "no comparison": (words("compare --config /no.yaml"), r"The file /no\.yaml does not exist"),
    "nothing to plan": (words("plan --config /no.yaml"), r"`config`: File does not exist: '/no\.yaml'"),
    "plan of a model that is not there": (
        lambda place: ["plan", "--config", place.configuration(model__model_name_or_path="/nowhere")],
        r"could be loaded from `/nowhere`: give a hub name",
    ),
    "no tasks to begin with": (words("init /no"), r"/no is no folder: name the one that holds"),
    "configuration that exists": (
        lambda place: ["init", place.path("importance"), "--output", place.file("mine.yaml", "x: 1")],
        r"mine\.yaml exists; move it away, or choose another name with --output",
    ),
    "nothing to export": (words("export /no --output new"), r"/no does not exist; name the folder of a run"),
    "export of what is no run": (
        lambda place: ["export", place.path(""), "--output", place.path("new")],
        r"scores\.json has no `tasks`",
    ),
    "nothing to report": (words("report /no"), r"/no is not a folder; name a run's folder"),
    "report of what is no run": (lambda place: ["report", place.path("")], r"scores\.json has no `tasks`"),
    "unknown model to check": (words("check-model /no"), r"No model could be loaded from `/no`: give a hub name"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_in_one_line(name, place, capsys):
    arguments, message = COMMANDS[name]
    given = arguments(place)
    before = contents(place.folder)
    line = error_line(capsys, lambda: main(given))
    assert re.search(message, line), line
    assert contents(place.folder) == before


def test_there_are_forty():
    assert len(FIT) + len(COMMANDS) >= 40


# ---------------------------------------------------------------------------------------------- during training


def replacing(place: Place) -> Overrides:
    """Overrides that replace the earlier run's checkpoint at the end of the first epoch."""
    options = {"dirpath": str(place.folder), "filename": "last", "enable_version_counter": False}
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    return {"trainer__enable_checkpointing": True, "trainer__callbacks": [keep]}


def test_a_loss_that_is_no_number_leaves_the_checkpoint(place, capsys):
    before = contents(place.folder)
    rate = {"model__optimizer__init_args__lr": 1e30}
    line = error_line(capsys, lambda: place.fit(**replacing(place), **rate))
    assert re.search(r"Task `task0`: (the loss|its nll) is nan at step \d.*Lower the learning rate", line), line
    after = contents(place.folder)
    assert {name: after[name] for name in before} == before


def test_the_loss_is_looked_at_before_the_step(llama_folder, task_files, tmp_path, monkeypatch):
    model, data = build(llama_folder, task_files[:1])
    monkeypatch.setattr("agcl.module.token_nll", lambda logits, targets: logits.sum() * torch.nan)
    with pytest.raises(ValueError, match="Task `task0`: the loss is nan at step 0 "):
        trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_terms_of_the_loss_are_looked_at_too(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files[:1])
    model.loss_terms["penalty"] = lambda batch, logits, targets: logits.sum() * torch.nan
    with pytest.raises(ValueError, match="Task `task0`: the term `penalty` of the loss is nan at step 0 "):
        trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_full_disk_leaves_the_checkpoint(place, capsys, monkeypatch):
    before = contents(place.folder)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", place.path(LAST))

    monkeypatch.setattr(torch, "save", full)
    line = error_line(capsys, lambda: place.fit(**replacing(place)))
    assert re.search(r"No space left on device: .*last\.ckpt.*(free some|Make room)", line), line
    after = contents(place.folder)
    assert [after[name] for name in (LAST, IMPORTANCE)] == [before[name] for name in (LAST, IMPORTANCE)]


def test_no_correct_sample_is_one_line_and_the_run_goes_on(llama_folder, task_files, tmp_path, monkeypatch):
    monkeypatch.setattr("agcl.attribution.relevance.is_correct", lambda *arguments: False)
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    callback = attribution()
    with pytest.warns(UserWarning, match="no training row is answered correctly.*Train it longer") as caught:
        trainer_for(data, tmp_path, [callback]).fit(model, datamodule=data)
    lines = [str(warning.message) for warning in caught if "answered correctly" in str(warning.message)]
    assert [line.split(":")[0] for line in lines] == ["Task `task0`", "Task `task1`"]
    assert not any("\n" in line for line in lines)
    assert not callback.importance


def test_repeated_rows_are_counted_in_one_line(llama_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(3 * ROW + ROW.replace('"a"', '"b"') + ROW.replace("cat", "dog"))
    _, data = build(llama_folder, [path])
    with pytest.warns(
        UserWarning, match="Task `task0`: in `train`, 2 rows repeat an earlier one, and 1 have the prompt"
    ):
        data.setup()
    assert len(data.training_rows(0)) == 5


# ------------------------------------------------------------------------------------------------------ --debug


@pytest.mark.parametrize("arguments", [["--debug", "fit"], ["fit", "--debug"]])
def test_debug_shows_where(place, arguments):
    with pytest.raises(Exception, match="unrecognized arguments: --modle") as error:
        main([*arguments, "--modle"])
    assert not isinstance(error.value, SystemExit)


def test_debug_by_the_environment(place, monkeypatch):
    monkeypatch.setenv("AGCL_DEBUG", "1")
    with pytest.raises(ValueError, match="There is no importance file /no"):
        main(["importance", "show", "/no"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 88.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_full_memory_is_called_so_wherever_it_strikes(place, capsys, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(lightning_cli, "AgclCLI", fail)
    monkeypatch.setattr(fail, "subcommands", dict, raising=False)
    line = error_line(capsys, lambda: main(["fit"]))
    assert line.startswith("Memory is full: see `agcl plan`")
    assert "data.batch_size" in line
    assert str(error) in line

    # Not a fault of the model's name, though most errors are while one is loaded, nor of the adapter's settings.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load_model(str(place.llama))


def test_full_memory_is_no_fault_of_an_adapter(llama_folder, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(models, "get_peft_model", fail)
    with pytest.raises(torch.OutOfMemoryError):
        ContinualLM(model_name_or_path=str(llama_folder), adapter=LORA).configure_model()


def test_what_was_not_foreseen_is_one_line_too(place, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(lightning_cli, "AgclCLI", fail)
    monkeypatch.setattr(fail, "subcommands", dict, raising=False)
    line = error_line(capsys, lambda: main(["fit"]))
    assert line == "RuntimeError: first line second line (not foreseen; add --debug to see where)"
    monkeypatch.setattr("sys.argv", ["agcl", "fit", "--debug"])
    monkeypatch.setenv("AGCL_DEBUG", "0")
    with pytest.raises(RuntimeError, match="first line"):
        main()
    assert sys.argv == ["agcl", "fit"]
