from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import EPOCHS, CrashAt, CrashError, WeightsAtBoundaries, attribution, build, trainer_for
from lightning.pytorch import Callback

from agcl.attribution import ImportanceConfig, parameter_relevance
from agcl.attribution.artefact import load_importance
from agcl.attribution.estimators import LRP, SPG, Change, Fisher, Magnitude, Wanda
from agcl.callbacks import AttributionCallback
from agcl.errors import AgclError

SGD = partial(torch.optim.SGD, lr=0.5)


def fit(folder, files, run_dir, *callbacks, optimizer=None, **trainer_options):
    model, data = build(folder, files, optimizer=optimizer)
    boundaries = WeightsAtBoundaries()
    trainer = trainer_for(data, run_dir, [boundaries, *callbacks], **trainer_options)
    trainer.fit(model, datamodule=data)
    return model, data, boundaries.weights


class Asked(Magnitude):
    """Keeps what it was asked for."""

    def __init__(self):
        self._num_samples = []

    def scores(self, evidence):
        self._num_samples.append(evidence.num_samples)
        return super().scores(evidence)


def test_no_more_samples_are_planned_than_the_task_has(llama_folder, task_files, tmp_path):
    estimator = Asked()
    fit(llama_folder, task_files[:1], tmp_path, attribution(num_samples=100, estimator=estimator))
    assert estimator._num_samples == [4]


@pytest.mark.parametrize("score", ["relevance", "sensitivity"])
def test_importance_is_the_tasks_mean_score(llama_folder, task_files, tmp_path, knowing, score):
    callback = attribution(num_samples=4, estimator=LRP(score=score), importance=ImportanceConfig(quantile=0.5))
    model, data, _ = fit(llama_folder, task_files[:1], tmp_path, callback)
    weights_now = dict(model.model.named_parameters())
    expected = {}
    for row in data.training_rows(0):
        answer = [p for p, label in enumerate(row["labels"]) if label != -100]
        relevance = parameter_relevance(
            model.model,
            torch.tensor([row["input_ids"]]),
            positions=torch.tensor(answer) - 1,
            targets=torch.tensor([row["labels"][p] for p in answer]),
        )
        for name, values in relevance.items():
            value = values.abs() if score == "relevance" else (values / weights_now[name].detach()).square()
            expected[name] = expected.get(name, 0) + value / 4
    importance, metadata = load_importance(tmp_path / "importance" / "00_task0.safetensors")
    assert metadata["task"] == "task0"
    assert metadata["num_samples"] == "4"
    assert importance.keys() == expected.keys()
    for name, values in expected.items():
        used = values[values > 0].sort().values
        q = used[(len(used) + 1) // 2 - 1]
        assert torch.allclose(importance[name] / 255, values / (values + q), atol=1 / 400), name


def test_running_maximum_over_the_tasks(llama_folder, task_files, tmp_path, knowing):
    callback = attribution()
    fit(llama_folder, task_files, tmp_path, callback)
    files = [load_importance(tmp_path / "importance" / f"0{i}_task{i}.safetensors")[0] for i in range(3)]
    for name, levels in callback.importance.items():
        assert torch.equal(levels, torch.stack([file[name] for file in files]).amax(0))


def test_first_task_is_learned_as_without_the_callback(llama_folder, task_files, tmp_path, knowing):
    _, _, plain = fit(llama_folder, task_files, tmp_path / "plain")
    _, _, gated = fit(llama_folder, task_files, tmp_path / "gated", attribution())
    for name, parameter in plain[0].items():
        assert torch.equal(parameter, gated[0][name])
    assert any(not torch.equal(parameter, gated[1][name]) for name, parameter in plain[1].items())


@pytest.mark.parametrize("gate", ["gradient", "update"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_strength_zero_changes_nothing(llama_folder, task_files, tmp_path, knowing, gate, options):
    _, _, plain = fit(llama_folder, task_files, tmp_path / "plain", optimizer=SGD, **options)
    callback = attribution(gate=gate, strength=0.0)
    _, _, gated = fit(llama_folder, task_files, tmp_path / "gated", callback, optimizer=SGD, **options)
    for before, after in zip(plain, gated, strict=True):
        assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)])
def test_gate_slows_each_later_task(llama_folder, task_files, tmp_path, knowing, optimizer):
    def moved(boundaries):
        return sum((boundaries[1][n] - boundaries[0][n]).abs().sum().item() for n in boundaries[0])

    _, _, plain = fit(llama_folder, task_files, tmp_path / "plain", optimizer=optimizer)
    callback = attribution(strength=2.0)
    _, _, gated = fit(llama_folder, task_files, tmp_path / "gated", callback, optimizer=optimizer)
    assert moved(gated) < 0.7 * moved(plain)


def test_auto_protects_under_adam_and_gradient_warns(llama_folder, task_files, tmp_path, knowing):
    kinds = []

    class Kind(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            callback = next(c for c in trainer.callbacks if isinstance(c, AttributionCallback))
            kinds.append(type(callback._attached).__name__)

    fit(llama_folder, task_files, tmp_path, attribution(), Kind())
    assert kinds == ["NoneType"] * EPOCHS + ["UpdateGate"] * 2 * EPOCHS
    kinds.clear()
    fit(llama_folder, task_files, tmp_path, attribution(), Kind(), optimizer=SGD)
    assert kinds[-1] == "GradientGate"
    with pytest.warns(UserWarning, match="gate: gradient protects nothing under AdamW"):
        fit(llama_folder, task_files[:1], tmp_path, attribution(gate="gradient"))


@pytest.mark.parametrize("control", ["shuffled", "flattened"])
def test_controls_gate_differently_with_the_same_mean(llama_folder, task_files, tmp_path, knowing, control):
    plasticities = {}

    class Mean(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            callback = next(c for c in trainer.callbacks if isinstance(c, AttributionCallback))
            sizes = {name: levels.numel() for name, levels in callback.importance.items()}
            if trainer.current_epoch == EPOCHS:
                means = callback.plasticity()
                total = sum(means[n] * sizes[n] for n in sizes) / sum(sizes.values())
                plasticities[callback.control] = total

    _, _, own = fit(llama_folder, task_files, tmp_path / "own", attribution(), Mean())
    _, _, other = fit(llama_folder, task_files, tmp_path / "other", attribution(control=control), Mean())
    assert plasticities[control] == pytest.approx(plasticities["none"], abs=1e-4)
    assert any(not torch.equal(values, other[1][name]) for name, values in own[1].items())


def test_nothing_answered_correctly_is_said_and_nothing_gated(llama_folder, task_files, tmp_path):
    frozen = partial(torch.optim.SGD, lr=0.0)
    with pytest.warns(UserWarning, match="Task `task0`: no training row is answered correctly"):
        fit(llama_folder, task_files, tmp_path, attribution(), optimizer=frozen)


def test_only_parameters_of_the_pattern(llama_folder, task_files, tmp_path, knowing):
    callback = attribution(parameters=r"mlp\.")
    fit(llama_folder, task_files, tmp_path, callback)
    assert callback.importance
    assert all("mlp." in name for name in callback.importance)


def test_no_hook_is_left_behind(llama_folder, task_files, tmp_path, knowing):
    for callbacks in ([], [CrashAt(4 * EPOCHS)]):  # two steps an epoch: at the third task's first
        model, data = build(llama_folder, task_files, optimizer=SGD)
        callback = attribution(gate="gradient")
        trainer = trainer_for(data, tmp_path, [callback, *callbacks])
        with pytest.raises(CrashError) if callbacks else nullcontext():
            trainer.fit(model, datamodule=data)
        assert callback._attached is None
        assert all(not parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"strength": -1.0}, "`strength` is -1.0"),
        ({"parameters": "("}, r"`parameters` is not a regular expression: '\('"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        AttributionCallback(**options)


def test_what_cannot_be_attributed_is_refused_before_training(llama_folder, task_files, tmp_path):
    with pytest.raises(AgclError, match="`parameters` 'no_such' matches no trainable parameter"):
        fit(llama_folder, task_files, tmp_path, attribution(parameters="no_such"))


def test_importance_of_the_tasks_may_be_averaged(llama_folder, task_files, tmp_path, knowing):
    callback = attribution(merge="mean")
    fit(llama_folder, task_files, tmp_path, callback)
    files = [load_importance(path)[0] for path in callback.files.values()]
    assert len(files) == len(task_files)
    for name, levels in callback.importance.items():
        mean = sum(file[name].double() for file in files) / len(files)
        assert (levels.double() - mean).abs().max() <= 0.5 + 1e-9, name


@pytest.mark.parametrize("estimator", [Change(), Magnitude(), Wanda(), SPG(), Fisher()], ids=lambda e: type(e).__name__)
def test_other_estimators_gate_too(llama_folder, task_files, tmp_path, knowing, estimator):
    callback = attribution(estimator=estimator)
    fit(llama_folder, task_files, tmp_path, callback)
    assert list(callback.files) == [f"task{index}" for index in range(len(task_files))]
    for path in callback.files.values():
        importance, metadata = load_importance(path)
        assert metadata["estimator"] == type(estimator).__name__
        assert len(metadata["fingerprint"]) == 64
        assert any(levels.any() for levels in importance.values())


def test_a_batch_of_rows_gives_the_importance_of_single_rows(llama_folder, task_files, tmp_path, knowing):
    found = []
    for batch_size in (1, 3):
        callback = attribution(batch_size=batch_size)
        fit(llama_folder, task_files[:1], tmp_path / str(batch_size), callback)
        found.append(callback.importance)
    for name, levels in found[0].items():
        assert (levels.int() - found[1][name].int()).abs().max() <= 1, name
