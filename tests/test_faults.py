"""A run that is killed, stopped, or out of disk, and gone on with, ends as if nothing had happened."""

import random
import shutil
import signal

import pytest
from conftest import save_tiny_model
from killing import Moments, config_for, run_forked, run_process

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
    while kills:
        shutil.rmtree(config.parent / "run", ignore_errors=True)
        while True:
            is_killed = start(kills > 0)
            if not is_killed:
                break
            kills -= 1
        # Killed before its first checkpoint, it has begun again in a folder of its own.
        assert_same(max((config.parent / "run").iterdir()), expected)


def test_killed_at_three_random_moments_the_run_ends_with_the_same_weights(
    dropout_folder, task_files, tmp_path, straight
):
    expected, num_moments = straight
    config = config_for(dropout_folder, task_files[:2], tmp_path / "killed", epochs=2)
    choice = random.Random(0)

    def start(may_kill):
        moment = choice.randrange(1, num_moments // 2) if may_kill else None
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

    def start(may_kill):
        status, _ = run_process(config, random.uniform(0, seconds) if may_kill else None)
        assert status in (0, -signal.SIGKILL)
        return status != 0

    killed_until_done(config, start, 20, expected)
