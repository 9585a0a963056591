"""``agcl report RUN_DIR``: a run as one page to read and to send on."""

from pathlib import Path

from agcl.errors import AgclError


def report(run_dir: Path, *, output: Path | None = None, no_importance: bool = False, overwrite: bool = False) -> None:
    """Write a run's scores, curves, importance, answers and configuration as one HTML page, usable without a network.

    Without an output, score_matrix.png is drawn in the run's folder too: a run does so itself only at its end.

    Args:
        run_dir: The run's folder, which holds scores.json.
        output: The page to write (default: report.html in the run's folder, replaced if it is there).
        no_importance: Leave out what takes reading all importance files: seconds for each hundred million weights.
        overwrite: Replace the output if it exists.

    Raises:
        AgclError: If there is no run in the folder, one of its files is damaged, or the output exists already.
    """
    # Loads matplotlib and jinja2, which other commands do without.
    from agcl.reporting import write_report, write_score_matrix

    if output is not None and output.exists() and not overwrite:
        raise AgclError(f"{output} exists; choose another name, or add --overwrite.")
    path = run_dir / "report.html" if output is None else output
    missing = write_report(run_dir, path, with_importance=not no_importance)
    if output is None:
        write_score_matrix(run_dir)
    for sentence in missing:
        print(f"Missing: {sentence}")
    print(f"The report is {path}")
