"""A whole continual run on a tiny model, for the tests of the loop and its callbacks."""

import io
import sys
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl.attribution import ImportanceConfig
from agcl.attribution.directions import shares_kept
from agcl.callbacks import AttributionCallback, Directions
from agcl.cli import main
from agcl.data.datamodule import ContinualDataModule
from agcl.data.tasks import Task
from agcl.module import ContinualLM
from agcl.shards import gathered

EPOCHS = 3


def slow(*cases):
    """Cases of ``parametrize``, each a tuple of values or a single value, that only the longer tests run."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


class CrashError(RuntimeError):
    """Stands for a killed process."""


class CrashAt(Callback):
    """Stops the process before training step ``step``; in the last scoring, if that is how many steps there are."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise CrashError

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step and trainer.current_epoch == trainer.max_epochs - 1:
            raise CrashError


class WeightsAtBoundaries(Callback):
    """The weights at the end of each task, before the callbacks that follow act."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self.weights.append(weights(pl_module.model))


class SaveWhole(Callback):
    """Writes the weights at the end, those that are split over processes gathered."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        whole = {name: gathered(parameter) for name, parameter in pl_module.model.named_parameters()}
        if trainer.is_global_zero:
            torch.save(whole, self.path)


def tasks(files, epochs=EPOCHS, **options):
    """One task for each file; ``epochs`` for all, or of each."""
    each = [epochs] * len(files) if isinstance(epochs, int) else epochs
    return [
        Task(**{"name": f"task{i}", "source": str(f), "test_split": "train", "epochs": e, **options})
        for i, (f, e) in enumerate(zip(files, each, strict=False))
    ]


def build(folder: Path, files, *, optimizer=None, batch_size=2, task_options=None, data_options=None, **model_options):
    seed_everything(0, verbose=False)
    model = ContinualLM(
        str(folder), optimizer=optimizer or partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1), **model_options
    )
    data = ContinualDataModule(
        tasks(files, **(task_options or {})), str(folder), batch_size=batch_size, **(data_options or {})
    )
    return model, data


def attribution(**options):
    # An untrained model answers little: take what there is, and gate strongly so that effects are plain to see.
    # Each weight gated on its own, unless a test says otherwise: what most of them are about.
    usual = {"num_samples": 3, "importance": ImportanceConfig(quantile=0.3), "directions": None}
    return AttributionCallback(**{**usual, **options})


def by_direction(plasticity=0.5, every=1, own_text=0, **options):
    directions = Directions(plasticity, every=every, own_text=own_text, own_tokens=16)
    return attribution(directions=directions, **options)


def check_budget(callback, budget, plasticity):
    """Matrices may go as far as the budget says, or, where more directions than that are not used, further."""
    for name, moment in callback._directions.moments.sums.items():
        shares, _ = shares_kept(moment, budget)
        assert shares.mean() > budget - 1e-4
        gated = name.replace("base_layer", "lora_A.learning")
        assert plasticity[gated] == pytest.approx(float(shares.mean()), abs=1 / 255)


def trainer_for(data, run_dir: Path, callbacks=(), **options):
    return Trainer(
        **{
            **data.trainer_arguments(),
            "accelerator": "cpu",
            "default_root_dir": run_dir,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_resumes(folder, files, run_dir, callback, crash_at, *, every_n_steps=1, trainer_options=None, **options):
    """A run killed before step ``crash_at`` and resumed from its newest checkpoint ends like one that was not.

    Args:
        folder: The model.
        files: Of the tasks.
        run_dir: For all there is to write.
        callback: Makes the callback under test.
        crash_at: See ``CrashAt``.
        every_n_steps: Steps from one checkpoint to the next; 0: one at the end of each epoch.
        trainer_options: Of each trainer.
        options: Of ``build``.
    """
    trainer_options = trainer_options or {}
    straight, data = build(folder, files, **options)
    straight_callback = callback()
    straight_trainer = trainer_for(data, run_dir / "straight", [straight_callback], **trainer_options)
    straight_trainer.fit(straight, datamodule=data)

    model, data = build(folder, files, **options)
    when = {"every_n_train_steps": every_n_steps} if every_n_steps else {"every_n_epochs": 1}
    saving = ModelCheckpoint(run_dir / "checkpoints", save_top_k=-1, filename="{step}", **when)
    callbacks = [callback(), CrashAt(crash_at), saving]
    with pytest.raises(CrashError):
        trainer_for(data, run_dir / "killed", callbacks, enable_checkpointing=True, **trainer_options).fit(
            model, datamodule=data
        )
    newest = max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))

    resumed, data = build(folder, files, **options)
    resumed_callback = callback()
    trainer = trainer_for(data, run_dir / "resumed", [resumed_callback], **trainer_options)
    trainer.fit(resumed, datamodule=data, ckpt_path=newest)
    assert trainer.global_step == straight_trainer.global_step
    expected, found = weights(straight), weights(resumed)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(parameter, found[name]), name
    for name, matrix in straight.score_matrices.items():
        assert torch.equal(matrix.compute(), resumed.score_matrices[name].compute()), name
    assert straight_callback.extra_bytes() == resumed_callback.extra_bytes()


@cache
def printed_config(*paths):
    """What the command line makes of configuration files laid over one another; not to be changed, for it is kept."""
    arguments = ["fit", *(argument for path in paths for argument in ("--config", str(path))), "--print_config"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["agcl"])
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
    assert exit_info.value.code == 0
    return yaml.safe_load(printed.getvalue())


def write_config(folder, files, run_dir, **overrides):
    tasks = [{"name": f"task{i}", "source": str(f), "test_split": "train", "epochs": 30} for i, f in enumerate(files)]
    tasks[0]["probes"] = {"first": {"split": "train[:1]"}}
    content = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(run_dir), "name": "run"},
            },
            "callbacks": [{"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 2}}],
        },
        "model": {
            "model_name_or_path": str(folder),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        },
        "data": {"batch_size": 2, "tasks": tasks},
    }
    for path, value in overrides.items():
        *parents, last = path.split("__")
        node = content
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    file = run_dir / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
