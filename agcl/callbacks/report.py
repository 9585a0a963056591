"""What a run leaves behind: score matrix and metrics as table, JSON, CSV and picture, answers, and the final model."""

import csv
import io
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

import agcl
from agcl.callbacks.hyperparameters import seed_given
from agcl.callbacks.run_folder import run_folder
from agcl.errors import AgclError
from agcl.files import replacing_folder, write_whole
from agcl.metrics.figure import score_matrix_picture
from agcl.module import NLL, SCORE
from agcl.recovery import recovery_means

_NAMED_COLUMNS = 7  # tasks whose names and scores fit into a terminal of 80 columns


class ContinualReport(Callback):
    """Writes the run's results to its folder after each task, and prints them and saves the model at the end.

    ``scores.json`` holds everything, ``scores.csv`` the score matrix, ``answers.json`` what the model answered to some
    of each task's rows at each scoring. At the end come ``score_matrix.png`` and ``model/``, the final model in Hugging
    Face format. Each file is replaced whole, so that an interrupted run keeps the last complete one. ``agcl report``
    makes a page of them at any time, and the picture too.

    Args:
        save_model: Whether to write ``model/``.
        num_answers: Of so many rows of each task, the first ones to be scored, ``answers.json`` has prompt and answers,
            long ones shortened; 0 writes no such file. (On several devices, of the rows of the first one.)

    Raises:
        AgclError: If ``num_answers`` is negative.
    """

    def __init__(self, save_model: bool = True, num_answers: int = 20) -> None:
        if num_answers < 0:
            raise AgclError(f"`num_answers` is {num_answers}; give a number of rows, or 0 to keep no answers.")
        self.save_model = save_model
        self.num_answers = num_answers
        self._seconds_before = 0.0
        self._processor_seconds_before = 0.0
        self._extra_bytes = 0
        self._trainable_weights = 0
        self._is_finished = False
        self._start = time.monotonic()
        self._processor_start = time.process_time()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier run (what is resumed is loaded after this)."""
        self._seconds_before = self._processor_seconds_before = 0.0
        self._extra_bytes = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clocks; ask for answers; count the weights to train, before a method freezes some for a while."""
        self._is_finished = False
        self._start = time.monotonic()
        self._processor_start = time.process_time()
        pl_module.num_answers = self.num_answers
        self._trainable_weights = sum(p.numel() for p in pl_module.model.parameters() if p.requires_grad)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the results so far after each task."""
        if pl_module.ends_task:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write and print the final results; draw the score matrix, once; save the model."""
        folder, results = self._write(trainer, pl_module)
        if trainer.is_global_zero:
            write_whole(folder / "score_matrix.png", score_matrix_picture(results))
        if self.save_model and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _save_model(trainer, pl_module, folder / "model")
        if trainer.is_global_zero:
            _show(folder, results)
        self._is_finished = True

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Resumed after the last step, Lightning ends without ending the training: make up for it."""
        if not self._is_finished:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run reports the sum or maximum of: wall and processor time so far, in seconds; extra bytes."""
        return {
            "wall_seconds": self._wall_seconds(),
            "processor_seconds": self._processor_seconds(),
            "extra_bytes": self._extra_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore what the run that is resumed has used."""
        self._seconds_before = state_dict["wall_seconds"]
        self._processor_seconds_before = state_dict["processor_seconds"]
        self._extra_bytes = int(state_dict["extra_bytes"])

    def _wall_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start

    def _processor_seconds(self) -> float:
        """Of this process's threads; waiting for a busy machine adds nothing to it."""
        return self._processor_seconds_before + time.process_time() - self._processor_start

    def _write(self, trainer: Trainer, pl_module: Any) -> tuple[Path, dict[str, Any]]:
        results = collect_results(trainer, pl_module)  # on all ranks: metrics are synchronised
        results["trainable_weights"] = self._trainable_weights
        results["wall_seconds"] = round(self._wall_seconds(), 1)
        results["processor_seconds"] = round(self._processor_seconds(), 1)
        results["peak_memory_bytes"] = _peak_memory_bytes(trainer.strategy.root_device)
        self._extra_bytes = max(self._extra_bytes, _extra_bytes(trainer))  # some let go of it before training ends
        results["extra_bytes_per_weight"] = self._extra_bytes / sum(p.numel() for p in pl_module.model.parameters())
        folder = run_folder(trainer)  # on all ranks too: it is broadcast
        if trainer.is_global_zero:
            write_results(folder, results)
            if answers := pl_module.answers.as_dict():
                write_whole(folder / "answers.json", json.dumps(answers, indent=1, ensure_ascii=False))
        return folder, results


def _save_model(trainer: Trainer, pl_module: Any, folder: Path) -> None:
    """On all ranks, since weights that are split over them are gathered; the first one writes."""
    if trainer.is_global_zero:
        with replacing_folder(folder) as partial:
            pl_module.save_pretrained(partial)
    else:
        pl_module.save_pretrained(folder, is_writer=False)


def _show(folder: Path, results: dict[str, Any]) -> None:
    console = Console()
    for table in result_tables(results):
        console.print(table)
    console.print(f"Everything is in {folder}")


def collect_results(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    """Score matrices (rows: before training, then after each task), metrics, tasks and versions, as plain values.

    The data module and any callback may add to them by a method ``results() -> dict[str, Any]``, called on all ranks.
    """
    matrices = {name: _rows(matrix.compute()) for name, matrix in pl_module.score_matrices.items()}
    results = {
        "regime": pl_module.tasks.regime,
        "tasks": [task.name for task in pl_module.tasks],
        "task_metrics": [task.metric for task in pl_module.tasks],
        "metrics": {name: _number(value.item()) for name, value in pl_module.transfer().items()},
        "scores": matrices.pop(SCORE),
        "nll": matrices.pop(NLL),
        "probes": matrices,
        "model": pl_module.model_name_or_path,
        "quantization_config": pl_module.quantization_config,
        "precision": str(trainer.precision),
        "seed": seed_given(),
        "environment": _environment(trainer),
        "versions": {
            "agcl": agcl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning.__version__,
        },
    }
    for part in (trainer.datamodule, *trainer.callbacks):  # type: ignore[attr-defined]
        if callable(getattr(part, "results", None)):
            results |= part.results()
    return results


def _environment(trainer: Trainer) -> dict[str, Any]:
    """What the run's speed and the last digits of its numbers depend on, beside the versions."""
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type} ({platform.machine()})",
        "num_devices": trainer.world_size,
        "num_threads": torch.get_num_threads(),
    }


def _extra_bytes(trainer: Trainer) -> int:
    """What the method keeps beside the model at this moment: callbacks and data module say so in ``extra_bytes()``."""
    keepers = [*trainer.callbacks, trainer.datamodule]  # type: ignore[attr-defined]
    return sum(keeper.extra_bytes() for keeper in keepers if hasattr(keeper, "extra_bytes"))


def _peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory of this process so far: allocated on its GPU, else resident; ``None`` where it is not known.

    A resumed run counts from where it went on.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``scores.json`` and ``scores.csv``."""
    write_whole(folder / "scores.json", json.dumps(results, indent=2, ensure_ascii=False))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["after", *results["tasks"]])
    for label, row in _labelled_rows(results):
        writer.writerow([label, *("" if value is None else value for value in row)])
    write_whole(folder / "scores.csv", text.getvalue())


def result_tables(results: dict[str, Any]) -> list[Table]:
    """Rich tables of the score matrix and the metrics; of many tasks the columns are numbered and hold per cent."""
    title, names = "Score of each task (column) before training and after learning each task (row)", results["tasks"]
    is_wide = len(names) > _NAMED_COLUMNS
    narrow: dict[str, Any] = {"title": f"{title}, in %", "box": None, "padding": (0, 1, 0, 0)}
    matrix = Table(**narrow) if is_wide else Table(title=title)
    matrix.add_column("after", style="bold")
    for number, name in enumerate(names, start=1):
        matrix.add_column(str(number) if is_wide else name, justify="right")
    for position, (label, row) in enumerate(_labelled_rows(results)):
        cells = ["" if value is None else f"{100 * value:.0f}" if is_wide else f"{value:.3f}" for value in row]
        if position > 0 and results["regime"] != "joint":
            cells[position - 1] = f"[bold]{cells[position - 1]}[/bold]"  # the task just learned
            label = f"{position} {label}" if is_wide else label
        matrix.add_row(label, *cells)
    metrics = Table(title="Continual-learning metrics")
    metrics.add_column("metric")
    metrics.add_column("value", justify="right")
    for name, value in results["metrics"].items():
        metrics.add_row(name.replace("_", " "), "undefined" if value is None else f"{value:+.3f}")
    for name, value in recovery_means(results).items():
        metrics.add_row(f"old tasks: {name.replace('_', ' ')}", f"{value:.3f}")
    return [matrix, metrics]


def _labelled_rows(results: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """Rows of the score matrix with what had been learned by then; joint training has no moment between two tasks."""
    scores = results["scores"]
    if results["regime"] == "joint":
        return [("before", scores[0]), ("joint", scores[-1])]
    return list(zip(["before", *results["tasks"]], scores, strict=True))


def _rows(matrix: torch.Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in matrix.tolist()]


def _number(value: float) -> float | None:
    """JSON has no NaN: what was not measured is null."""
    return None if math.isnan(value) else value
