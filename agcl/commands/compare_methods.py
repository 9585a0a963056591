"""``agcl compare --config FILE``: continual-learning methods side by side, each tuned with as many trials."""

from pathlib import Path

from rich.console import Console

from agcl.compare import compare_methods as run_comparison
from agcl.compare import read_comparison


def compare_methods(*, config: Path, report_only: bool = False, data_dir: str | None = None) -> int:
    """Compare continual-learning methods over seeds, each tuned with the same number of trials.

    Args:
        config: The comparison's YAML file, or a built-in one, such as builtin:compare/quickstart.
        report_only: Run nothing, and make the tables from the runs that are there.
        data_dir: Folder that the tasks' relative files are taken from, for all runs: ``data.data_dir`` of ``agcl fit``.

    Returns:
        Exit status: 1 if a run failed or is missing, else 0.

    Raises:
        AgclError: If the file, or a configuration that it names, cannot work.
    """
    comparison = read_comparison(config)
    if data_dir is not None:
        comparison.settings["data.data_dir"] = data_dir
    record = run_comparison(comparison, Console(highlight=False), report_only=report_only)
    return 1 if record["failures"] or record["missing"] else 0
