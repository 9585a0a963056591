"""Importance from a model of each task's own, and importance computed anew from kept rows."""

import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from helpers import EPOCHS, CrashAt, CrashError, attribution, build, slow, trainer_for, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl.attribution import ImportanceConfig, parameter_relevance
from agcl.attribution.artefact import load_importance
from agcl.attribution.estimators import LRP, Change, Random
from agcl.callbacks import AttributionCallback, single_task
from agcl.callbacks.gathering import Gatherer
from agcl.errors import AgclError

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    """GPT-2 has dropout, so that random numbers matter."""
    return save_tiny_model(tmp_path_factory.mktemp("gpt2-dropout"), "gpt2")


def fit(folder, files, run_dir, *callbacks, seed=0, ckpt_path=None, model_options=None, **trainer_options):
    model, data = build(folder, files, **(model_options or {}))
    torch.manual_seed(seed)
    trainer_for(data, run_dir, callbacks, **trainer_options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, data


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(values, right[name]) for name, values in left.items())


def crash_and_resume(folder, files, run_dir, make_callback, every_n_steps, crash_at, seed=0, model_options=None):
    saving = ModelCheckpoint(
        run_dir / "checkpoints", save_top_k=-1, filename="{step}", every_n_train_steps=every_n_steps
    )
    callbacks = (make_callback(), CrashAt(crash_at), saving)
    with pytest.raises(CrashError):
        fit(folder, files, run_dir, *callbacks, seed=seed, enable_checkpointing=True, model_options=model_options)
    newest = max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    callback = make_callback()
    # Another process may start with other random numbers, and another adapter.
    model, _ = fit(folder, files, run_dir / "resumed", callback, seed=9, ckpt_path=newest, model_options=model_options)
    return model, callback


def files_of(callback):
    return {task: load_importance(path) for task, path in callback.files.items()}


# ------------------------------------------------------------------ a model of each task's own


@pytest.mark.parametrize(
    ("estimator", "options"), [(None, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}), (Change(), {})]
)
def test_single_task_importance_is_that_of_a_run_of_its_own(
    dropout_folder, task_files, tmp_path, knowing, estimator, options
):
    callback = attribution(source="single_task", estimator=estimator)
    fit(dropout_folder, task_files[:2], tmp_path / "sequence", callback, **options)
    for index, file in enumerate(task_files[:2]):
        own = attribution(estimator=estimator)
        model, data = build(dropout_folder, [file], task_options={"name": f"task{index}"})
        trainer_for(data, tmp_path / str(index), [own], **options).fit(model, datamodule=data)
        found, metadata = load_importance(callback.files[f"task{index}"])
        expected, own_metadata = load_importance(own.files[f"task{index}"])
        assert same(found, expected)
        assert (metadata.pop("source"), own_metadata.pop("source")) == ("single_task", "running")
        assert metadata == own_metadata  # the fingerprint of the weights among them


def test_single_task_importance_differs_from_the_running_models(llama_folder, task_files, tmp_path, knowing):
    found = {}
    for source in ("running", "single_task"):
        callback = attribution(source=source)
        fit(llama_folder, task_files[:2], tmp_path / source, callback)
        found[source] = files_of(callback)
    assert same(found["running"]["task0"][0], found["single_task"]["task0"][0])  # the first task is alone in any case
    assert not same(found["running"]["task1"][0], found["single_task"]["task1"][0])


def test_single_task_models_leave_the_run_as_it_was(dropout_folder, task_files, tmp_path, knowing):
    plain, _ = fit(dropout_folder, task_files, tmp_path / "plain")
    callback = attribution(source="single_task", strength=0.0)
    gated, _ = fit(dropout_folder, task_files, tmp_path / "gated", callback)
    assert callback.importance
    assert same(weights(plain), weights(gated))
    for name, matrix in plain.score_matrices.items():
        assert torch.equal(matrix.compute(), gated.score_matrices[name].compute())


# Inside task 2, and right after its last step.
@pytest.mark.parametrize(("crash_at", "adapter"), [(8, None), *slow((8, LORA), (12, None))])
def test_resuming_with_single_task_models(dropout_folder, task_files, tmp_path, knowing, crash_at, adapter):
    make, options = partial(attribution, source="single_task"), {"adapter": adapter}
    callback = make()
    # The adapter's random weights do not come from the seed that the single-task models are trained with.
    straight, _ = fit(dropout_folder, task_files, tmp_path / "straight", callback, seed=5, model_options=options)
    model, resumed = crash_and_resume(
        dropout_folder, task_files, tmp_path, make, 1, crash_at, seed=5, model_options=options
    )
    assert same(weights(straight), weights(model))
    assert same(callback.importance, resumed.importance)
    for task, (importance, metadata) in files_of(callback).items():
        assert same(importance, files_of(resumed)[task][0])
        assert metadata == files_of(resumed)[task][1]


def test_nothing_of_the_single_task_model_is_left(llama_folder, task_files, tmp_path, knowing, monkeypatch):
    made, untrained = [], single_task._untrained

    def noted(pl_module):
        module = untrained(pl_module)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(single_task, "_untrained", noted)

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
            self.is_gone = [reference() is None for reference in made]

    class Before(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])

    before, after = Before(), Look()
    callback = attribution(source="single_task", estimator=Change())
    fit(llama_folder, task_files[:1], tmp_path, before, callback, after)
    assert torch.equal(before.states[0], after.states[0])
    assert before.states[1] == after.states[1]
    assert (before.states[2] == after.states[2]).all()
    assert after.is_gone[-1:] == [True]
    assert callback.estimator.state_dict() == {"start": {}}


def test_single_task_training_is_announced_in_one_line(llama_folder, task_files, tmp_path, knowing, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(llama_folder, task_files[:1], tmp_path, attribution(source="single_task"))
    lines = [record.message for record in caplog.records]
    assert sum("Training a model on task `task0` alone" in line for line in lines) == 1
    assert sum("`Trainer.fit` stopped" in line for line in lines) == 1  # the run's own


def test_single_task_is_refused_where_it_cannot_be(llama_folder, task_files, tmp_path, monkeypatch):
    model, _ = fit(llama_folder, task_files[:1], tmp_path)
    _, data = build(llama_folder, task_files[:1])
    with pytest.raises(AgclError, match="holds a model already"):
        trainer_for(data, tmp_path, [attribution(source="single_task")]).fit(model, datamodule=data)
    model, data = build(llama_folder, task_files[:1])
    trainer = trainer_for(data, tmp_path, [attribution(source="single_task")])
    model.trainer, trainer.datamodule = trainer, data
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(AgclError, match=r"this run has 2; set the Trainer's `devices`.* or take `source: running`"):
        trainer.callbacks[0].on_fit_start(trainer, model)


def test_changed_pretrained_weights_are_refused(llama_folder, task_files, tmp_path, monkeypatch):
    restore = single_task.InitialModel.restore

    def after_a_change(self, pl_module):
        with torch.no_grad():
            next(pl_module.model.parameters()).view(-1)[0] += 1
        restore(self, pl_module)

    monkeypatch.setattr(single_task.InitialModel, "restore", after_a_change)
    with pytest.raises(AgclError, match="no longer gives the weights that this run began with"):
        fit(llama_folder, task_files[:1], tmp_path, attribution(source="single_task"))


# ------------------------------------------------------------------ kept rows


def relevance_importance(model, rows, quantile):
    """The slow way: mean magnitude over the rows, s / (s + q), rounded."""
    total = {}
    for row in rows:
        answer = [p for p, label in enumerate(row["labels"]) if label != -100]
        relevance = parameter_relevance(
            model,
            torch.tensor([row["input_ids"]]),
            positions=torch.tensor(answer) - 1,
            targets=torch.tensor([row["labels"][p] for p in answer]),
        )
        for name, values in relevance.items():
            total[name] = total.get(name, 0) + values.double().abs() / len(rows)
    found = {}
    for name, values in total.items():
        used = values[values > 0].sort().values
        q = used[max(int(np.ceil(quantile * len(used) - 1e-9)), 1) - 1]
        found[name] = 255 * values / (values + q)
    return found


def test_old_importance_is_computed_anew_from_the_kept_rows(llama_folder, task_files, tmp_path, knowing):
    expected = {}

    class Independent(Callback):  # before the AttributionCallback acts, at the last boundary
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3 * EPOCHS - 1:
                for old in range(2):
                    rows = list(trainer.datamodule.kept_rows(old, 2))
                    expected[f"task{old}"] = relevance_importance(pl_module.model, rows, 0.3)

    callback = attribution(reestimate=2, estimator=LRP(), importance=ImportanceConfig(quantile=0.3))
    fit(llama_folder, task_files, tmp_path, Independent(), callback)
    found = files_of(callback)
    for task, values in expected.items():
        importance, metadata = found[task]
        assert (metadata["reestimated_after"], metadata["num_samples"]) == ("task2", "2")
        for name, levels in importance.items():
            assert (levels.double() - values[name]).abs().max() <= 1, name
    assert "reestimated_after" not in found["task2"][1]
    for name, levels in callback.importance.items():  # of the latest, not of those that came before
        assert torch.equal(levels, torch.stack([file[name] for file, _ in found.values()]).amax(0))
    names = sorted(path.name.removesuffix(".safetensors") for path in (tmp_path / "importance").iterdir())
    assert names == ["00_task0", "00_task0_after_01", "00_task0_after_02", "01_task1", "01_task1_after_02", "02_task2"]


def test_importance_stays_in_force_where_no_kept_row_is_known(llama_folder, task_files, tmp_path, knowing, monkeypatch):
    """After task 1 the old rows are known, after task 2 those of task 0 are not."""
    gather, known = Gatherer.gather, {}

    def only_known(self, trainer, pl_module, task_index, kept=None, observe=None):
        is_forgotten = kept is not None and task_index == 0 and trainer.current_epoch == 3 * EPOCHS - 1
        known[trainer.current_epoch, task_index] = not is_forgotten
        return None if is_forgotten else gather(self, trainer, pl_module, task_index, kept, observe)

    monkeypatch.setattr(Gatherer, "gather", only_known)
    callback = attribution(reestimate=2, merge="mean")
    fit(llama_folder, task_files, tmp_path, callback)
    found = files_of(callback)
    assert not all(known.values())
    assert [metadata.get("reestimated_after") for _, metadata in found.values()] == ["task1", "task2", None]
    for name, levels in callback.importance.items():
        mean = torch.stack([file[name].double() for file, _ in found.values()]).mean(0)
        assert (levels.double() - mean).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("every_n_steps", "crash_at"), [(1, 12), (5, 14)])
def test_resuming_with_kept_rows(dropout_folder, task_files, tmp_path, knowing, every_n_steps, crash_at):
    make = partial(attribution, reestimate=2, merge="probabilistic_or")
    callback = make()
    straight, _ = fit(dropout_folder, task_files, tmp_path / "straight", callback)
    model, resumed = crash_and_resume(dropout_folder, task_files, tmp_path, make, every_n_steps, crash_at)
    assert same(weights(straight), weights(model))
    assert same(callback.importance, resumed.importance)
    for task, (importance, metadata) in files_of(callback).items():
        assert same(importance, files_of(resumed)[task][0])
        assert metadata == files_of(resumed)[task][1]


@pytest.mark.parametrize("crash_at", [8, 12, *slow(6)])
def test_resuming_where_the_estimator_looks_at_a_tasks_start(dropout_folder, task_files, tmp_path, crash_at):
    """From a checkpoint of an epoch's last batch, Lightning leaves the next epoch's start out."""
    callback = attribution(estimator=Change())
    straight, _ = fit(dropout_folder, task_files, tmp_path / "straight", callback)
    make = lambda: attribution(estimator=Change())  # noqa: E731
    model, resumed = crash_and_resume(dropout_folder, task_files, tmp_path, make, 1, crash_at)
    assert same(callback.importance, resumed.importance)
    assert same(weights(straight), weights(model))


def test_kept_rows_count_as_extra_bytes(llama_folder, task_files, tmp_path, knowing):
    sizes = []
    for reestimate in (0, 2):
        callback = attribution(reestimate=reestimate)
        fit(llama_folder, task_files, tmp_path / str(reestimate), callback)
        sizes.append(callback.extra_bytes())
    assert sizes[0] < sizes[1] < sizes[0] + 10_000
    resumed = attribution(reestimate=2)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.extra_bytes() == sizes[1]


def test_resuming_with_kept_rows_needs_the_files(llama_folder, task_files, tmp_path, knowing):
    make = partial(attribution, reestimate=2)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    with pytest.raises(CrashError):
        fit(llama_folder, task_files, tmp_path, make(), CrashAt(8), saving, enable_checkpointing=True)
    (tmp_path / "importance" / "00_task0.safetensors").unlink()
    with pytest.raises(AgclError, match=r"file of task `task0` is lost: .*reestimate` needs it"):
        fit(llama_folder, task_files, tmp_path / "resumed", make(), ckpt_path=next(tmp_path.glob("*.ckpt")))


# ------------------------------------------------------------------ bits, place, memory, refusals


def test_16_bits_through_the_whole_chain(llama_folder, task_files, tmp_path, knowing):
    fine, coarse = attribution(importance_bits=16), attribution()
    fit(llama_folder, task_files[:2], tmp_path / "fine", fine)
    fit(llama_folder, task_files[:1], tmp_path / "coarse", coarse)
    first = files_of(fine)["task0"]
    assert first[1]["bits"] == "16"
    for name, levels in coarse.importance.items():
        assert (first[0][name].double() / 65535 - levels.double() / 255).abs().max() <= 1 / 510 + 1 / 131070 + 1e-9
    assert {levels.dtype for levels in fine.importance.values()} == {torch.uint16}
    make = partial(attribution, importance_bits=16, control="shuffled", merge="mean")
    straight = make()
    model, _ = fit(llama_folder, task_files, tmp_path / "straight", straight)
    resumed_model, resumed = crash_and_resume(llama_folder, task_files, tmp_path, make, 1, 8)
    assert same(weights(model), weights(resumed_model))
    assert same(straight.importance, resumed.importance)


class Bytes(Callback):
    """Bytes held at each epoch's first step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            callback = next(c for c in trainer.callbacks if isinstance(c, AttributionCallback))
            self.found.append(callback.extra_bytes() / sum(p.numel() for p in pl_module.model.parameters()))


@pytest.mark.parametrize(
    ("options", "per_weight"),
    [
        ({"importance_on": "host", "reestimate": 2}, 1),
        ({"importance_bits": 16, "estimator": Random()}, 2),
        ({"merge": "mean"}, 2 + 1),
        ({"control": "shuffled", "source": "single_task"}, 1 + 1),
    ],
)
def test_bytes_kept_between_steps(llama_folder, task_files, tmp_path, knowing, options, per_weight):
    counter = Bytes()
    fit(llama_folder, task_files[:2], tmp_path, attribution(**options), counter)
    assert counter.found[:EPOCHS] == [0] * EPOCHS
    assert counter.found[EPOCHS:] == [per_weight] * EPOCHS


def test_weights_that_an_estimator_keeps_count(llama_folder, task_files, tmp_path, knowing):
    counter = Bytes()
    fit(llama_folder, task_files[:2], tmp_path, attribution(estimator=Change()), counter)
    assert (counter.found[0], counter.found[-1]) == (4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "single-task"}, "`source` is 'single-task'; choose one of 'running', 'single_task'"),
        ({"importance_on": "gpu"}, "`importance_on` is 'gpu'; choose one of 'device', 'host'"),
        ({"importance_bits": 4}, "`importance_bits` is 4; choose 8 or 16"),
        ({"reestimate": -1}, "`reestimate` is -1"),
        ({"reestimate": 4, "source": "single_task"}, "choose one of them"),
        ({"reestimate": 4, "estimator": Change()}, "the estimator Change looks at none"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        AttributionCallback(**options)


def test_checkpoint_of_another_source_is_refused():
    state = attribution().state_dict()
    with pytest.raises(AgclError, match="has `source: running`, not `single_task`; keep to it"):
        attribution(source="single_task").load_state_dict(state)
