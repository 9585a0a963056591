"""The importance of the tasks so far: each in a file of its own, all of them merged in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from agcl.attribution.artefact import ImportanceFile, LazyImportance, open_importance, save_importance
from agcl.attribution.levels import Bits
from agcl.attribution.merging import How, RunningMerge
from agcl.attribution.storage import Shape
from agcl.callbacks.gathering import Gathered
from agcl.callbacks.run_folder import run_folder
from agcl.errors import AgclError
from agcl.ranks import ALONE, Ranks
from agcl.shards import Layout, layouts

Place = Literal["device", "host"]


class _Gathered(LazyImportance):
    """Importance of which each process has its rows; all of them together ask for one tensor after the other."""

    def __init__(self, parts: Mapping[str, Tensor], shapes: Mapping[str, Shape], bits: Bits, ranks: Ranks) -> None:
        self.shapes, self.bits = {name: shapes[name] for name in sorted(parts)}, bits
        self._parts, self._ranks = parts, ranks

    def __getitem__(self, name: str) -> Tensor:
        return self._ranks.whole(self._parts[name], self.shapes[name])


class _Rows(LazyImportance):
    """This process's rows of what a file holds, read a tensor at a time."""

    def __init__(self, file: ImportanceFile, ranks: Ranks) -> None:
        self._file, self._ranks, self.bits = file, ranks, file.bits
        bounds = {name: ranks.rows(shape) for name, shape in file.shapes.items()}
        self.shapes = {name: (end - start, *file.shapes[name][1:]) for name, (start, end) in bounds.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._ranks.part(self._file[name]).clone()


class ImportanceSoFar:
    """What a run knows of its tasks' importance.

    Where the weights are split over processes, each holds its rows of the merged importance and no more. A tensor is
    whole for the moment in which it is written. A checkpoint then holds no importance: resuming reads the files.

    Args:
        merge: See :mod:`agcl.attribution.merging`.
        bits: Of all importance, in memory and in files.
        place: Where the merged importance is held: beside the weights, or in host memory.
        needs_files: Whether files are read again, so that a run cannot go on without them.
    """

    def __init__(self, merge: How, bits: Bits, place: Place, needs_files: bool) -> None:
        self.files: dict[str, str] = {}
        self._said: dict[str, dict[str, str]] = {}  # task: its file's metadata, which name the weights it is of
        self._merged = RunningMerge(merge, bits)
        self._place = place
        self._needs_files = needs_files
        self._ranks = ALONE  # of which each holds rows
        self._layouts: dict[str, Layout] = {}
        self._is_unread = False

    def merged(self) -> dict[str, Tensor]:
        """Parameter name to fixed point (as DTensors where the parameters are); empty before the first task."""
        importance = self._merged.importance()
        return {name: self._layouts[name].of_part(t) if name in self._layouts else t for name, t in importance.items()}

    def take_in(self, trainer: Trainer, stem: str, gathered: Gathered) -> None:
        """Write one task's importance to ``importance/<stem>.safetensors`` and merge it; its tensors are given up."""
        path = _folder(trainer) / f"{stem}.safetensors"
        self._write(trainer, path, gathered)
        self.files[gathered.metadata["task"]] = str(path)
        self._said[gathered.metadata["task"]] = dict(gathered.metadata)
        home = self._home(trainer)
        for name in list(gathered.importance):
            gathered.importance[name] = gathered.importance[name].to(home)
        self._merged.update(gathered.importance)

    def _write(self, trainer: Trainer, path: Path, gathered: Gathered) -> None:
        importance: Mapping[str, Tensor] = gathered.importance
        if self._ranks.size > 1:
            importance = _Gathered(importance, gathered.shapes, self._merged.bits, self._ranks)
        if trainer.is_global_zero:
            save_importance(path, importance, gathered.metadata)
        elif self._ranks.size > 1:
            for name in importance:  # in the order of writing
                importance[name]

    def take_in_again(self, trainer: Trainer, task: str) -> None:
        """Merge a task's importance as its file has it, read a tensor at a time; nothing, if it has none."""
        if task in self.files:
            file = open_importance(self.files[task], self._home(trainer))
            self._merged.update(file if self._ranks.size == 1 else _Rows(file, self._ranks))

    def begin_with(self, earlier: dict[str, Any]) -> None:
        """Have the merge of an earlier run go on, which was in one piece.

        Args:
            earlier: As its :meth:`state_dict` gave it.

        Raises:
            AgclError: If it was merged in another way, or in other bits.
        """
        self._merged.load_state_dict(earlier["merged"])

    def merge_anew(self) -> None:
        """Forget the merge, not the files."""
        self._merged = RunningMerge(self._merged.how, self._merged.bits)

    def bring_along(self, trainer: Trainer, model: nn.Module) -> None:
        """On resuming: have the earlier tasks' files in this run's folder, and the merge where it belongs.

        Args:
            trainer: Of the run.
            model: As it is trained, split over processes or not.

        Raises:
            AgclError: If a file that is needed is gone or damaged.
        """
        self._layouts = layouts(model)
        self._ranks = Ranks.of_this_run() if self._layouts else ALONE
        self._bring_files(trainer)
        if self.files and (self._is_unread or self._ranks.size > 1):
            self.merge_anew()
            for task in self.files:
                self.take_in_again(trainer, task)
        self._is_unread = False
        self._merged.to(self._home(trainer))

    def _bring_files(self, trainer: Trainer) -> None:
        folder = _folder(trainer)
        for task, path in self.files.items():
            copy = folder / Path(path).name
            if trainer.is_global_zero and self._problem(task, copy) and not self._problem(task, Path(path)):
                source = open_importance(path)
                save_importance(copy, source, source.metadata)
        trainer.strategy.barrier()
        for task, path in self.files.items():
            copy = folder / Path(path).name
            if not self._problem(task, copy):
                self.files[task] = str(copy)
                continue
            lost = f"The importance file of task `{task}` is lost: {self._problem(task, Path(path))}"
            if self._needs_files or self._is_unread or self._ranks.size > 1:
                raise AgclError(
                    f"{lost} Resuming with `reestimate` needs it, and so does resuming where the weights are split "
                    "over processes."
                )
            rank_zero_warn(f"{lost} The run itself does not need it.")

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; the tensors are not copied."""
        merged = self._merged.state_dict()
        if self._ranks.size > 1:
            merged["state"] = {}
        return {
            "merged": merged,
            "files": dict(self.files),
            "said": dict(self._said),
            "is_in_files": self._ranks.size > 1,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            AgclError: If it was merged in another way, or in other bits.
        """
        self._merged.load_state_dict(state_dict["merged"])
        self.files = dict(state_dict["files"])
        self._said = dict(state_dict["said"])
        self._is_unread = state_dict.get("is_in_files", False)

    def _problem(self, task: str, path: Path) -> str | None:
        """Why a file is of no use; None if it is whole and the one that was written."""
        try:
            metadata = open_importance(path).metadata
        except AgclError as error:
            return str(error)
        if self._said.get(task, {}).items() <= metadata.items():
            return None
        return f"{path} is not the file that this run wrote; put that one back."

    def _home(self, trainer: Trainer) -> torch.device:
        return torch.device("cpu") if self._place == "host" else trainer.strategy.root_device


def _folder(trainer: Trainer) -> Path:
    return run_folder(trainer) / "importance"
