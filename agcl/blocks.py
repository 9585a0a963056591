"""Where in the model a parameter sits, by its name, and means by layer."""

import re
from collections.abc import Mapping

_GENERIC_PARTS = {"model", "transformer", "base_model", "base_layer", "modules_to_save", "weight", "bias", "default"}


def block_number(parameter_name: str) -> int | None:
    """The first number between dots of the name, which counts the blocks from 0; None where there is none.

    Example:
        >>> block_number("model.layers.7.mlp.up_proj.weight"), block_number("transformer.wte.weight")
        (7, None)
    """
    number = re.search(r"(?:^|\.)(\d+)\.", parameter_name)
    return int(number[1]) if number else None


def layer_of(parameter_name: str) -> str:
    """Where a parameter sits: ``layer 07`` for one of the eighth block, else its own name (``embed_tokens``, ``norm``).

    Example:
        >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("model.embed_tokens.weight")
        ('layer 07', 'embed_tokens')
    """
    number = block_number(parameter_name)
    return kind_of(parameter_name) if number is None else f"layer {number:02d}"


def kind_of(parameter_name: str) -> str:
    """What a parameter belongs to: the last telling part of its name.

    Example:
        >>> kind_of("model.layers.7.mlp.up_proj.weight"), kind_of("transformer.h.0.attn.c_attn.bias")
        ('up_proj', 'c_attn')
        >>> kind_of("base_model.model.layers.0.mlp.up_proj.lora_A.learning.weight")
        'up_proj.lora_A'
    """
    parts = parameter_name.split(".")
    for index, part in enumerate(parts):
        if part.startswith("lora_") or part == "modules_to_save":
            parts = parts[: index + 1]  # what follows is the name of an adapter
            break
    parts = [part for part in parts if part not in _GENERIC_PARTS]
    telling = 1
    while telling < len(parts) and _occurs_in_several_modules(parts[-telling]):
        telling += 1
    return ".".join(parts[-telling:]) if parts else parameter_name


def _occurs_in_several_modules(part: str) -> bool:
    """Whether, in one layer, several modules have a part of this name."""
    return part.startswith("lora_") or part == "c_proj"


def layer_order(layer: str) -> tuple[bool, int, str]:
    """Sorting key of what :func:`layer_of` gives: layers by number, then everything else by name."""
    number = re.fullmatch(r"layer (\d+)", layer)
    return number is None, int(number[1]) if number else 0, layer


def mean_by_layer(means: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Means over parameters as means over the weights of each layer.

    Args:
        means: Parameter name -> mean over its entries, and their number.

    Returns:
        Layer, as :func:`layer_of` names it -> mean over its weights, and their number; layers in order. Those without
        any weight are left out.

    Example:
        >>> mean_by_layer({"norm.weight": (1.0, 2), "layers.0.up.weight": (0.5, 30), "layers.0.up.bias": (0.9, 10)})
        {'layer 00': (0.6, 40), 'norm': (1.0, 2)}
    """
    sums: dict[str, tuple[float, int]] = {}
    for name, (mean, number) in means.items():
        total, count = sums.get(layer_of(name), (0.0, 0))
        sums[layer_of(name)] = total + mean * number, count + number
    in_order = sorted(sums.items(), key=lambda item: layer_order(item[0]))
    return {layer: (total / count, count) for layer, (total, count) in in_order if count}
