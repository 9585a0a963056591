"""What a run's folder holds, read for a page; what is not there is named."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agcl.attribution.artefact import ImportanceFile, importance_files
from agcl.configurations import all_callbacks
from agcl.errors import AgclError, one_line
from agcl.reporting.losses import Curve, training_losses
from agcl.results import read_json, read_results


@dataclass
class RunRecord:
    """A run, as its folder tells it.

    Attributes:
        folder: Where it was read from.
        results: What ``scores.json`` says.
        answers: What ``answers.json`` says: task to rows; empty if it is not there.
        config_text: The configuration as it was saved; None if it is not there.
        config: The same, parsed.
        importance: Task to its importance file, in the order of learning.
        losses: Task to its training loss over the steps.
        missing: A sentence on each thing that the page cannot show, and why.
    """

    folder: Path
    results: dict[str, Any]
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, ImportanceFile] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Names in the order of learning."""
        return self.results["tasks"]

    @property
    def is_joint(self) -> bool:
        """Whether all tasks were learned together."""
        return self.results["regime"] == "joint"

    @property
    def num_learned(self) -> int:
        """Number of tasks learned so far: the last row of the score matrix that was measured."""
        scored = [index for index, row in enumerate(self.results["scores"]) if any(v is not None for v in row)]
        return scored[-1] if scored else 0

    @property
    def gate(self) -> dict[str, Any] | None:
        """Arguments of the run's ``AttributionCallback``; None if it has none, or the configuration is not there."""
        for callback in all_callbacks(self.config):
            if str(callback.get("class_path", "")).endswith("AttributionCallback"):
                return callback.get("init_args") or {}
        return None


def read_run(folder: Path) -> RunRecord:
    """Read what a run left.

    Args:
        folder: The run's folder, which holds ``scores.json``.

    Raises:
        AgclError: If it is not a run's folder, or a file in it cannot be read.
    """
    record = RunRecord(folder, read_results(folder))
    answers, config = folder / "answers.json", folder / "config.yaml"
    if answers.exists():
        record.answers = read_json(answers)
    else:
        record.missing.append(
            "Answers: there is no answers.json. ContinualReport writes it as the run goes on, unless num_answers is 0; "
            "runs made before it did so have none."
        )
    if config.exists():
        record.config_text = config.read_text(encoding="utf-8")
        record.config = _parsed_yaml(config, record.config_text)
    else:
        record.missing.append("Configuration: there is no config.yaml; the command line (agcl fit) saves one.")
    record.importance = _importance_files(record)
    if not record.importance and record.gate is not None:
        record.missing.append("Importance: the run has an AttributionCallback, but no importance file is there (yet).")
    record.losses = training_losses(folder)
    if not record.losses:
        record.missing.append("Training loss: neither TensorBoard's events nor a CSVLogger's metrics.csv has it.")
    if not record.results.get("environment"):
        record.missing.append("Environment: the run noted versions, but not yet its platform and device.")
    if record.num_learned < len(record.tasks):
        learned, total = record.num_learned, len(record.tasks)
        record.missing.append(f"The run is not finished, or was cut off: {learned} of {total} tasks are learned.")
    return record


def _parsed_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AgclError(f"{path} is not valid YAML ({one_line(error, None)}).") from error
    return parsed if isinstance(parsed, dict) else {}


def _importance_files(record: RunRecord) -> dict[str, ImportanceFile]:
    """Each task's own file, as it was when the task was learned; later estimates are left out."""
    files = importance_files(record.folder / "importance")
    found = {file.metadata.get("task"): file for file in files if "reestimated_after" not in file.metadata}
    return {task: found[task] for task in record.tasks if task in found}


def as_float(value: float | None) -> float:
    """What was not measured is null in JSON and NaN here."""
    return math.nan if value is None else value
