"""Learning without forgetting: the loss, the teacher, and resuming."""

import pytest
import torch
from continual_cases import batch_of
from helpers import assert_resumes, build, slow, trainer_for, weights
from lightning.pytorch import Callback

from agcl.errors import AgclError
from agcl.methods import LwF
from agcl.methods.lwf import distillation_loss, teacher_logits
from agcl.scoring import answer_logits


def test_loss_is_the_softened_kl_divergence_over_answer_tokens():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[-100, 1, 2], [0, -100, -100]])
    terms = []
    for row, column in ((0, 1), (0, 2), (1, 0)):
        p = torch.softmax(teacher[row, column] / 3, -1)
        terms.append((p * (p.log() - torch.softmax(student[row, column] / 3, -1).log())).sum())
    expected = 9 * torch.stack(terms).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, targets, 3.0), expected)


def test_gradient_at_high_temperature_is_the_difference_of_centred_logits():
    """As T grows, T ** 2 * KL has the gradient (z - v) / N for logits of mean zero (Hinton et al., 2015)."""
    student = torch.tensor([[[1.0, -1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.0, 2.0, -2.0]]], dtype=torch.float64)
    distillation_loss(student, teacher, torch.tensor([[0]]), 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 3, rtol=1e-3, atol=1e-4)


def test_teacher_is_the_old_model_and_teaches_itself_nothing(gpt2_folder, task_files):
    """GPT-2 has dropout and tied embeddings; the teacher must answer without the one and with the other."""
    model, data = build(gpt2_folder, task_files)
    model.configure_model()
    batch = batch_of(data)
    old = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    model.model.eval()
    before, targets = answer_logits(model.model, batch)
    model.model.train()
    model.model.transformer.h[0].eval()  # modes are put back one by one
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(teacher_logits(model.model, old, batch), before)
    assert model.model.training
    assert model.model.transformer.h[1].attn.training
    assert not model.model.transformer.h[0].attn.training
    assert distillation_loss(before, before, targets, 2.0) == 0


class Losses(Callback):
    def __init__(self):
        self.terms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.terms.append(trainer.callback_metrics[f"train/task{pl_module.task_index}/distillation"].item())


def test_each_task_after_the_first_is_held_to_where_it_started(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    lwf, losses = LwF(), Losses()
    trainer_for(data, tmp_path, [lwf, losses]).fit(model, datamodule=data)
    assert losses.terms[:6] == [0.0] * 6  # task 1 has no teacher
    for start in (6, 12):
        assert losses.terms[start] == pytest.approx(0, abs=1e-6)  # the teacher is the model as the task begins
        assert losses.terms[start + 1] > 1e-4
    assert lwf.extra_bytes() == sum(p.nbytes for p in model.parameters())
    assert model.loss_terms == {}


def test_strong_distillation_holds_the_model_where_it_was(llama_folder, task_files, tmp_path):
    losses = []
    for strength in (0.0, 100.0):
        model, data = build(llama_folder, task_files[:2])
        trainer_for(data, tmp_path, [LwF(strength)]).fit(model, datamodule=data)
        losses.append(model.score_matrices["nll"].compute())
    assert torch.equal(losses[0][1], losses[1][1])  # nothing to distil during the first task
    assert losses[1][2, 1] - losses[1][1, 1] > losses[0][2, 1] - losses[0][1, 1]  # less is learned of the second
    model, data = build(llama_folder, task_files[:2])
    trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert torch.equal(model.score_matrices["nll"].compute(), losses[0])  # strength 0 is plain fine-tuning


def test_with_an_adapter_the_teacher_is_the_adapters_copy(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, adapter={"peft_type": "LORA", "r": 2, "target_modules": "all-linear"})
    lwf = LwF()
    trainer_for(data, tmp_path, [lwf]).fit(model, datamodule=data)
    assert lwf.teacher.keys() == {name.removeprefix("model.") for name in weights(model) if "lora" in name}


# A checkpoint inside of task 2, of its last step, and of task 1's last step.
@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 8), (1, 12), *slow((1, 6), (None, 9))])
def test_resumed_run_equals_the_straight_one(gpt2_folder, task_files, tmp_path, every_n_steps, crash_at):
    assert_resumes(gpt2_folder, task_files, tmp_path, LwF, crash_at, every_n_steps=every_n_steps)


def test_unusable_values_are_refused():
    with pytest.raises(AgclError, match="`strength` is -1"):
        LwF(strength=-1)
    with pytest.raises(AgclError, match="`temperature` is 0"):
        LwF(temperature=0)
