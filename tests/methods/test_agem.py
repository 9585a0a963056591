"""A-GEM: the projection, where it takes place, and resuming."""

from functools import partial

import pytest
import torch
from helpers import assert_resumes, build, slow, trainer_for
from lightning.pytorch import Callback

from agcl.data.tasks import collate
from agcl.errors import AgclError
from agcl.gating import GradientGate
from agcl.methods import AGEM
from agcl.methods.agem import project
from agcl.scoring import answer_logits, token_nll

SGD = partial(torch.optim.SGD, lr=0.5, momentum=0.9)


def parts(vector):
    return [vector[:6].reshape(2, 3).clone(), vector[6:].clone()]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("seed", range(6))
def test_projection_over_the_whole_vector(seed):
    generator = torch.Generator().manual_seed(seed)
    g, r = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    gradients = parts(g)
    project(gradients, parts(r))
    if g @ r >= 0:
        assert torch.equal(flat(gradients), g)
    else:
        # The nearest vector that does not point against r: I - r r^T / |r|^2 applied to g.
        torch.testing.assert_close(flat(gradients), g - torch.outer(r, r) @ g / (r @ r))
        assert abs(flat(gradients) @ r) < 1e-12


def test_parts_that_agree_are_projected_by_the_whole():
    """Per tensor the first part would be left alone; over the whole vector it is not."""
    gradients = [torch.tensor([1.0]), torch.tensor([-3.0])]
    project(gradients, [torch.tensor([1.0]), torch.tensor([1.0])])
    assert flat(gradients).tolist() == [2.0, -2.0]


def test_a_reference_without_gradient_changes_nothing():
    gradients = [torch.tensor([1.0, -2.0])]
    project(gradients, [torch.zeros(2)])
    assert gradients[0].tolist() == [1.0, -2.0]


def gradients_of(model):
    return flat([parameter.grad for parameter in model.parameters()]).double()


class Before(Callback):
    """Placed before A-GEM: the gradients it finds."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(gradients_of(pl_module.model))


class After(Callback):
    """Placed after A-GEM: the gradients it leaves, and the memory's by an ordinary backward pass."""

    def __init__(self, agem):
        self.agem = agem
        self.gradients = []
        self.references = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        model = pl_module.model
        self.gradients.append(gradients_of(model))
        kept = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        if self.agem.memory:
            model.eval()
            logits, targets = answer_logits(model, collate(self.agem.memory, pl_module.tokenizer.pad_token_id))
            token_nll(logits, targets)[targets != -100].mean().backward()
            model.train()
        self.references.append(gradients_of(model) if self.agem.memory else None)
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_is_projected_once(gpt2_folder, task_files, tmp_path, accumulate):
    """With a memory of one batch, so that the reference gradient is known; GPT-2 has dropout."""
    model, data = build(gpt2_folder, task_files, task_options={"epochs": 12 * accumulate})
    agem = AGEM(rows_per_task=4, batch_size=8)
    before, after = Before(), After(agem)
    trainer = trainer_for(data, tmp_path, [before, agem, after], accumulate_grad_batches=accumulate)
    trainer.fit(model, datamodule=data)
    assert len(before.gradients) == trainer.global_step == 3 * 24
    projected = []
    for step, (g, r, result) in enumerate(zip(before.gradients, after.references, after.gradients, strict=True)):
        assert (r is None) == (step < 24)  # the first task has no memory
        if r is None or g @ r >= 0:
            assert torch.equal(result, g)
        else:
            torch.testing.assert_close(result, g - (g @ r / (r @ r)) * r, rtol=1e-4, atol=1e-6)
            projected.append(step)
    assert 0 < len(projected) < 2 * 24  # both cases are seen


def test_random_numbers_and_hooks_on_parameters_are_left_alone(gpt2_folder, task_files, tmp_path):
    model, data = build(gpt2_folder, task_files, optimizer=SGD)
    agem = AGEM()
    seen = {}

    class Around(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if agem.memory and not seen:
                weight = pl_module.model.transformer.wte.weight
                gate = GradientGate([("w", weight)], {"w": torch.full(weight.shape, 0.5)}).attach(optimizer)
                handle = weight.register_post_accumulate_grad_hook(lambda p: seen.update(accumulated=True))
                state, grad = torch.get_rng_state(), weight.grad.clone()
                agem._reference_gradient(trainer, pl_module, list(pl_module.model.parameters()))
                seen.update(random=torch.equal(torch.get_rng_state(), state), grad=torch.equal(weight.grad, grad))
                handle.remove()
                gate.detach()

    trainer_for(data, tmp_path, [agem, Around()]).fit(model, datamodule=data)
    assert seen == {"random": True, "grad": True}


def test_memory_holds_few_rows_of_old_tasks_alone(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    agem = AGEM(rows_per_task=3)
    trainer_for(data, tmp_path, [agem]).fit(model, datamodule=data)
    rows = [*data.kept_rows(0, 3), *data.kept_rows(1, 3)]
    assert agem.memory == rows
    assert agem.extra_bytes() == 8 * sum(2 * len(row["input_ids"]) for row in rows)


def test_step_does_not_raise_the_loss_on_the_memory(llama_folder, task_files, tmp_path):
    """With small SGD steps and a reference over the whole memory, the old tasks' loss cannot rise."""
    losses = []
    for callbacks in ([AGEM(rows_per_task=4, batch_size=8)], []):
        model, data = build(llama_folder, task_files[:2], optimizer=partial(torch.optim.SGD, lr=0.05))
        trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)
        losses.append(model.score_matrices["nll"].compute())
    with_memory, without = losses
    assert torch.equal(with_memory[1], without[1])
    assert with_memory[2, 0] <= with_memory[1, 0] + 1e-3
    assert with_memory[2, 0] <= without[2, 0]


@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 8), (1, 12), *slow((None, 9))])
def test_resumed_run_equals_the_straight_one(gpt2_folder, task_files, tmp_path, every_n_steps, crash_at):
    assert_resumes(gpt2_folder, task_files, tmp_path, lambda: AGEM(2, 2), crash_at, every_n_steps=every_n_steps)


def test_unusable_values_are_refused():
    with pytest.raises(AgclError, match="`rows_per_task` is 0"):
        AGEM(rows_per_task=0)
    with pytest.raises(AgclError, match="`batch_size` is 0"):
        AGEM(batch_size=0)
