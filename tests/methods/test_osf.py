"""OSF over several tasks: what is protected, what is kept at the boundary, the saved model, and resuming."""

from functools import partial

import pytest
import torch
from continual_cases import batch_of
from helpers import EPOCHS, assert_resumes, build, slow, trainer_for
from lightning.pytorch import Callback
from peft.tuners.osf import OSFLayer
from transformers import AutoModelForCausalLM

from agcl.callbacks import ContinualReport
from agcl.errors import AgclError
from agcl.methods import OSF

ADAPTER = {"peft_type": "OSF", "effective_rank": 1, "target_modules": "all-linear"}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def matrices(model):
    """Name -> weight as the forward pass has it, float64; derived from the layers' answers to unit vectors."""
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, OSFLayer):
            with torch.no_grad():
                result[name] = layer(torch.eye(layer.in_features)).T.double()
    return result


class Boundaries(Callback):
    """The matrices before the first and after the last step of each task."""

    def __init__(self):
        self.starts, self.ends, self.trained = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % (2 * EPOCHS) == 0:
            self.starts.append(matrices(pl_module.model))
            self.trained.append({id(p) for p in pl_module.parameters() if p.requires_grad})
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert held == self.trained[-1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % (2 * EPOCHS) == 0:
            self.ends.append(matrices(pl_module.model))


def run(folder, files, run_dir, optimizer=SGD, callbacks=(), **options):
    model, data = build(folder, files, adapter=ADAPTER, optimizer=optimizer)
    osf, boundaries = OSF(**options), Boundaries()
    trainer_for(data, run_dir, [osf, boundaries, *callbacks]).fit(model, datamodule=data)
    return model, data, osf, boundaries


def leak(start, end, rank):
    """Change of the large singular directions of a matrix, and of the whole matrix."""
    u, _, vh = torch.linalg.svd(start)
    change = end - start
    return torch.stack([(u[:, :rank].T @ change).norm(), (change @ vh[:rank].T).norm(), change.norm()])


def test_preserved_directions_stand_still_and_grow(llama_folder, task_files, tmp_path):
    _, _, _, boundaries = run(llama_folder, task_files, tmp_path, preserved=[0.25, 0.75])
    assert len(boundaries.starts) == len(boundaries.ends) == 3
    for task, share in enumerate([None, 0.25, 0.75]):
        for name, start in boundaries.starts[task].items():
            rank = 1 if share is None else int(share * min(start.shape))
            protected, _, whole = leak(start, boundaries.ends[task][name], rank)
            assert protected < 1e-5, (task, name)
            assert leak(start, boundaries.ends[task][name], rank)[1] < 1e-5, (task, name)
            assert whole > 1e-4, (task, name)
            assert leak(start, boundaries.ends[task][name], rank + 1)[0] > 10 * protected  # the next one is free


def test_boundaries_keep_what_was_learned(llama_folder, task_files, tmp_path):
    _, _, _, boundaries = run(llama_folder, task_files, tmp_path)
    for task in range(2):
        for name, end in boundaries.ends[task].items():
            torch.testing.assert_close(boundaries.starts[task + 1][name], end, rtol=0, atol=1e-5)


def test_adam_leaves_the_subspace(llama_folder, task_files, tmp_path):
    """Its step is not linear in the gradient that PEFT projects: the documented limit, so that nobody relies on it."""
    _, _, _, boundaries = run(llama_folder, task_files[:2], tmp_path, partial(torch.optim.AdamW, lr=0.01))
    leaks = torch.stack([leak(s, boundaries.ends[1][n], min(s.shape) // 2) for n, s in boundaries.starts[1].items()])
    assert leaks[:, 0].sum() > 0.01 * leaks[:, 2].sum()


def test_saved_model_is_the_merged_one(llama_folder, task_files, tmp_path):
    model, data, osf, boundaries = run(llama_folder, task_files, tmp_path, callbacks=[ContinualReport()])
    batch = batch_of(data)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(**inputs).logits, model.model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
    for name, end in boundaries.ends[2].items():  # saving left the model as it was
        torch.testing.assert_close(matrices(model.model)[name], end)
    # U, S, V and their copies; of a square matrix nothing more, else the large vectors of the longer side.
    assert 0 < osf.extra_bytes() < 6 * sum(4 * start.numel() for start in boundaries.starts[2].values())


@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 8), (1, 12), *slow((1, 5), (None, 9), (None, 15))])
def test_resumed_run_equals_the_straight_one(llama_folder, task_files, tmp_path, every_n_steps, crash_at):
    assert_resumes(llama_folder, task_files, tmp_path, OSF, crash_at, every_n_steps=every_n_steps, adapter=ADAPTER)


def test_unusable_settings_are_refused(llama_folder, task_files, tmp_path):
    with pytest.raises(AgclError, match=r"`preserved` has 1.0; choose shares"):
        OSF([0.5, 1.0])
    for adapter, options, message in (
        (None, {}, r"set `model.adapter` to \{peft_type: OSF"),
        (ADAPTER, {"preserved": [0.5]}, "`preserved` has 1 shares; give one for each of the 2 later tasks"),
    ):
        model, data = build(llama_folder, task_files, adapter=adapter)
        with pytest.raises(AgclError, match=message):
            trainer_for(data, tmp_path, [OSF(**options)]).fit(model, datamodule=data)
