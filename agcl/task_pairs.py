"""LoRA pairs task by task: what a task has learned is set aside, and the next one begins with a fresh pair."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from agcl.errors import AgclError

_PAIR = re.compile(r"\.lora_(embedding_)?[AB]\.")  # PEFT's names

LEARNING = "learning"
"""Name of the adapter that learns; those of the tasks before are named by `_past`."""


def pairs_problem(adapter: Mapping[str, Any] | None) -> str | None:
    """Why a ``model.adapter`` cannot be given to each task anew, if so; None also without an adapter."""
    if adapter is None:
        return None
    if str(adapter.get("peft_type", "")).upper() != "LORA":
        return f"of adapters it can do with LoRA, not with {adapter.get('peft_type')}"
    if adapter.get("init_lora_weights", True) not in (True, "gaussian"):
        return f"`adapter.init_lora_weights: {adapter['init_lora_weights']}` does not begin at the model as it is"
    for option in ("use_dora", "modules_to_save"):
        if adapter.get(option):
            return f"`adapter.{option}` leaves more than low-rank matrices to be learned"
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
    activate(model, 0)


def has_pairs(model: Any) -> bool:
    """Whether `add_pairs` was called on a model."""
    return LEARNING in getattr(model, "peft_config", {})


def activate(model: Any, num_past: int) -> None:
    """Have the first pairs that were set aside work in the forward pass, and the learning one learn alone."""
    past = [_past(index) for index in range(num_past)]
    if model.active_adapters != [LEARNING, *past]:
        model.base_model.set_adapter([LEARNING, *past])
        model.set_requires_grad(past, requires_grad=False)


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
            for pairs in (getattr(layer, name) for name in layer.adapter_layer_names):
                if LEARNING in pairs:
                    _copy(pairs[LEARNING], pairs[_past(index)])
            layer.reset_lora_parameters(LEARNING, init)
    activate(model, index + 1)


def pairs_of(model: Any, parameters: Sequence[str]) -> dict[str, str]:
    """Weights that an adapter's pair is beside -> that pair's ``A``, which meets the same inputs.

    Args:
        model: With or without adapters.
        parameters: Names to look for ``A`` among.
    """
    wanted = set(parameters)
    found: dict[str, str] = {}
    known = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (base := f"{name}.base_layer.weight") in known:
            downs = [f"{name}.lora_A.{adapter}.weight" for adapter in module.lora_A]
            found.update((base, down) for down in downs if down in wanted)
    return found


def is_of_pair(name: str) -> bool:
    """Whether a parameter is one of a LoRA pair, by its name."""
    return bool(_PAIR.search(name))


def past_bytes(model: Any) -> int:
    """Of the pairs set aside, and of the room for those to come."""
    names = [f".{name}." for name in getattr(model, "peft_config", ()) if name != LEARNING]
    return sum(p.nbytes for name, p in model.named_parameters() if any(past in name for past in names))


def _past(index: int) -> str:
    return f"task{index}"


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _copy(source: Any, target: Any) -> None:
    """Of modules, or of the parameters of an embedding's pair."""
    if isinstance(source, torch.nn.Module):
        target.load_state_dict(source.state_dict())
    else:
        target.copy_(source)
