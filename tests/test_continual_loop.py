"""One ``Trainer.fit`` over three tasks: what is learned when, what is scored, and resuming bit for bit."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import save_tiny_model
from helpers import EPOCHS, CrashAt, CrashError, attribution, build, slow, trainer_for, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.attribution import load_importance
from agcl.callbacks import ContinualReport
from agcl.data.datamodule import ContinualDataModule
from agcl.data.tasks import Probe
from agcl.errors import AgclError
from agcl.module import ContinualLM
from agcl.schedules import WarmupDecay


class Recorder(Callback):
    """What each training step saw."""

    def __init__(self):
        self.steps = []
        self.state_sizes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.steps.append((trainer.current_epoch, batch["input_ids"].clone(), optimizer.param_groups[0]["lr"]))
        self.state_sizes.append(len(optimizer.state))


def moved_in_a_step(folder, files, run_dir, **options):
    model, data = build(folder, files[:1], optimizer=partial(torch.optim.SGD, lr=1.0, fused=True))
    before = {}

    class Remember(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(weights(model))

    trainer_for(data, run_dir, [Remember()], max_steps=1, **options).fit(model, datamodule=data)
    squares = [(after - before[name]).square().sum() for name, after in weights(model).items()]
    return float(sum(squares)) ** 0.5


def test_gradients_are_clipped_under_mixed_precision_before_a_fused_optimizers_step(llama_folder, task_files, tmp_path):
    options = {"gradient_clip_val": 1e-3}
    free = moved_in_a_step(llama_folder, task_files, tmp_path, precision="bf16-mixed")
    clipped = moved_in_a_step(llama_folder, task_files, tmp_path, precision="bf16-mixed", **options)
    assert clipped == pytest.approx(moved_in_a_step(llama_folder, task_files, tmp_path, **options), rel=1e-3)
    assert clipped < 1e-3 < 0.1 * free
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(AgclError, match=r"fused optimizer unscales gradients inside of its step.*`fused: false`"):
        moved_in_a_step(llama_folder, task_files, tmp_path, plugins=[scaled], **options)


def test_each_epoch_serves_its_task_once(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder]).fit(model, datamodule=data)
    assert [epoch for epoch, _, _ in recorder.steps] == [e for e in range(3 * EPOCHS) for _ in range(2)]
    for epoch in range(3 * EPOCHS):
        seen = torch.cat([ids for e, ids, _ in recorder.steps if e == epoch]).tolist()
        rows = data.training_rows(epoch // EPOCHS)["input_ids"]
        assert sorted(seen) == sorted(rows)
    orders = [str([ids.tolist() for e, ids, _ in recorder.steps if e == epoch]) for epoch in range(EPOCHS)]
    assert len(set(orders)) > 1  # shuffled anew in each epoch


def test_optimizer_and_schedule_start_afresh_with_each_task(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, lr_scheduler=partial(WarmupDecay, warmup=0.25))
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder]).fit(model, datamodule=data)
    per_task = 2 * EPOCHS
    rates = [[lr for _, _, lr in recorder.steps[i * per_task :][:per_task]] for i in range(3)]
    # Two warm-up steps of six, then linear decay from the peak 0.02 over the other four.
    expected = [0.02 / 3, 0.04 / 3, 0.02, 0.015, 0.01, 0.005]
    for task_rates in rates:
        assert task_rates == pytest.approx(expected)
    assert [recorder.state_sizes[i * per_task] for i in range(3)] == [0, 0, 0]
    assert min(recorder.state_sizes[1:per_task]) > 0


def test_torch_schedulers_restart_too(llama_folder, task_files, tmp_path):
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    model, data = build(llama_folder, task_files, lr_scheduler=scheduler)
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder]).fit(model, datamodule=data)
    rates = [lr for _, _, lr in recorder.steps]
    assert rates == pytest.approx([0.02 * 0.5**step for step in range(2 * EPOCHS)] * 3)


def test_schedule_counts_optimizer_steps_under_accumulation(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files, lr_scheduler=partial(WarmupDecay, warmup=0.0))
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder], accumulate_grad_batches=2).fit(model, datamodule=data)
    first_task = [lr for _, _, lr in recorder.steps[: 2 * EPOCHS]]
    assert first_task == pytest.approx([0.02, 0.02, 0.02 * 2 / 3, 0.02 * 2 / 3, 0.02 / 3, 0.02 / 3])


def test_schedule_counts_the_step_at_each_epochs_end(llama_folder, task_files, tmp_path):
    # Four batches of one row, accumulated by three: two steps an epoch, the second one from a single batch.
    model, data = build(llama_folder, task_files, batch_size=1, lr_scheduler=partial(WarmupDecay, warmup=0.0))
    recorder = Recorder()
    trainer = trainer_for(data, tmp_path, [recorder], accumulate_grad_batches=3)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 3 * 2 * EPOCHS
    last_of_first_task = recorder.steps[4 * EPOCHS - 1][2]
    assert last_of_first_task == pytest.approx(0.02 / (2 * EPOCHS))


def test_fitting_again_starts_a_new_score_matrix(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path).fit(model, datamodule=data)
    first = model.score_matrices["nll"].compute()
    trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert torch.equal(model.score_matrices["nll"].compute()[0], first[3])


def test_all_tasks_and_probes_are_scored_before_and_after_each_task(llama_folder, task_files, tmp_path):
    options = {"probes": {"first": Probe(split="train[:1]")}}
    model, data = build(llama_folder, task_files, task_options=options)

    class CountScorings(Callback):
        scorings = 0

        def on_validation_epoch_end(self, trainer, pl_module):
            self.scorings += 1

    counter = CountScorings()
    trainer = trainer_for(data, tmp_path, [counter])
    trainer.fit(model, datamodule=data)
    assert counter.scorings == 4  # before any training, after each of three tasks
    for name in ("score", "nll", "score/first", "nll/first"):
        assert model.score_matrices[name].compute().shape == (4, 3)
        assert model.score_matrices[name].compute().isfinite().all()
    nll = model.score_matrices["nll"].compute()
    assert (nll[[1, 2, 3], [0, 1, 2]] < nll[0]).all()  # each task is better known after it was learned
    transfer = model.transfer()
    scores = model.score_matrices["score"].compute()
    assert transfer["average_performance"].item() == pytest.approx(scores[3].mean().item())
    assert transfer["learning_accuracy"].item() == pytest.approx(scores[1:].diagonal().mean().item())
    backward = [scores[3, i] - scores[i + 1, i] for i in range(2)]
    assert trainer.callback_metrics["transfer/backward_transfer"].item() == pytest.approx(sum(backward).item() / 2)


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    """GPT-2 has dropout, so that random numbers must be resumed too."""
    return save_tiny_model(tmp_path_factory.mktemp("gpt2-dropout"), "gpt2")


def checkpoints(run_dir, every_n_train_steps=None):
    return ModelCheckpoint(
        run_dir / "checkpoints",
        save_top_k=-1,
        filename="{step}",
        **({"every_n_train_steps": every_n_train_steps} if every_n_train_steps else {"every_n_epochs": 1}),
    )


@pytest.fixture
def straight_run(dropout_folder, task_files, tmp_path_factory, knowing):
    run_dir = tmp_path_factory.mktemp("straight")
    model, data = build(dropout_folder, task_files)
    callback = attribution()
    trainer_for(data, run_dir, [callback, ContinualReport(save_model=False)]).fit(model, datamodule=data)
    return model, callback, run_dir


# Task 2 takes steps 6 to 11. A checkpoint of step 12 is one of an epoch's last batch, taken before scoring and
# attribution; that of step 18 is the same at the very end.
@pytest.mark.parametrize(
    ("every_n_steps", "crash_at"),
    [(None, 9), (1, 8), (1, 12), (1, 18), *slow((None, 6), (1, 7), (1, 11), (3, 11))],
)
def test_resumed_run_equals_the_straight_one(
    dropout_folder, task_files, tmp_path, straight_run, knowing, every_n_steps, crash_at
):
    straight_model, straight_callback, straight_dir = straight_run
    model, data = build(dropout_folder, task_files)
    model.num_answers = straight_model.num_answers
    callbacks = [attribution(), CrashAt(crash_at), checkpoints(tmp_path, every_n_steps)]
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, callbacks, enable_checkpointing=True).fit(model, datamodule=data)
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))

    model, data = build(dropout_folder, task_files)
    callback = attribution()
    resumed_dir = tmp_path / "resumed"
    trainer = trainer_for(data, resumed_dir, [callback, ContinualReport(save_model=False)])
    trainer.fit(model, datamodule=data, ckpt_path=newest)

    assert trainer.global_step == 6 * EPOCHS
    for name, parameter in weights(straight_model).items():
        assert torch.equal(parameter, weights(model)[name]), name
    assert straight_callback.importance.keys() == callback.importance.keys()
    for name, levels in straight_callback.importance.items():
        assert torch.equal(levels, callback.importance[name]), name
    for name, matrix in straight_model.score_matrices.items():
        assert torch.equal(matrix.compute(), model.score_matrices[name].compute()), name
    for file in (straight_dir / "importance").iterdir():
        straight, resumed = load_importance(file), load_importance(resumed_dir / "importance" / file.name)
        assert resumed[1] == straight[1]
        assert all(torch.equal(levels, resumed[0][name]) for name, levels in straight[0].items())
    for name in ("scores.csv", "answers.json"):
        assert (resumed_dir / name).read_bytes() == (straight_dir / name).read_bytes()


def test_resuming_after_a_task_without_importance(llama_folder, task_files, tmp_path, monkeypatch):
    """Nothing is answered correctly at the first boundary; resuming inside task 2 must not make up for it."""
    from agcl.attribution import relevance

    correct = {"now": False}
    monkeypatch.setattr(relevance, "is_correct", lambda *args: correct["now"])
    model, data = build(llama_folder, task_files)
    callbacks = [attribution(), CrashAt(8), checkpoints(tmp_path, 1)]
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, callbacks, enable_checkpointing=True).fit(model, datamodule=data)
    correct["now"] = True
    model, data = build(llama_folder, task_files)
    callback = attribution()
    trainer_for(data, tmp_path, [callback]).fit(model, datamodule=data, ckpt_path=tmp_path / "checkpoints/step=7.ckpt")
    assert list(callback.files) == ["task1", "task2"]


def test_checkpoint_of_another_model_is_refused(llama_folder, gpt2_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    trainer = trainer_for(data, tmp_path, [checkpoints(tmp_path)], enable_checkpointing=True, max_epochs=3 * EPOCHS)
    trainer.fit(model, datamodule=data)
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))
    model, data = build(gpt2_folder, task_files)
    with pytest.raises(AgclError, match="The checkpoint is of another model: `model"):
        trainer_for(data, tmp_path).fit(model, datamodule=data, ckpt_path=checkpoint)
    model, data = build(llama_folder, task_files[:2])
    with pytest.raises(AgclError, match=r"saved while learning the tasks .*task2.* but the configuration declares"):
        trainer_for(data, tmp_path).fit(model, datamodule=data, ckpt_path=checkpoint)


def test_tasks_that_were_not_learned_are_named(llama_folder, task_files, tmp_path, recwarn):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == EPOCHS

    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path, [Stop()]).fit(model, datamodule=data)
    (said,) = [str(w.message) for w in recwarn if "Training has ended before" in str(w.message)]
    assert "before `task1`, `task2` was learned" in said
    recwarn.clear()
    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert not [w for w in recwarn if "Training has ended before" in str(w.message)]


def test_rows_in_another_models_tokens_are_refused(llama_folder, task_files, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    model, data = build(llama_folder, task_files[:1])
    data.model_name_or_path = str(other)
    message = r"rows are in tokens of `\S+other`, but the model is `\S+`, which has others: .*same `model_name_or_path`"
    with pytest.raises(AgclError, match=message):
        trainer_for(data, tmp_path).fit(model, datamodule=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContinualLM(torch.nn.Linear(1, 1)), "takes the name or folder of a model, not a Linear"),
        (lambda: ContinualDataModule([{"name": "a"}], "x"), r"`tasks` holds a dict; make each an agcl\.Task"),
    ],
)
def test_objects_of_the_wrong_kind_are_refused(make, message):
    with pytest.raises(AgclError, match=message):
        make()


def test_of_rows_fewer_than_processes_each_is_counted_once(llama_folder, task_files, monkeypatch):
    _, data = build(llama_folder, task_files[:1], task_options={"test_split": "train[:2]"})
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=3, strategy=None)
    monkeypatch.setattr("agcl.data.datamodule.UnrepeatedDistributedSampler", lambda rows, shuffle: range(len(rows)))
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert sum(len(batch["counts"]) for batch in batches) == 3  # one for each process
    assert torch.cat([batch["counts"] for batch in batches]).tolist() == [True, True, False]


def test_checkpoint_with_other_probes_is_refused(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files[:1], task_options={"probes": {"first": Probe("train[:1]")}})
    trainer = trainer_for(data, tmp_path, [checkpoints(tmp_path)], enable_checkpointing=True)
    trainer.fit(model, datamodule=data)
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))
    model, data = build(llama_folder, task_files[:1])
    with pytest.raises(AgclError, match=r"saved with other `probes` .*nll/first, score/first"):
        trainer_for(data, tmp_path).fit(model, datamodule=data, ckpt_path=checkpoint)


def test_checkpoint_loads_outside_a_run(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    trainer = trainer_for(data, tmp_path)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = ContinualLM.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, weights(loaded)[name]), name


def test_final_model_is_loaded_by_plain_transformers(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path, [ContinualReport()]).fit(model, datamodule=data)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("cat 0?", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, model.model.eval()(ids).logits)


def test_lora_trains_the_adapter_alone(llama_folder, task_files, tmp_path, knowing):
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    model, data = build(llama_folder, task_files, adapter=adapter)
    callback = attribution()
    trainer = trainer_for(data, tmp_path, [callback, ContinualReport()])
    trainer.fit(model, datamodule=data)
    original = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    for name, parameter in model.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, original[name.replace("base_layer.", "")]), name
    assert callback.importance
    assert all("lora" in name for name in callback.importance)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}])
def test_low_precision_runs(llama_folder, task_files, tmp_path, knowing, options):
    model, data = build(llama_folder, task_files, gradient_checkpointing=True)
    trainer_for(data, tmp_path, [attribution()], gradient_clip_val=1.0, **options).fit(model, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    dtype = torch.bfloat16 if options["precision"] == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_gradient_checkpointing_changes_nothing(llama_folder, task_files, tmp_path):
    losses = []
    for checkpointing in (False, True):
        model, data = build(llama_folder, task_files, gradient_checkpointing=checkpointing)
        trainer_for(data, tmp_path).fit(model, datamodule=data)
        losses.append(model.score_matrices["nll"].compute())
    assert torch.allclose(*losses, rtol=1e-4)


def test_wrong_trainer_settings_are_refused(llama_folder, task_files, tmp_path):
    for name, value in (("val_check_interval", 0.5), ("limit_val_batches", 0)):
        model, data = build(llama_folder, task_files)
        with pytest.raises(AgclError, match=r"leave the Trainer's `val_check_interval` at 1.0"):
            trainer_for(data, tmp_path, **{name: value}).fit(model, datamodule=data)
    for name, value in (("max_epochs", 2), ("reload_dataloaders_every_n_epochs", 0), ("num_sanity_val_steps", 0)):
        model, data = build(llama_folder, task_files)
        with pytest.raises(AgclError, match=rf"The Trainer's `{name}` is .*trainer_arguments"):
            trainer_for(data, tmp_path, **{name: value}).fit(model, datamodule=data)


def test_model_without_a_continual_data_module_is_refused(llama_folder, tmp_path, task_files):
    model, data = build(llama_folder, task_files)
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(AgclError, match="ContinualLM learns from a ContinualDataModule"):
        trainer_for(data, tmp_path).fit(model, loader, loader)


def test_undefined_metrics_are_nan(llama_folder, task_files, tmp_path):
    model, data = build(llama_folder, task_files[:1])
    trainer_for(data, tmp_path).fit(model, datamodule=data)
    assert math.isnan(model.transfer()["backward_transfer"])


def test_kept_rows_are_few_of_the_tasks_own(llama_folder, task_files):
    _, data = build(llama_folder, task_files)
    data.setup()
    kept = data.kept_rows(1, 3)["input_ids"]
    assert kept[:2] == data.kept_rows(1, 2)["input_ids"]
    assert len({tuple(ids) for ids in kept}) == 3
    assert {tuple(ids) for ids in kept} <= {tuple(ids) for ids in data.training_rows(1)["input_ids"]}
    assert len(data.kept_rows(1, 99)) == 4
