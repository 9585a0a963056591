"""Momentum-filtered optimizer (Chen et al., arXiv 2407.20999)."""

import inspect
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from agcl.errors import AgclError
from agcl.methods.interface import check_whole


class MoFO(Callback):
    """At each step only the entries with the largest momentum move: the top ``share`` of each parameter tensor.

    Momentum is Adam's ``exp_avg``, the step's own gradient included. After the optimizer's step all other entries are
    put back, weight decay included; the optimizer's state goes on as usual for all of them. Of equal momentum at the
    limit all move; entries without any momentum never do. The authors' code leaves normalisations and biases
    unfiltered and decays every weight; here, as in the paper's algorithm, all tensors are filtered.

    Needs one copy of the weights while the optimizer updates them, when activations are gone; none at other times.

    Args:
        share: Of each tensor's entries that move, in (0, 1]; one at least. The authors advise 0.05 to 0.2.

    Raises:
        AgclError: For another share, or, before anything is trained, an optimizer without ``exp_avg``.
    """

    def __init__(self, share: float = 0.15) -> None:
        if not 0 < share <= 1:
            raise AgclError(f"`share` is {share}; choose a number above 0, at most 1.")
        self.share = share
        self._before: list[tuple[nn.Parameter, Tensor]] = []  # the weights before the step under way
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse weights that are split over processes."""
        check_whole(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse an optimizer without momentum, hook into the others' steps."""
        (optimizer,) = trainer.optimizers
        if "exp_avg" not in _state_names(optimizer):
            raise AgclError(
                f"MoFO filters by Adam's momentum, `exp_avg`, which {type(optimizer).__name__} does not keep: "
                "choose AdamW or one like it."
            )
        self._detach()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave no hook behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._detach()

    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond plain fine-tuning: none."""
        return 0

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure")
        if closure is None:  # a gradient scaler's step
            self._copy(optimizer)
            return None

        def run() -> Any:
            result = closure()
            self._copy(optimizer)  # only after Lightning's closure are the gradients there
            return result

        return args, {**kwargs, "closure": run}

    def _copy(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._before = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while self._before:
            parameter, before = self._before.pop()
            moves = largest(optimizer.state[parameter]["exp_avg"], self.share)
            parameter.copy_(torch.where(moves, parameter, before))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()


def largest(momentum: Tensor, share: float) -> Tensor:
    """Which entries are among the top ``share`` by magnitude, and not zero; boolean, the momentum's shape."""
    magnitude = momentum.detach().abs()
    rank = magnitude.numel() - max(1, round(share * magnitude.numel()))  # of the smallest that moves, from below
    if magnitude.device.type == "cpu":  # several times as fast as torch's selection
        flat = magnitude.flatten().to(torch.promote_types(magnitude.dtype, torch.float32)).numpy()
        limit: Any = float(np.partition(flat, rank)[rank])
    else:
        limit = magnitude.flatten().kthvalue(rank + 1).values
    return (magnitude >= limit) & (magnitude > 0)


def _state_names(optimizer: Optimizer) -> set[str]:
    """What it keeps by parameter, from one step of its like on a single number."""
    accepted = inspect.signature(type(optimizer)).parameters
    probe = nn.Parameter(torch.zeros_like(optimizer.param_groups[0]["params"][0].flatten()[:1]))
    probe.grad = torch.ones_like(probe)
    try:
        twin = type(optimizer)([probe], **{k: v for k, v in optimizer.defaults.items() if k in accepted})
        twin.step()
    except Exception:  # one that needs other arguments, or a closure, is none of Adam's kind
        return set()
    return set(twin.state[probe])
