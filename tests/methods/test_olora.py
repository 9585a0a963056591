"""O-LoRA: the penalty, what is frozen when, the saved adapter, and resuming."""

import pytest
import torch
from continual_cases import assert_saved, assert_validates
from helpers import EPOCHS, assert_resumes, build, slow, trainer_for
from lightning.pytorch import Callback

from agcl.callbacks import ContinualReport
from agcl.errors import AgclError
from agcl.methods import OLoRA
from agcl.methods.olora import orthogonality

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": "all-linear"}


def test_penalty_is_the_sum_of_all_inner_products():
    generator = torch.Generator().manual_seed(0)
    new, first, second, other_new, other = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64)
    expected = sum(
        abs(sum(left[row, k] * right[column, k] for k in range(6)))
        for left, right in ((first, new), (second, new), (other, other_new))
        for row in range(2)
        for column in range(2)
    )
    torch.testing.assert_close(orthogonality([(new, [first, second]), (other_new, [other])]), expected)


def test_penalty_of_orthogonal_rows_is_zero_and_its_gradient_leads_there():
    basis = torch.eye(4, dtype=torch.float64)
    assert orthogonality([(basis[:2], [basis[2:]])]) == 0
    new = torch.tensor([[1.0, 0.0, 0.25, 0.0]], requires_grad=True)
    orthogonality([(new, [torch.eye(4)[2:3]])]).backward()
    assert new.grad.tolist() == [[0.0, 0.0, 1.0, 0.0]]  # only what lies along the old row is pushed


class PerTask(Callback):
    """Copies of all adapters when each task begins, and which of them learn."""

    def __init__(self):
        self.copies, self.learning = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % (2 * EPOCHS) == 0:
            named = {n: p for n, p in pl_module.model.named_parameters() if "lora_" in n}
            self.copies.append({n: p.detach().clone() for n, p in named.items()})
            self.learning.append({n.split(".")[-2] for n, p in named.items() if p.requires_grad})


def test_old_pairs_are_frozen_bit_for_bit_and_future_ones_untouched(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, adapter=LORA)  # AdamW with weight decay
    olora, copies = OLoRA(), PerTask()
    trainer_for(data, tmp_path, [olora, copies]).fit(model, datamodule=data)
    assert copies.learning == [{"task0"}, {"task1"}, {"task2"}]
    end = {n: p.detach() for n, p in model.model.named_parameters() if "lora_" in n}
    copies.copies.append(end)
    assert {n.split(".")[-2] for n in end} == {"task0", "task1", "task2"}
    for name in end:
        task = int(name.split(".")[-2][-1])
        for begun in range(3):
            moved = not torch.equal(copies.copies[begun][name], copies.copies[begun + 1][name])
            assert moved == (begun == task), (name, begun)
    pair = sum(p.nbytes for n, p in end.items() if ".task0." in n)
    assert olora.extra_bytes() == 2 * pair
    assert model.loss_terms == {}


def alignment(model):
    """Sum of |A_i A_t^T| over all modules and pairs of tasks."""
    downs = {n: p.detach() for n, p in model.model.named_parameters() if "lora_A" in n}
    return sum(
        (downs[name] @ downs[name.replace(f".task{late}.", f".task{early}.")].T).abs().sum().item()
        for late in (1, 2)
        for early in range(late)
        for name in downs
        if f".task{late}." in name
    )


def test_strength_makes_the_new_pairs_orthogonal(llama_folder, task_files, tmp_path):
    values = []
    for strength in (0.0, 0.5):
        model, data = build(llama_folder, task_files, adapter=LORA)
        trainer_for(data, tmp_path, [OLoRA(strength)]).fit(model, datamodule=data)
        values.append(alignment(model))
    assert values[1] < 0.7 * values[0]


def test_saved_adapter_is_loaded_by_plain_peft(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, adapter=LORA)
    trainer_for(data, tmp_path, [OLoRA(), ContinualReport()]).fit(model, datamodule=data)
    learned = {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert all(".task2." in name for name in learned)  # saving left the model as it was
    assert model.model.active_adapters == ["task0", "task1", "task2"]
    assert_saved(model, data, tmp_path / "model", llama_folder)


@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 8), (1, 12), *slow((None, 9))])
def test_resumed_run_equals_the_straight_one(llama_folder, task_files, tmp_path, every_n_steps, crash_at):
    adapter = {**LORA, "lora_dropout": 0.2}
    assert_resumes(llama_folder, task_files, tmp_path, OLoRA, crash_at, every_n_steps=every_n_steps, adapter=adapter)


def test_checkpoint_is_validated_with_all_pairs(llama_folder, task_files, tmp_path):
    assert_validates(llama_folder, task_files, tmp_path, OLoRA, adapter=LORA)


def test_model_without_a_lora_adapter_is_refused(llama_folder, task_files, tmp_path):
    for adapter in (None, {"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}):
        model, data = build(llama_folder, task_files, adapter=adapter)
        with pytest.raises(AgclError, match=r"set `model.adapter` to \{peft_type: LORA"):
            trainer_for(data, tmp_path, [OLoRA()]).fit(model, datamodule=data)
    with pytest.raises(AgclError, match="`strength` is -1"):
        OLoRA(-1)
