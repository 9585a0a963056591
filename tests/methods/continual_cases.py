"""What the methods' tests share: a batch, and a run that is killed and gone on with."""

import pytest
import torch
from helpers import EPOCHS, CrashAt, CrashError, build, trainer_for, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM

from agcl.data.tasks import collate


def batch_of(data, task_index=0):
    data.setup()
    return collate(list(data.training_rows(task_index)), pad_token_id=data.tokenizer.pad_token_id)


def assert_saved(model, data, folder, base_folder):
    """Plain PEFT loads the adapter in the folder, which computes what the model does, and not what its base did."""
    batch = batch_of(data)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    before = base(**inputs).logits
    loaded = PeftModel.from_pretrained(base, folder).eval()
    ours = model.model.eval()(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)


def assert_validates(folder, files, run_dir, method, **options):
    """A checkpoint of a finished run, loaded into a new ContinualLM, scores what the run did."""
    model, data = build(folder, files, **options)
    trainer = trainer_for(data, run_dir, [method()])
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(run_dir / "end.ckpt")
    wanted = trainer.callback_metrics["eval/task0/nll"]
    model, data = build(folder, files, **options)
    trainer = trainer_for(data, run_dir, [method()])
    trainer.validate(model, datamodule=data, ckpt_path=run_dir / "end.ckpt", weights_only=True, verbose=False)
    assert trainer.callback_metrics["eval/task0/nll"] == wanted


def assert_resumes(folder, files, run_dir, method, every_n_steps, crash_at, trainer_options=None, **options):
    """A run killed at step `crash_at` and resumed from its newest checkpoint ends like one that was not."""
    trainer_options = trainer_options or {}
    straight, data = build(folder, files, **options)
    straight_method = method()
    trainer_for(data, run_dir / "straight", [straight_method], **trainer_options).fit(straight, datamodule=data)

    model, data = build(folder, files, **options)
    when = {"every_n_train_steps": every_n_steps} if every_n_steps else {"every_n_epochs": 1}
    saving = ModelCheckpoint(run_dir / "checkpoints", save_top_k=-1, filename="{step}", **when)
    with pytest.raises(CrashError):
        trainer_for(
            data, run_dir, [method(), CrashAt(crash_at), saving], enable_checkpointing=True, **trainer_options
        ).fit(model, datamodule=data)
    newest = max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))

    model, data = build(folder, files, **options)
    resumed_method = method()
    trainer = trainer_for(data, run_dir / "resumed", [resumed_method], **trainer_options)
    trainer.fit(model, datamodule=data, ckpt_path=newest)
    assert trainer.global_step == 6 * EPOCHS
    resumed = weights(model)
    assert resumed.keys() == weights(straight).keys()
    for name, parameter in weights(straight).items():
        assert torch.equal(parameter, resumed[name]), name
    for name, matrix in straight.score_matrices.items():
        assert torch.equal(matrix.compute(), model.score_matrices[name].compute()), name
    assert straight_method.extra_bytes() == resumed_method.extra_bytes()
