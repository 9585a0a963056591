"""Importance that carries no attribution, for comparison at equal plasticity."""

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import check_choice
from .plasticity import FIXED_POINT

Scope = Literal["tensor", "model"]


def shuffled(importance: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Control: the same values, shuffled within each tensor.

    Args:
        importance: Name to tensor, any dtype.
        seed: With the name it decides the permutation, whatever the other tensors are.

    Returns:
        New tensors of the same shapes, dtypes and devices.
    """
    result = {}
    for name, values in importance.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        order = torch.randperm(values.numel(), generator=generator).to(values.device)
        result[name] = values.reshape(-1)[order].view(values.shape)
    return result


def flattened(importance: Mapping[str, Tensor], scope: Scope = "model") -> dict[str, Tensor]:
    """Control: a uniform gate of the same mean importance.

    Args:
        importance: Name to fixed-point (uint8, uint16) or floating-point tensor in [0, 1].
        scope: ``"model"``: one value everywhere, like a lower learning rate; ``"tensor"``: each tensor its own mean.

    Returns:
        float32 tensors of the same shapes: views of one element, to be read only, which take no memory.

    Raises:
        AgclError: If ``scope`` is not one of the two.
    """
    check_choice("scope", scope, Scope)
    sums = {}
    for name, values in importance.items():
        is_fixed_point = values.dtype in FIXED_POINT
        total = values.sum(dtype=torch.int64 if is_fixed_point else torch.float64)
        sums[name] = float(total) / FIXED_POINT.get(values.dtype, 1)
    num_entries = {name: max(values.numel(), 1) for name, values in importance.items()}
    overall = sum(sums.values()) / max(sum(num_entries.values()), 1)
    means = {name: overall if scope == "model" else sums[name] / num_entries[name] for name in importance}
    return {name: torch.tensor(means[name]).expand(values.shape) for name, values in importance.items()}
