"""MIGU: which outputs are updated, on plain tensors and in a run."""

from functools import partial

import pytest
import torch
from helpers import EPOCHS, assert_resumes, build, trainer_for
from lightning.pytorch import Callback
from torch import nn
from transformers.pytorch_utils import Conv1D

from agcl.errors import AgclError
from agcl.methods import MIGU
from agcl.methods.migu import along_outputs, largest


def test_the_largest_outputs_are_updated():
    assert largest(torch.tensor([3.0, 1.0, 2.0, 9.0, 0.5]), 0.5).tolist() == [True, False, True, True, False]
    assert largest(torch.ones(4), 0.0).all()


def test_outputs_are_rows_of_linear_and_columns_of_conv1d():
    mask = torch.tensor([True, False, True])
    linear, conv = nn.Linear(2, 3), Conv1D(3, 2)
    assert (linear.weight * along_outputs(mask, linear.weight, linear)).ne(0).all(1).tolist() == mask.tolist()
    assert (conv.weight * along_outputs(mask, conv.weight, conv)).ne(0).all(0).tolist() == mask.tolist()
    assert along_outputs(mask, conv.bias, conv) is mask


class Independent(Callback):
    """Placed after MIGU: sums the outputs over tokens itself, and notes which rows have gradients left."""

    def __init__(self, path):
        self.path = path
        self.sums = torch.zeros(0)
        self.cases = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layer = pl_module.model.get_submodule(self.path)
        tokens = batch["attention_mask"].bool()
        outputs = []
        self.handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        self.outputs, self.tokens = outputs, tokens

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.handle.remove()
        mean = self.outputs[0][self.tokens].abs().mean(0)
        share = mean / mean.sum()
        gradient = pl_module.model.get_submodule(self.path).weight.grad
        rows = gradient if isinstance(pl_module.model.get_submodule(self.path), nn.Linear) else gradient.T
        self.cases.append((share, rows.ne(0).any(1)))


@pytest.mark.parametrize(
    ("family", "path"), [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
def test_gradients_of_small_outputs_are_zero_from_the_second_task_on(
    family, path, llama_folder, gpt2_folder, task_files, tmp_path
):
    folder = {"llama": llama_folder, "gpt2": gpt2_folder}[family]
    model, data = build(folder, task_files[:2], optimizer=partial(torch.optim.SGD, lr=0.1))
    watch = Independent(path)
    trainer_for(data, tmp_path, [MIGU(0.7), watch]).fit(model, datamodule=data)
    assert len(watch.cases) == 4 * EPOCHS
    for step, (share, updated) in enumerate(watch.cases):
        if step < 2 * EPOCHS:
            assert updated.all()
        else:
            assert (~updated).sum() == int(0.7 * len(updated))
            assert share[updated].min() >= share[~updated].max()
    assert not any(module._forward_hooks for module in model.modules())


def test_masked_outputs_stand_still_under_sgd(llama_folder, task_files, tmp_path):
    """The tied vocabulary projection and the norms are free, the rest moves in a few rows only."""
    model, data = build(llama_folder, task_files[:2], optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=4)
    starts = {}

    class Start(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2 * EPOCHS - 1:  # one step an epoch: the last of task 2
                starts.update({n: p.detach().clone() for n, p in pl_module.model.named_parameters()})

    trainer_for(data, tmp_path, [MIGU(0.5), Start()]).fit(model, datamodule=data)
    for name, parameter in model.model.named_parameters():
        moved = parameter.ne(starts[name]).reshape(len(parameter), -1).any(1).float().mean()
        assert moved <= 0.5 if "proj" in name else moved > 0.5 or "embed" in name, name


def test_masking_nothing_is_plain_fine_tuning(llama_folder, task_files, tmp_path):
    losses = []
    for callbacks in ([MIGU(0.0)], []):
        model, data = build(llama_folder, task_files)
        trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)
        losses.append(model.score_matrices["nll"].compute())
    assert torch.equal(*losses)


def test_resumed_run_equals_the_straight_one(gpt2_folder, task_files, tmp_path):
    assert_resumes(gpt2_folder, task_files, tmp_path, MIGU, crash_at=8)


def test_unusable_share_is_refused():
    with pytest.raises(AgclError, match="`masked` is 1"):
        MIGU(1.0)
