"""Several runs at a time, each a process of its own on its own devices."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agcl.compare.runs import Run
from agcl.compare.settings import Comparison
from agcl.errors import AgclError

Report = Callable[[Run, list[str] | None, str | None], None]
"""Called with a run and its command when it starts, and with ``None`` and its error, if it has one, when it ends."""

POLL_SECONDS = 0.2
_GRACE_SECONDS = 10


def run_in_processes(runs: Sequence[Run], comparison: Comparison, report: Report) -> None:
    """Run all; a failed one is reported and the others go on. However this ends, no process is left."""
    waiting, free = deque(runs), deque(slots(comparison))
    active: dict[subprocess.Popen, tuple[Run, dict[str, str]]] = {}
    with terminable():
        try:
            while waiting or active:
                while waiting and free:
                    run, slot = waiting.popleft(), free.popleft()
                    try:
                        command = run.prepare()
                    except AgclError as error:
                        report(run, None, str(error))
                        free.append(slot)
                        continue
                    active[start(run.log, command, slot)] = (run, slot)
                    report(run, command, None)
                for process in [process for process in active if process.poll() is not None]:
                    run, slot = active.pop(process)
                    free.append(slot)
                    report(run, None, run.conclude(process.returncode, comparison.keep_models))
                time.sleep(POLL_SECONDS)
        finally:
            stop(list(active))


def slots(comparison: Comparison) -> list[dict[str, str]]:
    """Environment variables that pin the runs at a time to their devices and threads."""
    shared = environment(comparison)
    if not comparison.devices:
        return [shared for _ in range(comparison.parallel or 1)]
    devices = comparison.devices[: comparison.parallel]
    return [{**shared, "CUDA_VISIBLE_DEVICES": str(device)} for device in devices]


def environment(comparison: Comparison) -> dict[str, str]:
    """Environment variables that all runs get."""
    return {"OMP_NUM_THREADS": str(comparison.threads)} if comparison.threads else {}


def start(
    log: Path, command: Sequence[str], variables: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen:
    """Start a process in a session of its own, so that it can be stopped with all its workers.

    Args:
        log: Its output is appended to this file.
        command: The command line.
        variables: Environment variables beside those of this process.
        folder: Its working directory; this process's if left out.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and their workers: ask, wait a little, then insist."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, sign)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def terminable() -> Iterator[None]:
    """Let a request to terminate (``kill``, a batch system) clean up as Ctrl-C does."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
