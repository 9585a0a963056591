"""A learning-rate schedule over one task."""

import math
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from agcl.errors import AgclError, check_choice

Decay = Literal["linear", "cosine", "none"]


class WarmupDecay(LRScheduler):
    """Linear warm-up, then decay to zero over the steps of one task; every task starts it afresh.

    The number of steps is not an argument: the training loop knows it at each task's start (:meth:`start`).

    Args:
        optimizer: The optimizer whose groups' learning rates are the peaks.
        decay: ``linear``, ``cosine`` or ``none``.
        warmup: Share of the task's steps spent on warming up, in [0, 1].

    Raises:
        AgclError: If ``warmup`` is outside [0, 1].
    """

    def __init__(self, optimizer: Optimizer, decay: Decay = "linear", warmup: float = 0.06) -> None:
        check_choice("decay", decay, Decay)
        if not 0 <= warmup <= 1:
            raise AgclError(f"`warmup` is {warmup}; give a share of the task's steps between 0 and 1.")
        self.decay = decay
        self.warmup = warmup
        self.total_steps: int | None = None
        super().__init__(optimizer)

    def start(self, total_steps: int) -> None:
        """Set the number of optimizer steps of the task that begins, and the learning rates of its first step."""
        self.total_steps = total_steps
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def get_lr(self) -> list[Any]:
        """Learning rates of the present step, one for each parameter group."""
        return [peak * self._factor(self.last_epoch) for peak in self.base_lrs]

    def _factor(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        warmup_steps = math.ceil(self.warmup * self.total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, self.total_steps - warmup_steps))
        if self.decay == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0
