"""The runs as tasks of a Ray cluster (the extra ``agcl[ray]``)."""

from collections.abc import Sequence

from agcl.compare.processes import Report, start, stop
from agcl.compare.runs import Run
from agcl.compare.settings import Comparison
from agcl.errors import AgclError


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

    threads = comparison.threads
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}

    @ray.remote(num_cpus=threads or 1, num_gpus=comparison.gpus_per_run, max_retries=0)
    def execute(run: Run, command: list[str]) -> int:
        process = start(run, command, environment)
        try:
            return process.wait()
        finally:
            stop([process])

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        pending = {}
        for run in runs:
            try:
                command = run.prepare()
            except AgclError as error:
                report(run, None, str(error))
                continue
            pending[execute.remote(run, command)] = run
            report(run, command, None)
        while pending:
            (done,), _ = ray.wait(list(pending))
            run = pending.pop(done)
            try:
                report(run, None, run.conclude(ray.get(done), comparison.keep_models))
            except ray.exceptions.RayError as error:
                report(run, None, run.fail(" ".join(str(error).split())))
    finally:
        ray.shutdown()
