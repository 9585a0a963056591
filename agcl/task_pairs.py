"""LoRA pairs task by task: what a task has learned is set aside, and the next one begins with a fresh pair."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from agcl.errors import AgclError

LEARNING = "learning"  # name of the adapter that learns; of those of the tasks before: `_past`
_ALONE = {  # what PEFT allows to one adapter only, or cannot add up
    "use_dora": "magnitudes",
    "modules_to_save": "whole modules",
    "lora_bias": "biases",
    "trainable_token_indices": "tokens",
    "target_parameters": "parameters that are no module's weight",
}


def pairs_problem(adapter: Mapping[str, Any] | None) -> str | None:
    """Why a ``model.adapter`` cannot be given to each task anew, if so; None also without an adapter."""
    if adapter is None:
        return None
    if adapter.get("peft_type") != "LORA":
        return f"`adapter.peft_type` is {adapter.get('peft_type')}, not LORA"
    if (init := adapter.get("init_lora_weights", True)) not in (True, "gaussian"):
        return f"`adapter.init_lora_weights: {init}` cannot be drawn anew for each task; take true or gaussian"
    if (bias := adapter.get("bias", "none")) != "none":
        return f"`adapter.bias: {bias}` leaves biases to be learned that all tasks share"
    for option, what in _ALONE.items():
        if adapter.get(option):
            return f"`adapter.{option}` leaves {what} to be learned that no task can have for itself"
    return None


def unfit_pairs(model: Any, parameters: Sequence[str]) -> str | None:
    """Why the adapter that PEFT has made of a configuration cannot be given to each task anew, if so.

    Args:
        model: With or without adapters.
        parameters: Names of those to be gated.
    """
    layers = _layers(model)
    if not layers:
        return None
    if any(config.target_parameters for config in getattr(model, "peft_config", {}).values()):
        return "`adapter.target_modules` takes in experts' parameters, of which no task can have a pair for itself"
    if any(len(layer.lora_embedding_A) for layer in layers):
        return "`adapter.target_modules` takes in an embedding, whose inputs have no directions"
    if not pairs_of(model, parameters):
        return "no pair's first matrix (`lora_A`) is among the selected parameters"
    return None


def add_adapters(model: Any, names: Sequence[str]) -> None:
    """Replace a PEFT model's only adapter by several of the same configuration, all of them active and trainable.

    Args:
        model: Changed in place; draws the new weights from the default generator.
        names: Of the new adapters.

    Raises:
        AgclError: If the model has no LoRA adapter.
    """
    if len(getattr(model, "peft_config", ())) > 1:
        raise AgclError(
            "OLoRA and `directions` of AttributionCallback both give each task a LoRA adapter of its own: take one of "
            "them (`directions: null`)."
        )
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig):
        raise AgclError("Each task gets a LoRA adapter of its own: set `model.adapter` to {peft_type: LORA, ...}.")
    before = model.active_adapter
    for name in names:
        model.add_adapter(name, deepcopy(config))
    model.set_adapter(names[0])
    model.delete_adapter(before)
    model.base_model.set_adapter(list(names))


def add_pairs(model: Any, num_tasks: int) -> None:
    """Make room for the pairs of all tasks but the last: frozen, and idle until `activate`.

    Args:
        model: With one LoRA adapter, fresh; changed in place.
        num_tasks: At least 1.
    """
    add_adapters(model, [LEARNING, *map(_past, range(num_tasks - 1))])
    model.base_model.set_adapter(LEARNING)


def has_pairs(model: Any) -> bool:
    """Whether `add_pairs` was called on a model."""
    return LEARNING in getattr(model, "peft_config", {})


def has_learned_pairs(model: Any) -> bool:
    """Whether a task has been learned by pairs: all of them begin with a ``B`` of zeros."""
    return has_pairs(model) and bool(_learned(model))


def activate(model: Any) -> None:
    """Have the pairs that were set aside work in the forward pass, and the learning one learn alone."""
    past = _learned(model) - {LEARNING}
    # The learning one last: in this order the sum stays the same to the last bit when it is set aside.
    order = [name for name in model.peft_config if name in past] + [LEARNING]
    if model.active_adapters != order:
        model.base_model.set_adapter(order)
        model.set_requires_grad(order[:-1], requires_grad=False)


@torch.no_grad()
def set_aside(model: Any, index: int, seed: int) -> None:
    """Freeze what a task has learned, and begin anew; the model computes what it did before.

    Args:
        model: After `add_pairs`.
        index: Of the task, not the last.
        seed: Of the fresh weights.
    """
    init = model.peft_config[LEARNING].init_lora_weights
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        torch.manual_seed(seed)
        for layer in _layers(model):
            for pairs in (layer.lora_A, layer.lora_B):
                pairs[_past(index)].load_state_dict(pairs[LEARNING].state_dict())
            layer.reset_lora_parameters(LEARNING, init)
    activate(model)


def pairs_of(model: Any, parameters: Sequence[str]) -> dict[str, str]:
    """Weights that an adapter's pair is beside, quantised or not -> that pair's ``A``, which meets the same inputs.

    Args:
        model: With or without adapters.
        parameters: Names to look for ``A`` among.
    """
    wanted = set(parameters)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            downs = [f"{name}.lora_A.{adapter}.weight" for adapter in module.lora_A]
            found.update((f"{name}.base_layer.weight", down) for down in downs if down in wanted)
    return found


@torch.no_grad()
def turn_pairs(model: Any, held: Mapping[str, Tensor]) -> None:
    """``A <- A P``: whatever ``B`` becomes, a fresh pair then answers little to inputs that are held.

    Args:
        model: With the adapter.
        held: Name of a pair's ``A`` -> ``V``, shape (in, held), of ``P = I - V V^T``.
    """
    parameters = dict(model.named_parameters())
    for name, directions in held.items():
        weight = parameters[name]
        weight.copy_(weight.float() - (weight.float() @ directions) @ directions.T)


def num_pairs(names: Iterable[str]) -> int:
    """How many tasks have or get a pair, by the names of a model's parameters; 0 if none is learning."""
    found = {match[1] for name in names if (match := re.search(r"\.lora_A\.(\w+)\.", name))}
    return len(found) if LEARNING in found else 0


def past_bytes(model: Any) -> int:
    """Of the pairs set aside, and of the room for those to come."""
    names = [f".{name}." for name in getattr(model, "peft_config", ()) if name != LEARNING]
    return sum(p.nbytes for name, p in model.named_parameters() if any(past in name for past in names))


def _learned(model: Any) -> set[str]:
    return {name for layer in _layers(model) for name, up in layer.lora_B.items() if up.weight.any()}


def _past(index: int) -> str:
    return f"task{index}"


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
