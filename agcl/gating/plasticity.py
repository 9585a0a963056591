"""The gates' arithmetic on tensors, in pieces whose temporaries stay in the cache."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import AgclError

FIXED_POINT = {torch.uint8: 255, torch.uint16: 65535}  # importance is value / this; as in agcl.attribution.levels
# Entries: per thread, so that temporaries stay in its cache; few kernel launches.
_CPU_CHUNK, _DEVICE_CHUNK = 2**16, 2**24


@torch.no_grad()
def blend(new: Tensor, old: Tensor, importance: Tensor, strength: float) -> None:
    """In place in ``new``: ``old + plasticity * (new - old)``.

    lerp is exact at 0 and at 1 (but for the sign of a zero), and so are the weights given to it.
    """
    dtype = _working_dtype(new)
    for new_piece, old_piece, importance_piece in _chunks(new, old, importance):
        if strength == 1:
            start, end, weight = new_piece, old_piece, _as_float(importance_piece, dtype)
        else:
            start, end, weight = old_piece, new_piece, _plasticity(importance_piece, strength, dtype)
        if new.dtype == dtype:
            torch.lerp(start, end, weight, out=new_piece)
        else:
            new_piece.copy_(torch.lerp(start.to(dtype), end.to(dtype), weight))


def scaled_gradient(gradient: Tensor, importance: Tensor, strength: float) -> Tensor:
    """``plasticity * gradient`` in fresh memory: autograd may hand the same tensor to another branch."""
    dtype = _working_dtype(gradient)
    if gradient.requires_grad or gradient.layout != torch.strided:  # a second backward is to come; a sparse embedding
        return (gradient * _plasticity(importance, strength, dtype)).to(gradient.dtype)
    result = torch.empty_like(gradient)
    for result_piece, gradient_piece, importance_piece in _chunks(result, gradient, importance):
        if result.dtype == dtype:
            _plasticity(importance_piece, strength, dtype, out=result_piece).mul_(gradient_piece)
        else:
            result_piece.copy_(_plasticity(importance_piece, strength, dtype).mul_(gradient_piece))
    return result


def mean_plasticity(name: str, importance: Tensor, strength: float) -> tuple[float, bool]:
    """Mean plasticity of a parameter, and whether nothing is held back (importance zero throughout, or strength 0).

    Args:
        name: Of the parameter, for the message.
        importance: Fixed point, or floating point in [0, 1].
        strength: The gate's.

    Returns:
        Mean of ``(1 - importance) ** strength``, summed in float64 (0 of no entries), and the answer.

    Raises:
        AgclError: If the importance of the parameter ``name`` has another dtype, or values outside [0, 1].
    """
    num_entries = max(importance.numel(), 1)
    if strength == 1 and importance.dtype == torch.uint8:
        level_sum = _sum_of_levels(importance)
        return 1 - level_sum / (FIXED_POINT[torch.uint8] * num_entries), level_sum == 0
    if (num_levels := FIXED_POINT.get(importance.dtype)) is not None:
        counts = torch.zeros(num_levels + 1, dtype=torch.float64)
        for (piece,) in _chunks(importance):
            counts += torch.bincount(piece.reshape(-1).int(), minlength=num_levels + 1).cpu()
        kept = (counts * _plasticity_levels(importance.dtype, strength, torch.float64, counts.device)).sum()
        return float(kept) / num_entries, strength == 0 or float(counts[0]) == importance.numel()
    if not importance.is_floating_point():
        raise AgclError(
            f"Importance of `{name}` is {importance.dtype}; give uint8 or uint16 fixed point or floats in [0, 1]."
        )
    total = 0.0
    for (piece,) in _chunks(importance):
        if not ((piece >= 0) & (piece <= 1)).all():
            raise AgclError(f"Importance of `{name}` has values outside [0, 1] or NaN; normalise it first.")
        total += float(_plasticity(piece, strength, torch.float64).sum())
    return total / num_entries, strength == 0 or not bool(importance.any())


def _sum_of_levels(levels: Tensor) -> int:
    # NumPy adds up bytes ten times as fast as torch does.
    return int(levels.numpy().sum(dtype=np.int64)) if levels.device.type == "cpu" else int(levels.sum())


def _as_float(importance: Tensor, dtype: torch.dtype) -> Tensor:
    """Importance in [0, 1]; the largest level gives exactly 1."""
    num_levels = FIXED_POINT.get(importance.dtype)
    return importance.to(dtype) if num_levels is None else importance.to(dtype).mul_(1 / num_levels)


def _plasticity(importance: Tensor, strength: float, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(1 - importance) ** strength in ``out`` or fresh memory; exactly 0 and 1 at the ends."""
    if out is None:
        out = torch.empty_like(importance, dtype=dtype)
    num_levels = FIXED_POINT.get(importance.dtype)
    if num_levels is None:
        return torch.sub(1, importance.to(dtype), out=out).pow_(strength)
    if strength == 1:
        if importance.dtype == torch.uint8:
            return out.copy_(importance.bitwise_not()).div_(num_levels)  # num_levels - level, while it is one byte
        return out.copy_(importance).neg_().add_(num_levels).div_(num_levels)
    # Looked up, several times as fast as a power per entry.
    levels = _plasticity_levels(importance.dtype, strength, dtype, importance.device)
    return out.copy_(levels.index_select(0, importance.reshape(-1).int()).view(importance.shape))


def _plasticity_levels(kind: torch.dtype, strength: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Plasticity of each level of the fixed-point dtype ``kind``."""
    num_levels = FIXED_POINT[kind]
    return torch.arange(num_levels, -1, -1, dtype=dtype, device=device).div_(num_levels).pow_(strength)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of tensors of one shape; flat pieces, or groups of rows where one of them is not contiguous."""
    first = tensors[0]
    size = _CPU_CHUNK * torch.get_num_threads() if first.device.type == "cpu" else _DEVICE_CHUNK
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    else:
        size = max(1, size * len(first) // max(first.numel(), 1))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
