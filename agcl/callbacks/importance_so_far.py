"""The importance of the tasks so far: each in a file of its own, all of them merged in memory."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from agcl.attribution.artefact import open_importance, save_importance
from agcl.attribution.levels import Bits
from agcl.attribution.merging import How, RunningMerge
from agcl.callbacks.gathering import Gathered
from agcl.callbacks.run_folder import run_folder
from agcl.errors import AgclError

Place = Literal["device", "host"]


class ImportanceSoFar:
    """What a run knows of its tasks' importance.

    Args:
        merge: See :mod:`agcl.attribution.merging`.
        bits: Of all importance, in memory and in files.
        place: Where the merged importance is held: beside the weights, or in host memory.
        needs_files: Whether files are read again, so that a run cannot go on without them.
    """

    def __init__(self, merge: How, bits: Bits, place: Place, needs_files: bool) -> None:
        self.files: dict[str, str] = {}
        self._merged = RunningMerge(merge, bits)
        self._place = place
        self._needs_files = needs_files

    def merged(self) -> dict[str, Tensor]:
        """Parameter name to fixed point; empty before the first task."""
        return self._merged.importance()

    def take_in(self, trainer: Trainer, stem: str, gathered: Gathered) -> None:
        """Write one task's importance to ``importance/<stem>.safetensors`` and merge it; its tensors are given up."""
        path = _folder(trainer) / f"{stem}.safetensors"
        if trainer.is_global_zero:
            save_importance(path, gathered.importance, gathered.metadata)
        self.files[gathered.metadata["task"]] = str(path)
        home = self._home(trainer)
        for name in list(gathered.importance):
            gathered.importance[name] = gathered.importance[name].to(home)
        self._merged.update(gathered.importance)

    def take_in_again(self, trainer: Trainer, task: str) -> None:
        """Merge a task's importance as its file has it, read a tensor at a time; nothing, if it has none."""
        if task in self.files:
            self._merged.update(open_importance(self.files[task], self._home(trainer)))

    def merge_anew(self) -> None:
        """Forget the merge, not the files."""
        self._merged = RunningMerge(self._merged.how, self._merged.bits)

    def bring_along(self, trainer: Trainer) -> None:
        """On resuming: have the earlier tasks' files in this run's folder, and the merge where it belongs.

        Raises:
            AgclError: If a file that is needed is gone.
        """
        self._merged.to(self._home(trainer))
        folder = _folder(trainer)
        for path in self.files.values():
            copy = folder / Path(path).name
            if not copy.exists() and trainer.is_global_zero and Path(path).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        trainer.strategy.barrier()
        for task, path in self.files.items():
            copy = folder / Path(path).name
            if copy.exists():
                self.files[task] = str(copy)
            elif self._needs_files:
                raise AgclError(
                    f"The importance file of task `{task}` is gone: {path}. Resuming with `reestimate` needs it."
                )
            else:
                rank_zero_warn(
                    f"The importance file of task `{task}` is gone: {path}. The run itself does not need it."
                )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; the tensors are not copied."""
        return {"merged": self._merged.state_dict(), "files": dict(self.files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            AgclError: If it was merged in another way, or in other bits.
        """
        self._merged.load_state_dict(state_dict["merged"])
        self.files = dict(state_dict["files"])

    def _home(self, trainer: Trainer) -> torch.device:
        return torch.device("cpu") if self._place == "host" else trainer.strategy.root_device


def _folder(trainer: Trainer) -> Path:
    return run_folder(trainer) / "importance"
