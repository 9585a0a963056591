"""The page: what it shows of a run, put into its template."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex

from agcl.files import write_whole
from agcl.heatmaps import DARK_BELOW
from agcl.metrics.figure import score_matrix_picture
from agcl.reporting import sections
from agcl.reporting.outcome import examples, task_outcomes
from agcl.reporting.record import RunRecord, read_run
from agcl.results import METRIC_MEANINGS, read_results
from agcl.version import __version__


def write_report(run_dir: Path, path: Path, with_importance: bool = True) -> list[str]:
    """Write a run's page.

    Args:
        run_dir: The run's folder, which holds ``scores.json``.
        path: The page; replaced whole.
        with_importance: Whether to read the importance files through.

    Returns:
        A sentence on each thing that could not be shown, which the page says too.

    Raises:
        AgclError: If there is no run in the folder, or one of its files is damaged.
    """
    record = read_run(run_dir)
    write_whole(path, render(record, with_importance))
    return record.missing


def write_score_matrix(run_dir: Path) -> Path:
    """Draw ``score_matrix.png`` into a run's folder from its ``scores.json``; the run itself does so at its end.

    Args:
        run_dir: The run's folder.

    Returns:
        The picture, replaced whole.

    Raises:
        AgclError: If there is no run in the folder.
    """
    path = run_dir / "score_matrix.png"
    write_whole(path, score_matrix_picture(read_results(run_dir)))
    return path


def render(record: RunRecord, with_importance: bool = True) -> str:
    """The page's HTML, self-contained; what it lacks is added to ``record.missing``."""
    importance = sections.importance(record, with_importance)
    environment = Environment(
        loader=PackageLoader("agcl.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score, "signed": signed, "heat": heat_style}
    return environment.get_template("report.html").render(
        run=record,
        name=record.folder.resolve().parent.name + "/" + record.folder.resolve().name,
        metrics=[(n.replace("_", " "), record.results["metrics"].get(n), text) for n, text in METRIC_MEANINGS.items()],
        matrices=sections.matrices(record),
        outcomes=task_outcomes(record),
        examples=examples(record),
        curves=sections.curves(record),
        importance=importance,
        plasticity=sections.plasticity(record, importance["summary"], with_importance),
        cost=sections.cost(record.results),
        version=__version__,
    )


def score(value: float | None) -> str:
    """Three digits; a dash for what was not measured."""
    return "\u2013" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """The same, with its sign."""
    return "\u2013" if value is None else f"{value:+.3f}".replace("-", "\u2212")


def heat_style(value: float | None) -> str:
    """Colours of a matrix's cell, as in the figures: viridis from 0 to 1, and text that is read on it."""
    if value is None:
        return ""
    place = min(max(value, 0.0), 1.0)
    return f"background:{to_hex(colormaps['viridis'](place))};color:{'#fff' if place < DARK_BELOW else '#000'}"
