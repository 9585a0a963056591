"""Each task learned by itself: what the model could learn if it had nothing to keep."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from agcl.methods.interface import check_sequence


class SingleTask(Callback):
    """At each task's start the trainable weights are set back to the initial ones: the reference for plasticity.

    The diagonal of the score matrix then tells how well each task is learned alone, with the same data order, optimizer
    and schedule as in the sequence. The initial weights are kept in host memory and in the checkpoints.
    """

    def __init__(self) -> None:
        self._initial: dict[str, Tensor] = {}
        self._begun = -1  # the last task whose start was seen

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse joint training; forget an earlier run (what is resumed is loaded after this)."""
        check_sequence(self, pl_module)
        self._initial, self._begun = {}, -1

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the initial weights; on resuming they are known already."""
        if not self._initial:
            named = pl_module.model.named_parameters()
            self._initial = {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the weights back, if a task begins."""
        self._begin(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same where Lightning, on resuming, left the epoch's start out."""
        self._begin(pl_module)

    @torch.no_grad()
    def _begin(self, pl_module: Any) -> None:
        if self._begun == pl_module.task_index:
            return
        self._begun = pl_module.task_index
        for name, parameter in pl_module.model.named_parameters():
            if name in self._initial:
                parameter.copy_(self._initial[name])

    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond plain fine-tuning, in host memory: one copy of the trainable weights."""
        return sum(weights.numel() * weights.element_size() for weights in self._initial.values())

    def state_dict(self) -> dict[str, Any]:
        """The initial weights, and which task has begun."""
        return {"initial": dict(self._initial), "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._initial, self._begun = dict(state_dict["initial"]), state_dict["begun"]
