from functools import partial

import pytest
import torch
from helpers import EPOCHS, build, trainer_for, weights
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from agcl.attribution.estimators import MAS, EmpiricalFisher, Fisher
from agcl.errors import AgclError
from agcl.methods import EWC

SGD = partial(torch.optim.SGD, lr=0.5)


class AtBoundary(Callback):
    """The weights that a task ends with."""

    def __init__(self, after_epoch=EPOCHS):
        self.epoch = after_epoch - 1

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.weights = weights(pl_module.model)


def gradients(model, row, drawn_by=None):
    """Of one row's log-probability of its answer, or of labels drawn from the model."""
    labels = torch.tensor(row["labels"])
    answer = (labels != -100).nonzero().flatten()
    log_probabilities = model(torch.tensor([row["input_ids"]])).logits[0, answer - 1].log_softmax(-1)
    targets = labels[answer]
    if drawn_by is not None:
        targets = torch.multinomial(log_probabilities.detach().exp(), 1, generator=drawn_by).flatten()
    model.zero_grad()
    log_probabilities.gather(1, targets[:, None]).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("estimator", [Fisher(), EmpiricalFisher()])
def test_fisher_is_the_mean_square_over_all_rows(llama_folder, task_files, tmp_path, estimator):
    """No row is known by heart by this model: all count nevertheless."""
    boundary, callback = AtBoundary(), EWC(strength=0.0, estimator=estimator)
    model, data = build(llama_folder, task_files[:2])
    trainer_for(data, tmp_path, [boundary, callback]).fit(model, datamodule=data)
    assert callback.num_boundaries == 1

    model.model.load_state_dict(boundary.weights, strict=False)
    model.model.eval()
    rows = data.training_rows(0)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    draws = generator if isinstance(estimator, Fisher) else None
    found = [gradients(model.model, rows[row], draws) for row in order]
    for name, fisher in callback.penalty.precision.items():
        assert torch.allclose(fisher, torch.stack([g[name] ** 2 for g in found]).mean(0), rtol=1e-3, atol=1e-9), name
        assert torch.equal(callback.penalty.anchor[name], boundary.weights[name])
    assert callback.extra_bytes() == 8 * sum(parameter.numel() for parameter in model.model.parameters())


class Gradients(Callback):
    """Gradients before each optimizer step, as left by the callbacks before this one."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in pl_module.model.named_parameters()})


class WeightsAfterEachBatch(Callback):
    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(weights(pl_module.model))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen.append(weights(pl_module.model))


def test_gradient_is_added_once_per_step_before_clipping(llama_folder, task_files, tmp_path):
    strength, clip, lr = 1e3, 0.05, 0.5
    before, after, stepped = Gradients(), Gradients(), WeightsAfterEachBatch()
    callback = EWC(strength)
    model, data = build(llama_folder, task_files[:2], optimizer=SGD)
    # The whole schedule at one learning rate, so that steps can be told from gradients.
    model.lr_scheduler = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    trainer = trainer_for(
        data, tmp_path, [before, callback, after, stepped], accumulate_grad_batches=2, gradient_clip_val=clip
    )
    trainer.fit(model, datamodule=data)
    assert len(before.seen) == len(after.seen) == trainer.global_step == 2 * EPOCHS
    for step, (old, new) in enumerate(zip(before.seen, after.seen, strict=True)):
        now, then = stepped.seen[step], stepped.seen[step + 1]
        norm = torch.cat([gradient.flatten() for gradient in new.values()]).norm().item()
        for name, gradient in new.items():
            drawn = strength * callback.penalty.precision[name] * (now[name] - callback.penalty.anchor[name])
            expected = old[name] + (drawn if step >= EPOCHS else 0.0)
            assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7), (step, name)
            assert torch.allclose(then[name] - now[name], -lr * min(1, clip / norm) * gradient, atol=1e-6), name
    assert any(not torch.equal(gradient, after.seen[-1][name]) for name, gradient in before.seen[-1].items())


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_later_tasks_stay_near(llama_folder, task_files, tmp_path, mode):
    distances, penalties = [], []
    for strength in (0.0, 1e4):
        first, last = AtBoundary(), AtBoundary(2 * EPOCHS)
        model, data = build(llama_folder, task_files[:2])
        trainer = trainer_for(data, tmp_path, [first, last, EWC(strength, mode=mode, num_samples=2)])
        trainer.fit(model, datamodule=data)
        distances.append(sum((last.weights[n] - w).square().sum().item() for n, w in first.weights.items()))
        penalties.append(trainer.callback_metrics["ewc/penalty"].item())
    assert distances[1] < 0.9 * distances[0]
    assert penalties[0] == 0.0 < penalties[1]


def test_other_estimators_and_chosen_parameters(llama_folder, task_files, tmp_path):
    callback = EWC(1.0, estimator=MAS(), parameters=r"mlp")
    model, data = build(llama_folder, task_files[:2])
    trainer_for(data, tmp_path, [callback]).fit(model, datamodule=data)
    assert callback.penalty.precision
    assert all("mlp" in name for name in callback.penalty.precision)


BAD = [
    ({"strength": -1.0}, r"`strength` is -1\.0"),
    ({"strength": 1.0, "mode": "both"}, "`mode` is 'both'"),
    ({"strength": 1.0, "decay": 1.5}, r"`decay` is 1\.5"),
    ({"strength": 1.0, "num_samples": 0}, "`num_samples` is 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        EWC(**options)


def test_refusals_before_training(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files[:2])
    with pytest.raises(AgclError, match="`parameters` 'nothing' matches no trainable parameter"):
        trainer_for(data, tmp_path, [EWC(1.0, parameters="nothing")]).fit(model, datamodule=data)
    with pytest.raises(AgclError, match="`parameters` is not a regular expression"):
        trainer_for(data, tmp_path, [EWC(1.0, parameters="(")]).fit(model, datamodule=data)
    model, data = build(llama_folder, task_files[:2], optimizer=partial(torch.optim.AdamW, fused=True))
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(AgclError, match="Under 16-mixed precision a fused optimizer"):
        trainer_for(data, tmp_path, [EWC(1.0)], plugins=[scaler]).fit(model, datamodule=data)
