"""Each task learned by itself: what the model could learn if it had nothing to keep."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from agcl.methods.interface import TaskMethod


class SingleTask(TaskMethod):
    """At each task's start the trainable weights are set back to the initial ones: the reference for plasticity.

    The diagonal of the score matrix then tells how well each task is learned alone, with the same data order, optimizer
    and schedule as in the sequence. The initial weights are kept in host memory and in the checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._initial: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """See :meth:`TaskMethod.setup`."""
        super().setup(trainer, pl_module, stage)
        self._initial = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the initial weights; on resuming they are known already."""
        if not self._initial:
            named = pl_module.model.named_parameters()
            self._initial = {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}

    @torch.no_grad()
    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """Set the weights back."""
        for name, parameter in pl_module.model.named_parameters():
            if name in self._initial:
                parameter.copy_(self._initial[name])

    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond plain fine-tuning, in host memory: one copy of the trainable weights."""
        return sum(weights.numel() * weights.element_size() for weights in self._initial.values())

    def state_dict(self) -> dict[str, Any]:
        """The initial weights, too."""
        return {**super().state_dict(), "initial": dict(self._initial)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self._initial = dict(state_dict["initial"])
