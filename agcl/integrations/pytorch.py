"""The gate in a training loop of one's own."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from agcl.attribution.artefact import check_importance, open_importance
from agcl.attribution.directions import base_name, is_of_pair, up_of
from agcl.attribution.merging import merge
from agcl.errors import AgclError, check_choice
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate
from agcl.gating.choice import GateKind
from agcl.gating.directional import Map

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


def maps_for_adapter(model: nn.Module, maps: Mapping[str, Map], *, begins: bool = True) -> dict[str, Map]:
    """Maps for a model with a LoRA adapter, from those for the weights that its pairs are beside.

    Of a fresh pair ``W + B A``, ``A`` begins and moves by the directions of the inputs that the weights ``W`` beside it
    have, so that inputs that are held hardly reach ``B``, which learns freely. An adapter that has learned a task is
    merged (PEFT's ``merge_and_unload``), or left beside the next one, frozen and active: on quantised weights, whose
    levels most of it would fall between. It cannot learn another task by direction.

    Args:
        model: A PEFT model whose adapter is LoRA, on weights quantised or not. Where training begins, its first
            matrices are changed in place: ``A <- A P``.
        maps: As `InputMoments.maps` gives them, by the names that weights have in the model without the adapter. Those
            of weights that are not trained and have no trained pair beside them are left out.
        begins: Whether training begins, with a fresh adapter; not where it is resumed.

    Returns:
        For :class:`agcl.gating.DirectionalGate`: by the names of the model's parameters.

    Raises:
        AgclError: If the maps are of another model, none is of weights that are trained, the adapter has learned
            already, or is of a kind that cannot be gated by direction.
    """
    from agcl.task_pairs import pairs_of, pairs_problem, turn_pairs, unfit_pairs  # PEFT takes a while to import

    parameters = dict(model.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    pairs = {down: base_name(beside) for beside, down in pairs_of(model, trained).items()}
    if several := [name for name in trained if ".lora_A." in name and name not in pairs]:
        raise AgclError(
            f"Weights have several adapters that are trained (`{several[0]}`): freeze those of earlier tasks, "
            "`model.set_requires_grad(NAME, requires_grad=False)`."
        )
    for config in getattr(model, "peft_config", {}).values():
        options = {**config.to_dict(), "modules_to_save": None}  # which are gated as they are
        if problem := pairs_problem(options) or unfit_pairs(model, trained):
            raise AgclError(f"This adapter cannot be gated by direction: {problem}.")
    known = {*pairs.values(), *(base_name(name) for name in parameters if not is_of_pair(name))}
    if unknown := maps.keys() - known:
        raise AgclError(f"The maps are of another model: `{min(unknown)}` is not in it.")
    found = {down: (maps[name][0], False) for down, name in pairs.items() if name in maps}
    if found and (free := [name for down, name in pairs.items() if down not in found]):
        warnings.warn(
            f"{len(free)} of {len(pairs)} pairs are not gated: there is no map of `{free[0]}`, whose inputs no earlier "
            "task was asked about.",
            stacklevel=2,
        )
    if begins:
        if learned := [down for down in found if parameters[up_of(down)].any()]:
            raise AgclError(
                f"The adapter has learned already (`{learned[0]}`): merge it (`model = model.merge_and_unload()`), and "
                "put a fresh one on the model for the next task; on quantised weights leave it there, frozen."
            )
        turn_pairs(model, {down: held for down, (held, _) in found.items()})
    whole = {name: maps[base_name(name)] for name in trained if not is_of_pair(name) and base_name(name) in maps}
    if not found and not whole:
        raise AgclError("No map is of weights that are trained, or have a trained LoRA pair beside them.")
    return found | whole
