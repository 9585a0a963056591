"""Mean, spread, paired differences and bootstrap intervals over a comparison's runs, from plain numbers."""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

_RESAMPLES = 10_000


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing.

    Example:
        >>> mean([0.25, 0.5]), mean([])
        (0.375, nan)
    """
    return math.fsum(values) / len(values) if values else math.nan


def standard_deviation(values: Sequence[float]) -> float:
    """Sample standard deviation ``sqrt(sum (x - mean)**2 / (n - 1))``; NaN of fewer than two values.

    Example:
        >>> standard_deviation([1.0, 3.0]), standard_deviation([1.0])
        (1.4142135623730951, nan)
    """
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_differences(values: Mapping[Hashable, float], reference: Mapping[Hashable, float]) -> list[float]:
    """``value - reference`` of each key (seed, or seed and order) that both have.

    What a seed or an order does to all methods alike cancels, which it would not in a difference of means.

    Example:
        >>> paired_differences({0: 0.5, 1: 0.75, 2: 1.0}, {1: 0.25, 0: 0.25})
        [0.25, 0.5]
    """
    return [value - reference[key] for key, value in values.items() if key in reference]


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    The mean of n values drawn with replacement, 10,000 times; its lower and upper ``(1 - confidence) / 2`` quantiles.

    Args:
        values: One for each seed, or seed and order.
        confidence: Nominal level. What few values can hold: :func:`attainable_confidence`.
        seed: Of the drawing; the same values give the same interval.

    Returns:
        Lower and upper end; NaN of fewer than two values, which say nothing about spread.
    """
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def attainable_confidence(num_values: int) -> float:
    """How often the range of n independent values holds their distribution's median: ``1 - 2 ** (1 - n)``.

    All n lie on one side of it with probability ``2 * 0.5 ** n``. A bootstrap interval lies within the range of the
    values, so that for a symmetric distribution, where mean and median are one, it cannot hold the mean more often,
    whatever its nominal level: 75 % with three values; 95 % takes six.

    Example:
        >>> attainable_confidence(3), attainable_confidence(5), attainable_confidence(6)
        (0.75, 0.9375, 0.96875)
    """
    return 1 - 2.0 ** (1 - num_values) if num_values else 0.0
