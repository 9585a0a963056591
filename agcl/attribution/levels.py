"""Importance in fixed point: ``level / 255`` in uint8, or ``level / 65535`` in uint16 where 8 bits are too coarse.

0 and 1 are exact in both, and a level of 8 bits is exactly 257 times as many in 16. PyTorch has few operations for
uint16, so that arithmetic happens in chunks of another dtype.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..errors import AgclError

Bits = Literal[8, 16]

DTYPES: dict[Bits, torch.dtype] = {8: torch.uint8, 16: torch.uint16}
MAX_LEVEL: dict[Bits, int] = {8: 255, 16: 65535}
WIDENING = 257  # 257 * 255 = 65535: levels of 8 bits, times this, are the same importance in 16 bits
CHUNK = 2**18  # entries: temporaries stay in cache


def bits_of(levels: Tensor, name: str = "tensor") -> Bits:
    """8 or 16, from the dtype.

    Raises:
        AgclError: If it is neither torch.uint8 nor torch.uint16; the message uses ``name``.
    """
    for bits, dtype in DTYPES.items():
        if levels.dtype == dtype:
            return bits
    raise AgclError(
        f"Importance of `{name}` is {levels.dtype}, not torch.uint8 or torch.uint16; pass it through `normalise`."
    )


def quantise(values: Tensor, bits: Bits = 8) -> Tensor:
    """Fixed point of values in [0, 1], rounded to nearest.

    Args:
        values: Floating point, any shape; left as it is.
        bits: 8: error at most ``1 / 510``. 16: at most ``1 / 131070``.

    Returns:
        uint8 or uint16 tensor of the same shape and device.

    Raises:
        AgclError: If a value is outside [0, 1] or not a number.
    """
    levels = torch.empty(values.shape, dtype=DTYPES[bits], device=values.device)
    for piece, out in chunks(values, levels):
        if not bool(((piece >= 0) & (piece <= 1)).all()):
            raise AgclError("Importance must lie in [0, 1]; a value outside, or not a number, cannot be stored.")
        out.copy_((piece.double() * MAX_LEVEL[bits]).round_())
    return levels


def dequantise(levels: Tensor) -> Tensor:
    """Importance in [0, 1] as float32 (whose own rounding is below 6e-8) from uint8 or uint16 fixed point.

    Example:
        >>> dequantise(torch.tensor([0, 13107, 65535]).to(torch.uint16))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return levels.to(torch.float32).div_(MAX_LEVEL[bits_of(levels)])


def histogram(levels: Tensor) -> Tensor:
    """How many entries have each level: int64 of shape (256,) or (65536,), on the CPU."""
    num_levels = MAX_LEVEL[bits_of(levels)] + 1
    counts = torch.zeros(num_levels, dtype=torch.int64)
    for piece in levels.flatten().split(16 * CHUNK):
        piece = piece.to(torch.int32) if piece.dtype == torch.uint16 else piece
        counts += torch.bincount(piece, minlength=num_levels).cpu()
    return counts


def chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Pieces of tensors of one shape, flat and side by side; a contiguous tensor's are views of it."""
    return zip(*(tensor.reshape(-1).split(CHUNK) for tensor in tensors), strict=True)
