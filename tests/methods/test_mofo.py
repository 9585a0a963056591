from functools import partial

import pytest
import torch
from helpers import build, trainer_for
from lightning.pytorch import Callback

from agcl.errors import AgclError
from agcl.methods import MoFO
from agcl.methods.mofo import largest


class Steps(Callback):
    """Gradients, and weights before and after each step."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_train_start(self, trainer, pl_module):
        self.weights.append(self._copies(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.gradients.append({n: p.grad.double() for n, p in pl_module.model.named_parameters()})
        self.weights.append(self._copies(pl_module))

    @staticmethod
    def _copies(pl_module):
        return {n: p.detach().double() for n, p in pl_module.model.named_parameters()}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_equals_filtered_adamw_written_out(llama_folder, task_files, tmp_path, share):
    lr, decay, (beta1, beta2), eps = 0.02, 0.1, (0.9, 0.999), 1e-8
    constant = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    model, data = build(llama_folder, task_files[:1], lr_scheduler=constant)
    steps = Steps()
    trainer_for(data, tmp_path, [MoFO(share), steps], gradient_clip_val=0.5).fit(model, datamodule=data)
    mean = {name: torch.zeros_like(w) for name, w in steps.weights[0].items()}
    square = {name: torch.zeros_like(w) for name, w in steps.weights[0].items()}
    for step, gradients in enumerate(steps.gradients, start=1):
        for name, gradient in gradients.items():
            old, new = steps.weights[step - 1][name], steps.weights[step][name]
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient**2
            full = old * (1 - lr * decay) - lr * (mean[name] / (1 - beta1**step)) / (
                (square[name] / (1 - beta2**step)).sqrt() + eps
            )
            size = mean[name].abs()
            count = max(1, round(share * size.numel()))
            kept = (size >= size.flatten().sort(descending=True).values[count - 1]) & (size > 0)
            still = new == old
            moves = size.flatten().sort().values
            gap = (moves[-count] - moves[-count - 1]) / moves[-count] if count < len(moves) else 1.0
            if gap > 1e-3:  # else float32 may pick another entry than float64
                assert torch.equal(still, ~kept | (full == old)), (step, name)
                assert torch.allclose(new, torch.where(kept, full, old), atol=1e-5), (step, name)
    embedding = "model.embed_tokens.weight"
    assert (steps.weights[-1][embedding] == steps.weights[0][embedding]).any()


def test_largest_takes_ties_and_leaves_zeros():
    assert largest(torch.tensor([[1.0, -5.0], [5.0, 2.0]]), 0.25).tolist() == [[False, True], [True, False]]
    assert largest(torch.tensor([0.0, 0.0, 1.0, 0.0]), 0.75).tolist() == [False, False, True, False]
    assert largest(torch.tensor([1.0, 2.0, 3.0]), 0.01).tolist() == [False, False, True]  # one at least
    assert largest(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), 1.0).all()


def test_share_of_one_changes_nothing_but_unused_rows(gpt2_folder, task_files, tmp_path):
    ends = []
    for callbacks in ([], [MoFO(1.0)]):
        model, data = build(gpt2_folder, task_files[:1], optimizer=partial(torch.optim.AdamW, lr=0.02, weight_decay=0))
        trainer_for(data, tmp_path, callbacks, accumulate_grad_batches=2).fit(model, datamodule=data)
        ends.append(dict(model.named_parameters()))
    assert all(torch.equal(parameter, ends[1][name]) for name, parameter in ends[0].items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.LBFGS])
def test_optimizers_without_momentum_are_refused_by_name(llama_folder, task_files, tmp_path, kind):
    model, data = build(llama_folder, task_files[:1], optimizer=partial(kind, lr=0.1))
    with pytest.raises(AgclError, match=f"`exp_avg`, which {kind.__name__} does not keep"):
        trainer_for(data, tmp_path, [MoFO()]).fit(model, datamodule=data)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, partial(torch.optim.AdamW, fused=True)])
def test_optimizers_of_adams_kind_work(llama_folder, task_files, tmp_path, kind):
    model, data = build(llama_folder, task_files[:1], optimizer=partial(kind, lr=0.1))
    callback = MoFO()
    trainer = trainer_for(data, tmp_path, [callback])
    trainer.fit(model, datamodule=data)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks  # nothing is left behind
    assert callback.extra_bytes() == 0


def test_bad_share_is_refused():
    with pytest.raises(AgclError, match="`share` is 0"):
        MoFO(share=0)
