"""Continual-learning metrics as pure functions of the score matrix.

A score matrix ``a`` of T tasks has shape ``(T + 1, T)``: row 0 holds the scores before any training, row t those after
learning task t; column i belongs to task i + 1. Scores are shares in [0, 1] or any other number where more is better.
NaN stands for what was not measured. The last row that holds a value tells how many tasks have been learned, so all
functions also work in the middle of a sequence; what is not defined yet is NaN.

Definitions: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), Chaudhry et al. 2018 (arXiv 1801.10112).
"""

import torch
from torch import Tensor


def num_learned(matrix: Tensor) -> int:
    """Number of tasks learned so far: index of the last row with a measured score (0 if there is none).

    Raises:
        ValueError: If the shape is not ``(T + 1, T)`` with T >= 1.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] + 1 or matrix.shape[1] == 0:
        raise ValueError(f"A score matrix has shape (T + 1, T) for T tasks; this one has {tuple(matrix.shape)}.")
    measured = (~matrix.isnan()).any(dim=1).nonzero()
    return int(measured[-1]) if len(measured) else 0


def average_performance(matrix: Tensor) -> Tensor:
    """Mean score on the tasks learned so far: ``mean_i a[t, i]``; TRACE calls it OP.

    Args:
        matrix: Score matrix, shape ``(T + 1, T)``, floating point.

    Returns:
        Scalar of the matrix's dtype; NaN before the first task is learned.

    Example:
        >>> average_performance(torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.8]]))
        tensor(0.6000)
    """
    learned = num_learned(matrix)
    return matrix[learned, :learned].mean()


def backward_transfer(matrix: Tensor) -> Tensor:
    """What learning the later tasks did to the earlier ones: ``mean_{i < t} (a[t, i] - a[i, i])``; forgetting is < 0.

    Args:
        matrix: Score matrix, shape ``(T + 1, T)``, floating point.

    Returns:
        Scalar of the matrix's dtype; NaN before the second task is learned.

    Example:
        >>> backward_transfer(torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.8]]))
        tensor(-0.6000)
    """
    learned = num_learned(matrix)
    return (matrix[learned] - _when_learned(matrix))[: max(learned - 1, 0)].mean()


def forgetting(matrix: Tensor) -> Tensor:
    """Loss against the best score a task had: ``mean_{i < t} (max_{1 <= s < t} a[s, i] - a[t, i])``.

    The maximum is over the measured rows 1 .. t - 1, as in Chaudhry et al. 2018: rows from before the task's own
    training count, row 0 (before any training) does not.

    Args:
        matrix: Score matrix, shape ``(T + 1, T)``, floating point.

    Returns:
        Scalar of the matrix's dtype; NaN before the second task is learned, or if rows 1 .. t - 1 hold no score of
        one of the earlier tasks.

    Example:
        >>> forgetting(torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.8]]))
        tensor(0.6000)
    """
    learned = num_learned(matrix)
    if learned < 2:
        return matrix.new_tensor(torch.nan)
    best = matrix[1:learned].nan_to_num(nan=-torch.inf).amax(dim=0)
    best = best.masked_fill(best == -torch.inf, torch.nan)
    return (best - matrix[learned])[: learned - 1].mean()


def forward_transfer(matrix: Tensor) -> Tensor:
    """What the earlier tasks did for one not yet learned: ``mean_{1 < i <= t} (a[i - 1, i] - a[0, i])``.

    Args:
        matrix: Score matrix, shape ``(T + 1, T)``, floating point; row 0 must be measured.

    Returns:
        Scalar of the matrix's dtype; NaN before the second task is learned, or without row 0.

    Example:
        >>> forward_transfer(torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.8]]))
        tensor(0.2000)
    """
    learned = num_learned(matrix)
    just_before = matrix[:-1].diagonal()
    return (just_before - matrix[0])[1:learned].mean()


def learning_accuracy(matrix: Tensor) -> Tensor:
    """Mean score that each task had right after it was learned: ``mean_i a[i, i]``; forgetting is read beside it.

    Args:
        matrix: Score matrix, shape ``(T + 1, T)``, floating point.

    Returns:
        Scalar of the matrix's dtype; NaN before the first task is learned.

    Example:
        >>> learning_accuracy(torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.8]]))
        tensor(0.9000)
    """
    return _when_learned(matrix)[: num_learned(matrix)].mean()


def _when_learned(matrix: Tensor) -> Tensor:
    """Each task's score right after it was learned, shape ``(T,)``."""
    return matrix[1:].diagonal()
