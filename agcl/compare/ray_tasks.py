"""The runs as tasks of a Ray cluster (the extra ``agcl[ray]``)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agcl.compare.processes import POLL_SECONDS, Report, environment, start, stop, terminable
from agcl.compare.runs import Run
from agcl.compare.settings import Comparison
from agcl.errors import AgclError, one_line

_GRACE_SECONDS = 30


def run_on_ray(runs: Sequence[Run], comparison: Comparison, report: Report) -> None:
    """Run all, as many at a time as the cluster has CPUs and GPUs for; Ray pins each to its own.

    The cluster is the one that the environment names (``RAY_ADDRESS``), else this machine. Its machines must see the
    working directory, the configurations and ``output`` under the same paths.

    Raises:
        AgclError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise AgclError("`runner: ray` needs Ray: install `agcl[ray]`.") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    resources = {"num_cpus": comparison.threads or 1, "num_gpus": comparison.gpus_per_run}
    execute = ray.remote(max_retries=0, **resources)(_execute)
    pending: dict[Any, Run] = {}
    with terminable():  # after Ray has set up handlers of its own
        try:
            for run in runs:
                try:
                    command = run.prepare()
                except AgclError as error:
                    report(run, None, str(error))
                    continue
                task = execute.remote(run.log.absolute(), command, environment(comparison), Path.cwd())
                pending[task] = run
                report(run, command, None)
            while pending:
                (done,), _ = ray.wait(list(pending))
                run = pending.pop(done)
                try:
                    report(run, None, run.conclude(ray.get(done), comparison.keep_models))
                except ray.exceptions.RayError as error:
                    report(run, None, run.fail(one_line(error, None)))
        finally:
            for task in pending:
                ray.cancel(task)
            if pending:
                ray.wait(list(pending), num_returns=len(pending), timeout=_GRACE_SECONDS)
            ray.shutdown()


def _execute(log: Path, command: list[str], variables: dict[str, str], folder: Path) -> int:
    process = start(log, command, variables, folder)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)  # a cancelled task is interrupted here; a blocking wait would not be
        return process.returncode
    finally:
        stop([process])
