"""One run of a comparison: its command, and what its folder says."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from agcl.compare.settings import Values
from agcl.configurations import resolve_configuration
from agcl.errors import AgclError, one_line
from agcl.files import write_whole
from agcl.results import read_json

STARTED, FINISHED, FAILED = "started", "finished", "failed"
_LARGE = ("model", "checkpoints", "importance")
_ERROR_LINE = re.compile(r"(agcl: )?error: |[\w.]*(Error|Exception|Interrupt|Exit)\b")
_LONGEST_ERROR = 400


@dataclass(frozen=True)
class Run:
    """One ``agcl fit`` with a folder of its own.

    Args:
        method: Its method's name.
        values: The trial's hyper-parameters.
        seed: Seed of everything random.
        order: Name of the order of tasks, or ``None``.
        configs: Configurations, the first one lowest.
        config: What is laid over them, the run's folder included.
        folder: Its name tells method, trial and seed, and ends in a digest of all that determines the run. So a run is
            found again if nothing has changed, and never taken for another.
        contents: Digest of the configurations' contents when the run was planned.
    """

    method: str
    values: Values
    seed: int
    order: str | None
    configs: tuple[str, ...]
    config: dict[str, Any]
    folder: Path
    contents: str

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder / "log.txt"

    @property
    def label(self) -> str:
        """For people: method, trial, seed and order."""
        order = "" if self.order is None else f", order {self.order}"
        return f"{self.method} ({values_text(self.values)}), seed {self.seed}{order}"

    def command(self) -> list[str]:
        """The command line; to repeat it by hand, add ``--trainer.logger.init_args.save_dir`` with another folder."""
        files = (*self.configs, str(self.folder / "run.yaml"))
        return [sys.executable, "-m", "agcl", "fit", *(word for file in files for word in ("--config", file))]

    def state(self) -> dict[str, Any]:
        """``state`` (started, finished, failed) and ``error``; empty if it was never started."""
        try:
            return read_json(self.folder / "state.json")
        except FileNotFoundError:
            return {}

    def set_state(self, state: str, error: str | None = None) -> None:
        """Write down how far the run has come."""
        content = {"state": state, "error": error, "command": self.command(), "values": self.values}
        write_whole(self.folder / "state.json", json.dumps(content, indent=2))

    def results(self) -> dict[str, Any] | None:
        """What ``scores.json`` says, or ``None`` if the run has not finished."""
        return self._scores() if self.state().get("state") == FINISHED else None

    def prepare(self) -> list[str]:
        """Make the folder ready and give the command: an interrupted run goes on, every other one starts afresh.

        Raises:
            AgclError: If a configuration has changed since the run was planned.
        """
        if digest([read_config(path) for path in self.configs]) != self.contents:
            raise AgclError(f"{', '.join(self.configs)}: changed since the comparison began; start it again.")
        goes_on = self.state().get("state") == STARTED and any(self.folder.rglob("*.ckpt"))
        if not goes_on:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "run.yaml", yaml.safe_dump(self.config, sort_keys=False))
        self.set_state(STARTED)
        return [*self.command(), *(["--resume", "auto"] if goes_on else [])]

    def conclude(self, status: int, keep_models: bool) -> str | None:
        """Write down the outcome of the process that ended with this exit status; give the error, if there is one."""
        results = self._scores()
        error = None
        if status:
            error = f"ended by signal {-status}" if status < 0 else self._last_error() or f"exit status {status}"
        elif results is None or all(score is None for score in results["scores"][-1]):
            error = "no scores after the last task"
        if error is None and not keep_models:
            for name in _LARGE:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.set_state(FAILED if error else FINISHED, error)
        return error

    def fail(self, error: str) -> str:
        """Write down that the run could not be carried out, and why."""
        self.set_state(FAILED, error)
        return error

    def _scores(self) -> dict[str, Any] | None:
        try:
            return read_json(self.folder / "scores.json")
        except FileNotFoundError:
            return None

    def _last_error(self) -> str | None:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        starts = [number for number, line in enumerate(lines) if _ERROR_LINE.match(line)]
        return " ".join(lines[starts[-1] if starts else -1 :])[:_LONGEST_ERROR] or None


def values_text(values: Mapping[str, Any]) -> str:
    """Values by the last part of their key, which is enough for people: ``lr=0.0001, strength=2``."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items()) or "as configured"


def digest(content: Any) -> str:
    """Eight hexadecimal digits that tell contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def read_config(path: str) -> dict[str, Any]:
    """A configuration file, or a built-in one by its name, as plain values.

    Raises:
        AgclError: If it is not there or is no mapping.
    """
    try:
        content = get_loader("yaml")(
            Path(resolve_configuration(path)).read_text(encoding="utf-8")
        )  # as `agcl fit` reads it: 1e-4 is a number
    except (OSError, yaml.YAMLError) as error:
        raise AgclError(f"The configuration {path} cannot be read: {one_line(error, None)}") from error
    if not isinstance(content, dict):
        raise AgclError(f"The configuration {path} holds no keys and values.")
    return content
