"""Each way to train, with each gate: the step of the second task is scaled once, entry by entry."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import build, slow, trainer_for, weights
from lightning.pytorch import Callback

from agcl.attribution import ImportanceConfig
from agcl.attribution.estimators import Estimator
from agcl.callbacks import AttributionCallback
from agcl.errors import AgclError
from agcl.methods import MIGU, OSF

CLIP = 1e-3  # below the norm of every gradient here


class Thirds(Estimator):
    """Importance 0, 0.6 and 1 in turn, whatever the model."""

    uses_samples = False

    def scores(self, evidence):
        pattern = {name: torch.arange(p.numel()).view(p.shape) % 3 for name, p in evidence.selected().items()}
        return {name: torch.tensor([0.0, 0.6, 1.0])[third] for name, third in pattern.items()}


class SecondTask(Callback):
    """Keeps the weights before the second task."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.start = weights(pl_module.model)


# Name: options of the Trainer, of the model, of the optimizer; rows of a batch.
CASES = {
    "plain": ({}, {}, {}, 4),
    "accumulation": ({"accumulate_grad_batches": 2}, {}, {}, 2),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, {}, 4),
    "bf16-true": ({"precision": "bf16-true"}, {}, {}, 4),
    "clipping": ({"gradient_clip_val": CLIP}, {}, {}, 4),
    "checkpointing": ({}, {"gradient_checkpointing": True}, {}, 4),
    "fused": ({}, {}, {"fused": True}, 4),
    "foreach": ({}, {}, {"foreach": True}, 4),
    "compiled": ({}, {"compiled": True}, {}, 4),
    "inductor": ({}, {"compiled": True}, {}, 4),
    "all together": (
        {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": CLIP},
        {"gradient_checkpointing": True},
        {"foreach": True},
        2,
    ),
}


def second_step(folder, files, run_dir, gate, case, strength):
    """Weights before and after the only step of the second task."""
    trainer_options, model_options, optimizer_options, batch_size = CASES[case]
    optimizer = torch.optim.SGD if gate == "gradient" else torch.optim.AdamW
    lr = {"gradient": 5.0 if "gradient_clip_val" not in trainer_options else 500.0, "update": 0.05}[gate]
    model, data = build(
        folder,
        files[:2],
        optimizer=partial(optimizer, lr=lr, **optimizer_options),
        batch_size=batch_size,
        task_options={"epochs": 1},
        **model_options,
    )
    callback = AttributionCallback(
        gate=gate, estimator=Thirds(), importance=ImportanceConfig(normalisation="none"), strength=strength
    )
    start, graphs = SecondTask(), []
    trainer = trainer_for(data, run_dir, [callback, start], **trainer_options)

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    is_counted = case != "inductor"
    with torch.compiler.set_stance("default", force_backend=count) if is_counted else nullcontext():
        trainer.fit(model, datamodule=data)
    torch.compiler.reset()
    assert bool(graphs) == (case == "compiled")  # which is then no silent way back to eager
    assert trainer.global_step == 2
    return start.start, weights(model.model), callback.importance


DEFAULT = ("bf16-true", "fused", "all together")


@pytest.mark.parametrize("gate", ["gradient", "update"])
@pytest.mark.parametrize("case", [*DEFAULT, *slow(*(case for case in CASES if case not in DEFAULT))])
def test_the_second_tasks_step_is_scaled_once(llama_folder, task_files, tmp_path, gate, case):
    old, free, _ = second_step(llama_folder, task_files, tmp_path / "free", gate, case, 0)
    start, gated, importance = second_step(llama_folder, task_files, tmp_path / "gated", gate, case, 1)
    plasticity = {name: 1 - levels.double() / 255 for name, levels in importance.items()}
    free_step = {name: (free[name] - old[name]).double() for name in free}
    expected = {name: plasticity[name] * step for name, step in free_step.items()}
    if gate == "gradient" and "gradient_clip_val" in CASES[case][0]:  # which sees the gated gradient
        norms = [sum(step.square().sum() for step in steps.values()).sqrt() for steps in (free_step, expected)]
        expected = {name: step * norms[0] / norms[1] for name, step in expected.items()}
    moved = 0
    for name, before in start.items():
        assert torch.equal(before, old[name])
        is_frozen = importance[name] == 255
        assert torch.equal(gated[name][is_frozen], before[is_frozen]), name
        rounding = torch.finfo(before.dtype).eps * (before.abs() + free_step[name].abs()).double()
        noise = 2**-7 if "bf16-mixed" in str(CASES[case][0]) or before.dtype == torch.bfloat16 else 1e-4
        error = (gated[name].double() - before.double() - expected[name]).abs()
        assert (error <= 2 * rounding + noise * expected[name].abs()).all(), (name, error.max())
        moved += int((expected[name].abs() > 4 * rounding).sum())
    assert moved > 500  # what is compared is no rounding noise


def test_a_compiled_model_learns_what_it_does_otherwise(llama_folder, task_files, tmp_path):
    found = [
        second_step(llama_folder, task_files, tmp_path / case, "update", case, 1) for case in ("plain", "compiled")
    ]
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected)
    for name, levels in found[0][2].items():
        assert torch.equal(found[1][2][name], levels), name


@pytest.mark.parametrize("method", [MIGU(), OSF()])
def test_methods_that_a_compiled_pass_would_leave_out_are_refused(llama_folder, task_files, tmp_path, method):
    model, data = build(llama_folder, task_files[:2], compiled=True)
    with pytest.raises(AgclError, match="not `compiled`"):
        trainer_for(data, tmp_path, [method]).fit(model, datamodule=data)
