"""Where the entries of a row lie among each other, exactly."""

import numpy as np
import torch
from torch import Tensor

_SLACK = 1e-9  # keeps 0.7 * 10 = 7.000000000000001 from counting as 8


def row_quantile(rows: Tensor, quantile: float) -> Tensor:
    """Quantile (inverse of the empirical CDF) of each row's non-zero entries; 1 for a row of zeros.

    Args:
        rows: Not negative, float32, shape (rows, columns), at least one column.
        quantile: In (0, 1].

    Returns:
        Shape (rows, 1), on the CPU or beside the rows.
    """
    if rows.device.type != "cpu":
        return _row_quantile_on_device(rows, quantile)
    values = rows.numpy()
    num_nonzero = np.count_nonzero(values, axis=1)
    kept = np.ceil(num_nonzero * quantile - _SLACK).astype(np.int64).clip(1)
    if len(values) == 1:  # one value is found without sorting all others: several times as fast, but for many zeros
        nonzero = values if num_nonzero[0] == values.size else values[values > 0]
        found = np.partition(nonzero, kept[0] - 1, axis=None)[kept[0] - 1] if nonzero.size else 1.0
        return torch.from_numpy(np.full((1, 1), found, dtype=values.dtype))
    places = (values.shape[1] - num_nonzero + kept - 1).clip(max=values.shape[1] - 1)
    found = np.take_along_axis(np.sort(values, axis=1), places[:, None], axis=1)
    found[num_nonzero == 0] = 1.0
    return torch.from_numpy(found)


def _row_quantile_on_device(rows: Tensor, quantile: float) -> Tensor:
    """The same by torch, which NumPy outdoes on a CPU, but not the way there from another device."""
    num_nonzero = rows.count_nonzero(dim=1).cpu()  # a few numbers, in float64, which not every device has
    kept = (num_nonzero.double() * quantile - _SLACK).ceil().long().clamp_(min=1)
    if len(rows) == 1:
        nonzero = rows[rows > 0]
        return nonzero.kthvalue(int(kept)).values.view(1, 1) if len(nonzero) else rows.new_ones(1, 1)
    places = (rows.shape[1] - num_nonzero + kept - 1).clamp_(max=rows.shape[1] - 1).to(rows.device)
    found = rows.sort(dim=1).values.gather(1, places[:, None])
    return found.masked_fill_((num_nonzero == 0).to(rows.device)[:, None], 1.0)


def rank_steps(rows: Tensor, max_level: int) -> Tensor:
    """The values of each row where round(max_level * fraction strictly below) steps up; exact.

    The level is at least j where at least ``c = ceil(n (2 j - 1) / (2 max_level))`` entries are smaller, that is where
    the value exceeds the c-th smallest. A row of no more entries than levels is its own steps.

    Args:
        rows: Float32, shape (rows, columns).
        max_level: Number of steps.

    Returns:
        Ascending, shape (rows, max_level), or (rows, columns) where there are no more columns than that.
    """
    # NumPy's vectorised sort is about 17 times as fast as torch's on a CPU and makes no int64 indices.
    is_on_cpu = rows.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1)) if is_on_cpu else rows.sort(dim=1).values
    num_columns = ordered.shape[1]
    if num_columns <= max_level:
        return ordered
    levels = torch.arange(1, max_level + 1, device=ordered.device)
    counts = -(-num_columns * (2 * levels - 1)).div(2 * max_level, rounding_mode="floor")
    return ordered[:, counts - 1]
