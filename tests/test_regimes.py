"""Joint training, another order, replay and validation rows, as whole runs on a tiny model."""

import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from helpers import EPOCHS, CrashAt, CrashError, attribution, build, slow, trainer_for, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl.callbacks import ContinualReport
from agcl.data.replay import Replay
from agcl.data.tasks import IGNORED_LABEL
from agcl.errors import AgclError
from agcl.schedules import WarmupDecay

OTHER_EPOCHS = {"epochs": [1, 3, 2]}  # of the three tasks
JOINT = {"regime": "joint"}


class Recorder(Callback):
    """Batches and learning rates, step by step."""

    def __init__(self):
        self.batches, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert trainer.num_training_batches == trainer.datamodule.num_batches(trainer.current_epoch)
        self.batches.append({name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in batch.items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def build_joint(folder, files, **options):
    return build(folder, files, data_options=JOINT, **options)


def rows_of(batches):
    return Counter(
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    )


def test_joint_training_serves_each_row_as_often_as_the_sequence(llama_folder, task_files, tmp_path):
    seen = []
    for options in (JOINT, {}):
        model, data = build(llama_folder, task_files, task_options=OTHER_EPOCHS, data_options=options)
        recorder = Recorder()
        trainer_for(data, tmp_path, [recorder]).fit(model, datamodule=data)
        seen.append(rows_of(recorder.batches))
        if options is JOINT:
            assert data.trainer.current_epoch == 3
            first_epoch = recorder.batches[:6]
            assert rows_of(first_epoch) == sum((rows_at(data, index) for index in range(3)), Counter())
    assert seen[0] == seen[1]
    assert [seen[0][row] for index in range(3) for row in rows_at(data, index)] == [1] * 4 + [3] * 4 + [2] * 4


def rows_at(data, index):
    return Counter(map(tuple, data.training_rows(index)["input_ids"]))


def test_joint_training_equals_a_plain_loop(llama_folder, task_files, tmp_path):
    """One optimizer, one linear decay over all 12 steps (6, 4, 2 batches in epochs 0, 1, 2), on the batches served."""
    schedule = partial(WarmupDecay, warmup=0.0)
    model, data = build_joint(llama_folder, task_files, task_options=OTHER_EPOCHS, lr_scheduler=schedule)
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder]).fit(model, datamodule=data)
    assert len(recorder.batches) == 12
    assert recorder.rates == pytest.approx([0.02 * (1 - step / 12) for step in range(12)])

    other, _ = build_joint(llama_folder, task_files)
    other.configure_model()
    network = other.model
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.1)
    for step, batch in enumerate(recorder.batches):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 12)
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = network(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=position_ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = weights(other)
    for name, parameter in weights(model).items():
        assert torch.allclose(parameter, expected[name], atol=1e-5), name


def test_joint_scores_are_taken_before_and_at_the_end(llama_folder, task_files, tmp_path):
    model, data = build_joint(llama_folder, task_files)
    trainer = trainer_for(data, tmp_path, [ContinualReport(save_model=False)])
    trainer.fit(model, datamodule=data)
    nll = model.score_matrices["nll"].compute()
    assert nll.isfinite().all(dim=1).tolist() == [True, False, False, True]
    assert nll[1:3].isnan().all()
    assert (nll[3] < nll[0]).all()
    transfer = model.transfer()
    scores = model.score_matrices["score"].compute()
    assert transfer.pop("average_performance").item() == pytest.approx(scores[3].mean().item())
    assert all(math.isnan(value) for value in transfer.values())
    results = json.loads((tmp_path / "scores.json").read_text())
    assert results["regime"] == "joint"
    assert results["metrics"]["backward_transfer"] is None
    assert [line.split(",")[0] for line in (tmp_path / "scores.csv").read_text().split()] == [
        "after",
        "before",
        "joint",
    ]


def test_joint_schedule_counts_accumulated_and_limited_batches(llama_folder, task_files, tmp_path):
    schedule = partial(WarmupDecay, warmup=0.0)
    model, data = build_joint(llama_folder, task_files, task_options=OTHER_EPOCHS, lr_scheduler=schedule)
    recorder = Recorder()
    trainer = trainer_for(data, tmp_path, [recorder], accumulate_grad_batches=2, limit_train_batches=5)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 3 + 2 + 1  # of 5, 4 and 2 batches
    assert recorder.rates[-1] == pytest.approx(0.02 / 6)


@pytest.mark.parametrize("options", [JOINT, {"replay": Replay(share=0.5, buffer_size=4)}], ids=["joint", "replay"])
# Joint epochs have 6 steps, those with replayed rows 3: in the middle of an epoch, at one's end, after the last step.
@pytest.mark.parametrize("crash_at", [8, *slow(12, 18)])
def test_resumed_run_sees_the_same_batches(gpt2_folder, task_files, tmp_path, options, crash_at):
    straight, data = build(gpt2_folder, task_files, data_options=options)
    whole = Recorder()
    trainer_for(data, tmp_path, [whole]).fit(straight, datamodule=data)

    model, data = build(gpt2_folder, task_files, data_options=options)
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{step}", every_n_train_steps=1)
    first = Recorder()
    with pytest.raises(CrashError):
        trainer_for(data, tmp_path, [CrashAt(crash_at), first, keep], enable_checkpointing=True).fit(
            model, datamodule=data
        )
    model, data = build(gpt2_folder, task_files, data_options=options)
    second = Recorder()
    checkpoint = tmp_path / "checkpoints" / f"step={crash_at}.ckpt"
    trainer_for(data, tmp_path, [second]).fit(model, datamodule=data, ckpt_path=checkpoint)

    assert len(first.batches) == crash_at
    batches = first.batches + second.batches
    assert len(batches) == len(whole.batches)
    for ours, theirs in zip(batches, whole.batches, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert first.rates + second.rates == whole.rates
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, weights(straight)[name]), name
    ours, theirs = (m.score_matrices["nll"].compute() for m in (model, straight))
    assert torch.equal(ours.nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))


def test_a_checkpoint_of_the_other_regime_is_refused(llama_folder, task_files, tmp_path):
    model, data = build_joint(llama_folder, task_files)
    trainer = trainer_for(data, tmp_path)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, data = build(llama_folder, task_files)
    with pytest.raises(AgclError, match="saved with `regime: joint`, but the configuration says `sequential`"):
        trainer_for(data, tmp_path).fit(model, datamodule=data, ckpt_path=tmp_path / "end.ckpt")


def test_attribution_is_refused_under_joint_training(llama_folder, task_files, tmp_path):
    model, data = build_joint(llama_folder, task_files)
    with pytest.raises(AgclError, match="`regime: joint` has neither"):
        trainer_for(data, tmp_path, [attribution()]).fit(model, datamodule=data)


def test_order_is_that_of_learning(llama_folder, task_files, tmp_path):
    order = ["task2", "task0", "task1"]
    model, data = build(llama_folder, task_files, data_options={"order": order})
    rearranged, same = build(llama_folder, [task_files[2], task_files[0], task_files[1]])
    for module, datamodule in ((model, data), (rearranged, same)):
        trainer_for(datamodule, tmp_path).fit(module, datamodule=datamodule)
    assert [task.name for task in data.tasks] == order
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, weights(rearranged)[name]), name


def test_replay_lengthens_epochs_and_schedule(llama_folder, task_files, tmp_path):
    options = {"replay": Replay(share=0.5)}
    model, data = build(llama_folder, task_files, data_options=options, lr_scheduler=partial(WarmupDecay, warmup=0.0))
    recorder = Recorder()
    trainer_for(data, tmp_path, [recorder, ContinualReport(save_model=False)]).fit(model, datamodule=data)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert (results["replay"], results["evaluate_on"]) == ({"share": 0.5, "buffer_size": None}, "test")
    per_task = [2 * EPOCHS, 3 * EPOCHS, 3 * EPOCHS]  # batches of two, of 4 rows, then of 4 + 2
    expected = [0.02 * (1 - step / steps) for steps in per_task for step in range(steps)]
    assert recorder.rates == pytest.approx(expected)


def test_validation_rows_are_scored_in_place_of_the_test_rows(llama_folder, task_files, tmp_path):
    nll = []
    for evaluate_on, split in (("validation", "train[:2]"), ("test", "train[:2]"), ("test", "train[2:]")):
        own = {"test_split": split} if evaluate_on == "test" else {"test_split": "none", "validation_split": split}
        model, data = build(llama_folder, task_files, task_options=own, data_options={"evaluate_on": evaluate_on})
        trainer_for(data, tmp_path).fit(model, datamodule=data)
        nll.append(model.score_matrices["nll"].compute())
    assert torch.equal(nll[0], nll[1])
    assert not torch.equal(nll[0], nll[2])
    with pytest.raises(AgclError, match="Task `task0` declares no `validation_split`"):
        build(llama_folder, task_files, data_options={"evaluate_on": "validation"})
