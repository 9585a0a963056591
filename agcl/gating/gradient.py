"""The gate on gradients."""

from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from ..errors import AgclError
from ..shards import is_sharded
from .gate import Gate, GatedParameter
from .plasticity import scaled_gradient


class GradientGate(Gate):
    """Multiplies each gradient by the plasticity, ``(1 - importance) ** strength * grad`` (Eq. 13).

    A hook on each parameter scales the gradient of every backward pass once, before it is accumulated: accumulation
    over micro-batches, clipping, DDP and tied weights each see it exactly once. Computed in float32 (float64 for
    float64) and rounded to the gradient's dtype. Takes the memory of one more copy of the gradient at hand. Only with
    an optimizer whose step is linear in the gradient does the step scale with it; see `choose_gate`. Momentum gathered
    before the gate was attached is not scaled, nor are parameters that did not require a gradient then.

    Args:
        named_parameters: Pairs as from ``model.named_parameters()``. The model is not kept alive.
        importance: Parameter name to tensor of the parameter's shape, fixed point (uint8: ``value / 255``, uint16:
            ``value / 65535``) or floating point in [0, 1], on any device. Held without copying: leave it unchanged.
            Parameters without importance are not gated.
        strength: Exponent >= 0; 1 is the paper's linear gate, 0 is no gate.
        moves_importance: Whether the importance moves to the parameters' device when it is first used. If not, it stays
            where it is (host memory), and each parameter's is copied over for the moment it is used.

    Raises:
        AgclError: If an importance has an unknown name, another shape or dtype, or values outside [0, 1].

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with GradientGate(model.named_parameters(), {"weight": torch.tensor([[0.25, 1.0]])}).attach(optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad
        tensor([[0.7500, 0.0000]])
    """

    def _install(self, optimizer: Optimizer, held: list[GatedParameter]) -> None:
        for gated in held:
            parameter = gated.reference()
            if parameter is None or gated.is_open or not parameter.requires_grad:
                continue
            if is_sharded(parameter):
                self.detach()
                raise AgclError(
                    f"`{gated.name}` is sharded (DTensor), where gradient hooks do not run; use UpdateGate."
                )
            self._handles.append(parameter.register_hook(partial(_scale, gated)))


def _scale(gated: GatedParameter, gradient: Tensor) -> Tensor:
    return scaled_gradient(gradient, gated.local_importance(gradient), gated.strength)
