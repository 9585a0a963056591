"""A run that is killed, stopped, or out of disk, and gone on with, ends as if nothing had happened."""

import os
import random
import re
import resource
import shutil
import signal

import pytest
import torch
from conftest import save_tiny_model
from helpers import attribution, build, slow, trainer_for, weights
from killing import Moments, config_for, run_forked, run_process
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from agcl.callbacks import ContinualMonitor, StopOnSignal
from agcl.checkpoint_io import AtomicCheckpointIO
from agcl.checkpoints import last_whole, look_into

SAME = ("model/model.safetensors", "importance/00_task0.safetensors", "importance/01_task1.safetensors", "scores.csv")


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    """GPT-2 has dropout, so that random numbers must be resumed too."""
    return save_tiny_model(tmp_path_factory.mktemp("gpt2-dropout"), "gpt2")


@pytest.fixture(scope="module")
def straight(dropout_folder, task_files, tmp_path_factory):
    """Folder of a run that nothing happens to, and the number of its moments."""
    path = config_for(dropout_folder, task_files[:2], tmp_path_factory.mktemp("straight"), epochs=2)
    status, output, moments = run_forked(path)
    assert status == 0, output
    return path.parent / "run" / "version_0", moments


def assert_same(folder, expected):
    for name in SAME:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(folder.rglob(".*.partial"))


def killed_until_done(config, start, kills, expected):
    """Kill a run again and again until it comes to its end; then another one, until there were enough kills."""
    for _ in range(3 * kills):
        if kills == 0:
            return
        shutil.rmtree(config.parent / "run", ignore_errors=True)
        while True:
            is_killed = start(kills > 0)
            if not is_killed:
                break
            kills -= 1
        # Killed before its first checkpoint, it has begun again in a folder of its own.
        assert_same(max((config.parent / "run").iterdir()), expected)
    assert kills == 0


def test_killed_at_three_random_moments_the_run_ends_with_the_same_weights(
    dropout_folder, task_files, tmp_path, straight
):
    expected, num_moments = straight
    config = config_for(dropout_folder, task_files[:2], tmp_path / "killed", epochs=2)
    choice = random.Random(0)

    def start(may_kill):
        moment = choice.randint(1, num_moments) if may_kill else None
        status, output, _ = run_forked(config, moments=Moments(moment))
        assert status in (0, -signal.SIGKILL), output
        return status != 0

    killed_until_done(config, start, 3, expected)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_run_ends_with_the_same_weights(dropout_folder, task_files, tmp_path):
    config = config_for(dropout_folder, task_files[:2], tmp_path / "straight", epochs=20)
    status, seconds = run_process(config)
    assert status == 0
    expected = config.parent / "run" / "version_0"
    config = config_for(dropout_folder, task_files[:2], tmp_path / "killed", epochs=20)
    seed = random.randrange(10**6)
    print(f"moments of seed {seed}")  # pytest shows it if the test fails
    choice = random.Random(seed)

    def start(may_kill):
        status, _ = run_process(config, choice.uniform(0, seconds) if may_kill else None)
        assert status in (0, -signal.SIGKILL)
        return status != 0

    killed_until_done(config, start, 20, expected)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_that_names_the_last_good_checkpoint(
    dropout_folder, task_files, tmp_path, straight
):
    expected, num_moments = straight

    def fill():  # from now on, the system refuses to make a file larger than this; a checkpoint is
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    config = config_for(dropout_folder, task_files[:2], tmp_path / "full", epochs=2)
    status, output, _ = run_forked(config, moments=Moments(num_moments // 2, fill))
    folder = config.parent / "run" / "version_0" / "checkpoints"
    last = last_whole([folder])
    assert status == 1
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert re.match(rf"agcl: error: File too large: {folder}/\S+\.ckpt\. The last good checkpoint is {last}\. ", line)
    assert "Traceback" not in output
    assert not list(folder.glob(".*"))
    assert run_forked(config)[0] == 0
    assert_same(folder.parent, expected)


# Each task takes four steps, two an epoch.
@pytest.mark.parametrize("limit", [3, *slow(5, 6, 7)])
def test_a_run_that_a_limit_has_ended_goes_on_without_it(dropout_folder, task_files, tmp_path, straight, limit):
    config = config_for(dropout_folder, task_files[:2], tmp_path / "short", epochs=2)
    short = config.parent / "run" / "version_0"
    assert run_forked(config, "--trainer.max_steps", str(limit))[0] == 0
    unlearned = limit // 4
    assert (short / "scores.csv").read_text().splitlines()[2 + unlearned] == f"task{unlearned},,"
    assert len(list((short / "importance").glob("0*"))) == unlearned
    assert look_into(short / "checkpoints" / "last.ckpt")["global_step"] == limit
    status, output, _ = run_forked(config)
    assert status == 0, output
    assert list(short.parent.iterdir()) == [short]
    assert_same(short, straight[0])


class StopAt(Callback):
    """Tells the Trainer to stop, as a time limit does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


# Each task takes six steps, three an epoch.
@pytest.mark.parametrize("step", [5, *slow(2, 11)])
def test_a_task_that_a_time_limit_cuts_short_is_not_scored_and_learned_to_its_end_later(
    dropout_folder, task_files, tmp_path, knowing, step
):
    def run(folder, *callbacks, **options):
        return fit(dropout_folder, task_files, folder, *callbacks, enable_checkpointing=True, **options)

    parts = [attribution, ContinualMonitor, lambda: ModelCheckpoint(filename="last", enable_version_counter=False)]
    straight = run(tmp_path / "straight", *(part() for part in parts))
    stopped = [part() for part in parts]
    with pytest.warns(UserWarning, match="ended before .*`task1` was learned to its end"):
        model = run(tmp_path / "short", *stopped, StopAt(step))
    unlearned = step // 6
    assert model.unlearned == ["task0", "task1"][unlearned:]
    assert model.score_matrices["score"].compute()[unlearned + 1 :].isnan().all()
    assert stopped[0].num_boundaries == unlearned
    assert len(stopped[1].state_dict()["plasticity"]) == unlearned
    (path,) = (tmp_path / "short").rglob("last.ckpt")
    assert look_into(path)["global_step"] == model.trainer.global_step
    resumed = run(tmp_path / "short", *(part() for part in parts), ckpt_path=path)
    assert torch.equal(*(model.score_matrices["nll"].compute() for model in (straight, resumed)))
    for name, parameter in weights(straight).items():
        assert torch.equal(parameter, weights(resumed)[name]), name


# ------------------------------------------------------------------ signals


class SignalAt(Callback):
    """Sends this process a signal in the midst of a step, or of what follows the last one of a task."""

    def __init__(self, number, step, at_boundary=False):
        self.number, self.step, self.at_boundary = number, step, at_boundary

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step and not self.at_boundary:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and self.at_boundary:
            os.kill(os.getpid(), self.number)


def fit(folder, files, run_dir, *callbacks, ckpt_path=None, **options):
    model, data = build(folder, files[:2])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = trainer_for(data, run_dir, [*callbacks, StopOnSignal()], plugins=[AtomicCheckpointIO()], **options)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    finally:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return model


# Task 1 takes steps 6 to 11. With two batches accumulated, the run has half as many steps, each epoch one.
@pytest.mark.parametrize(
    ("number", "step", "at_boundary", "accumulate", "stopped_after"),
    [
        (signal.SIGTERM, 6, True, 1, 7),
        (signal.SIGINT, 1, False, 2, 2),
        *slow((signal.SIGTERM, 2, False, 1, 3), (signal.SIGINT, 5, False, 1, 6)),
    ],
)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_from_there(
    dropout_folder, task_files, tmp_path, knowing, number, step, at_boundary, accumulate, stopped_after
):
    straight = fit(dropout_folder, task_files, tmp_path / "straight", attribution(), accumulate_grad_batches=accumulate)
    stopping = SignalAt(number, step, at_boundary)
    with pytest.raises(SystemExit) as exit_info:
        fit(dropout_folder, task_files, tmp_path, attribution(), stopping, accumulate_grad_batches=accumulate)
    assert exit_info.value.code == 128 + number
    path = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert look_into(path)["global_step"] == stopped_after
    options = {"ckpt_path": path, "accumulate_grad_batches": accumulate}
    resumed = fit(dropout_folder, task_files, tmp_path, attribution(), **options)
    for name, parameter in weights(straight).items():
        assert torch.equal(parameter, weights(resumed)[name]), name
    assert not path.exists()


def test_a_signal_before_training_saves_nothing(llama_folder, task_files, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        fit(llama_folder, task_files, tmp_path, SignalAt(signal.SIGTERM, 0, at_boundary=True))
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_interrupt_stops_at_once(llama_folder, task_files, tmp_path):
    twice = [SignalAt(signal.SIGINT, 2), SignalAt(signal.SIGINT, 2)]
    with pytest.raises(SystemExit):  # Lightning's answer to a KeyboardInterrupt
        fit(llama_folder, task_files, tmp_path, *twice)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_interrupt_before_training_is_no_traceback(monkeypatch):
    from agcl import cli, lightning_cli

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lightning_cli, "run", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["fit"])
    assert exit_info.value.code == 128 + signal.SIGINT
