"""Runs of ``agcl fit --resume auto`` in processes of their own that are killed at some moment, for `test_faults.py`."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from helpers import write_config
from matplotlib.figure import Figure

from agcl.callbacks import monitor, report
from agcl.cli import main
from agcl.module import ContinualLM

fork = multiprocessing.get_context("fork")


def config_for(folder, files, run_dir, epochs, **overrides):
    """Checkpoints inside of epochs, at their last batches, and at their ends."""
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    callbacks = [
        {"class_path": "agcl.AttributionCallback", "init_args": {"num_samples": 2}},
        {**saving, "init_args": {"every_n_train_steps": 3}},
        {**saving, "init_args": {"filename": "last", "enable_version_counter": False}},
    ]
    run_dir.mkdir(exist_ok=True)
    lengths = {f"data__tasks__{index}__epochs": epochs for index in range(len(files))}
    options = {
        "trainer__enable_checkpointing": True,
        "trainer__enable_progress_bar": False,
        "trainer__callbacks": callbacks,
        **lengths,
        **overrides,
    }
    return write_config(folder, files, run_dir, **options)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    """Counts a run's moments: training steps, samples attributed, writing, syncing, renaming and deleting of files."""

    def __init__(self, last=None, action=kill):
        self.count, self.last, self.action = 0, last, action

    def passes(self):
        self.count += 1
        if self.count == self.last:
            self.action()

    def watch(self, owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.passes()
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def watch_all(self):
        """In this process, which is to be thrown away."""
        from agcl.attribution import relevance

        relevance.is_correct = lambda *args: True  # a tiny model seldom knows a row by heart
        empty = Figure(figsize=(1, 1))  # pictures take longer than all the rest
        report.score_matrix_picture = lambda results: b""
        for name in ("score_matrix", "importance_map", "plasticity"):
            setattr(monitor, f"plot_{name}", lambda *args, **kwargs: (empty, None))
        watched = [(ContinualLM, "training_step"), (relevance, "is_correct"), (os, "fsync"), (Path, "replace")]
        for owner, name in [*watched, (Path, "unlink"), (os, "rename"), (os, "remove")]:
            self.watch(owner, name)
        save = torch.save

        def save_in_halves(content, file):
            buffer = io.BytesIO()
            save(content, buffer)
            whole = buffer.getvalue()
            file.write(whole[: len(whole) // 2])
            file.flush()
            self.passes()
            file.write(whole[len(whole) // 2 :])

        torch.save = save_in_halves


def run_forked(path, *arguments, moments=None):
    """Run in a fork of this process, which has imported everything. Gives exit status, output, and moments passed."""
    receiver, sender = fork.Pipe(duplex=False)
    log = path.parent / f"log{time.monotonic_ns()}.txt"
    process = fork.Process(target=_forked, args=(path, arguments, moments or Moments(), log, sender))
    process.start()
    process.join()
    return process.exitcode, log.read_text(), receiver.recv() if receiver.poll() else None


def _forked(path, arguments, moments, log, sender):
    output = log.open("w")
    sys.stdout = sys.stderr = output
    os.dup2(output.fileno(), 2)
    sys.argv = ["agcl"]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    moments.watch_all()
    try:
        main(["fit", "--config", str(path), "--resume", "auto", *arguments])
    finally:
        sender.send(moments.count)
        output.flush()


def run_process(path, kill_after=None):
    """Run as users do; if so wanted, killed so many seconds after its model was loaded.

    Gives exit status, and the seconds from then to the end.
    """
    log = path.parent / f"log{time.monotonic_ns()}.txt"
    command = [sys.executable, "-m", "agcl", "fit", "--config", str(path), "--resume", "auto"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    while process.poll() is None and "Total params" not in log.read_text(errors="replace"):
        time.sleep(0.01)
    start = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(kill_after)
    process.kill()
    return process.wait(), time.monotonic() - start
