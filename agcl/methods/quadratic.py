"""Quadratic penalties around the weights of earlier tasks, over any number of tasks in two buffers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class QuadraticPenalty:
    """``1/2 sum_k sum_i F_ki (theta_i - theta*_ki)^2`` over tasks ``k``, held in two float32 numbers per weight.

    A sum of parabolas is one parabola: with ``F = sum_k F_k`` and ``a = sum_k F_k theta*_k / F`` it equals
    ``1/2 sum_i F_i (theta_i - a_i)^2 + C``. Kept are ``F``, ``a`` and the scalar ``C``. The sums themselves, ``F`` and
    ``sum_k F_k theta*_k``, would hold the same, but the gradient would be their small difference, and mostly rounding.
    """

    def __init__(self) -> None:
        self.precision: dict[str, Tensor] = {}
        """Parameter name -> F, >= 0."""
        self.anchor: dict[str, Tensor] = {}
        """Parameter name -> a."""
        self.constant = 0.0

    @torch.no_grad()
    def add(self, precision: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Add one task's parabola, with the present weights as its minimum.

        Args:
            precision: Parameter name -> F_k >= 0, the parameter's shape; taken over, not copied.
            parameters: Name -> weights, at least those in ``precision``.
        """
        for name, new in precision.items():
            if name not in self.precision:
                self.precision[name], self.anchor[name] = new, _buffer(parameters[name])
                continue
            total = self.precision[name] + new
            share = (new / total).nan_to_num_()  # 0 / 0 where no task has put any weight
            shift = parameters[name] - self.anchor[name]
            self.constant += (self.precision[name] * share * shift.square()).sum(dtype=torch.float64).item() / 2
            self.anchor[name] += share * shift
            self.precision[name] = total

    @torch.no_grad()
    def replace(self, precision: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
        """Online: ``F <- decay * F + F_k``, and the present weights as the minimum of all of it.

        Args:
            precision: As for :meth:`add`.
            parameters: Name -> weights, at least those in ``precision`` or penalised already.
            decay: In [0, 1].
        """
        for name, old in self.precision.items():
            old.mul_(decay)
            if name in precision:
                old.add_(precision[name])
        self.precision |= {name: new for name, new in precision.items() if name not in self.precision}
        self.anchor = {name: _buffer(parameters[name]) for name in self.precision}

    @torch.no_grad()
    def add_gradient(self, parameters: Mapping[str, nn.Parameter], strength: float) -> Tensor:
        """Add ``strength * F (theta - a)`` to the gradients of the parameters that require one.

        Args:
            parameters: Name -> parameter.
            strength: Factor >= 0 of the penalty.

        Returns:
            ``strength`` times the penalty, a scalar.
        """
        total: Any = strength * self.constant
        for name, precision in self.precision.items():
            parameter = parameters[name]
            shift = parameter - self.anchor[name]
            gradient = strength * precision * shift
            total = total + (gradient * shift).sum() / 2
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # not used by this step's rows; the penalty draws it all the same
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient)
        return torch.as_tensor(total)

    def num_bytes(self) -> int:
        """Memory of the buffers."""
        buffers = [*self.precision.values(), *self.anchor.values()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def to(self, device: torch.device) -> None:
        """Move the buffers."""
        self.precision = {name: tensor.to(device) for name, tensor in self.precision.items()}
        self.anchor = {name: tensor.to(device) for name, tensor in self.anchor.items()}

    def state_dict(self) -> dict[str, Any]:
        """The buffers and the constant."""
        return {"precision": self.precision, "anchor": self.anchor, "constant": self.constant}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.precision, self.anchor = dict(state_dict["precision"]), dict(state_dict["anchor"])
        self.constant = state_dict["constant"]


def _buffer(weights: Tensor) -> Tensor:
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)
