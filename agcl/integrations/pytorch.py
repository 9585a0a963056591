"""The gate in a training loop of one's own."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from agcl.attribution.artefact import check_importance, open_importance
from agcl.attribution.merging import merge
from agcl.errors import check_choice
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate
from agcl.gating.choice import GateKind

Importance = Mapping[str, Tensor] | str | Path
"""Parameter name to importance, or an importance file."""


def gate(
    optimizer: Optimizer,
    model: nn.Module,
    importance: Importance | Sequence[Importance],
    *,
    strength: float = 1.0,
    kind: GateKind = "auto",
    on_host: bool = False,
) -> GradientGate | UpdateGate:
    """Hold each weight back by its importance, ``plasticity = (1 - importance) ** strength``, from now on.

    The gate acts on the optimizer's own step, once per step: gradient accumulation, clipping, schedulers and wrappers
    around the optimizer (accelerate's, Lightning's) need nothing. It goes on until ``detach()``, or to the end of the
    block in ``with gate(optimizer, model, importance):``.

    Args:
        optimizer: Of ``torch.optim`` or one that is built like those; or a wrapper that has it as ``.optimizer``.
        model: The model that it trains, not wrapped in DDP, so that its parameters have their own names.
        importance: As `compute_importance` gives it, or an importance file; of several tasks their list, of which the
            largest value counts (Eq. 12). Parameters without importance are not gated.
        strength: Exponent of the plasticity; 1 is the paper's linear gate, 0 no gate.
        kind: ``gradient`` rescales gradients (the paper), ``update`` the optimizer's whole step, ``auto`` picks what
            protects under this optimizer.
        on_host: Whether importance stays in host memory, from where it is copied over at each step, instead of being
            moved beside the weights.

    Returns:
        The gate, attached; its ``plasticity()`` says what is left, ``detach()`` ends it.

    Raises:
        AgclError: If importance and model do not fit, or the optimizer holds none of the gated parameters.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        >>> with gate(optimizer, model, {"weight": torch.tensor([[0, 255]], dtype=torch.uint8)}):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """
    check_choice("kind", kind, GateKind)
    inner = innermost_optimizer(optimizer)
    if kind == "gradient" and cancels_gradient_gate(inner):
        warnings.warn(
            f"kind='gradient' protects nothing under {type(inner).__name__}, whose step does not change when a "
            "gradient entry is scaled by a constant. Use 'update' (or 'auto'), or SGD.",
            stacklevel=2,
        )
    merged = importance_from(importance)
    check_importance(merged, model.named_parameters())
    chosen = choose_gate(inner) if kind == "auto" else kind
    gate_class = GradientGate if chosen == "gradient" else UpdateGate
    return gate_class(model.named_parameters(), merged, strength, moves_importance=not on_host).attach(inner)


def importance_from(importance: Importance | Sequence[Importance]) -> Mapping[str, Tensor]:
    """Importance of all the tasks given, files being read, in one: of several, each entry's largest value.

    Raises:
        AgclError: If there is nothing, a file cannot be read, or two do not fit together.
    """
    if isinstance(importance, (str, Path)):
        return open_importance(importance)
    if isinstance(importance, Mapping):
        return importance
    parts = [importance_from(part) for part in importance]
    return parts[0] if len(parts) == 1 else dict(merge(parts))


def innermost_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside of wrappers that delegate to their ``.optimizer``.

    Hooks belong there: accelerate's wrapper skips its step while gradients accumulate, and runs no step hooks of its
    own.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
