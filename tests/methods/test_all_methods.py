"""Each method survives a crash: the resumed run ends bit for bit like the straight one. Each runs in bfloat16."""

import pytest
import torch
from helpers import EPOCHS, CrashAt, CrashError, build, slow, trainer_for, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl.methods import EWC, HFT, LayerFreezing, MoFO, SingleTask

METHODS = {
    "ewc": lambda: EWC(1e4, num_samples=2),
    "ewc-online": lambda: EWC(1e4, mode="online", num_samples=2),
    "layer-freezing": lambda: LayerFreezing(1),
    "hft": HFT,
    "mofo": lambda: MoFO(0.2),
    "single-task": SingleTask,
}


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return one == two


@pytest.mark.parametrize("name", METHODS)
def test_methods_run_in_low_precision(gpt2_folder, task_files, tmp_path, name):
    model, data = build(gpt2_folder, task_files[:2])
    trainer_for(data, tmp_path, [METHODS[name]()], precision="bf16-true", gradient_clip_val=1.0).fit(
        model, datamodule=data
    )
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module", params=METHODS)
def straight(request, gpt2_folder, task_files, tmp_path_factory):
    """GPT-2 has dropout, so that random numbers must be resumed too."""
    model, data = build(gpt2_folder, task_files)
    callback = METHODS[request.param]()
    trainer_for(data, tmp_path_factory.mktemp("straight"), [callback]).fit(model, datamodule=data)
    return request.param, weights(model), callback.state_dict(), scores(model)


def scores(model):
    return {name: matrix.compute().nan_to_num() for name, matrix in model.score_matrices.items()}


# Task 1 takes steps 6 to 11. The checkpoint of step 8 is one inside of it, of step 9 one inside of an epoch; that of
# step 12 is one of an epoch's last batch, taken before the task boundary.
@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 9), (1, 12), *slow((None, 9))])
def test_resumed_run_equals_the_straight_one(gpt2_folder, task_files, tmp_path, straight, every_n_steps, crash_at):
    name, expected, state, matrices = straight
    interval = {"every_n_train_steps": every_n_steps} if every_n_steps else {"every_n_epochs": 1}
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{step}", **interval)
    model, data = build(gpt2_folder, task_files)
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, [METHODS[name](), CrashAt(crash_at), checkpoints], enable_checkpointing=True).fit(
            model, datamodule=data
        )
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))

    model, data = build(gpt2_folder, task_files)
    callback = METHODS[name]()
    trainer = trainer_for(data, tmp_path / "resumed", [callback])
    trainer.fit(model, datamodule=data, ckpt_path=newest)
    assert trainer.global_step == 6 * EPOCHS
    for parameter, values in weights(model).items():
        assert torch.equal(values, expected[parameter]), parameter
    assert equal(callback.state_dict(), state)
    assert equal(scores(model), matrices)
