"""Statistics against closed forms and complete enumeration."""

import itertools
import math
from collections import Counter

import pytest

from agcl.compare.statistics import (
    attainable_confidence,
    bootstrap_interval,
    mean,
    paired_differences,
    standard_deviation,
)


def test_standard_deviation_divides_by_n_minus_one():
    assert standard_deviation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3), rel=1e-15)
    # A large offset would ruin the mean of squares minus the square of the mean.
    assert standard_deviation([1e9 + 1, 1e9 + 2, 1e9 + 3]) == pytest.approx(1.0, rel=1e-12)


def test_what_is_not_defined_is_nan():
    assert math.isnan(mean([]))
    assert math.isnan(standard_deviation([0.5]))
    assert all(map(math.isnan, bootstrap_interval([0.5])))


def test_paired_differences_cancel_what_a_seed_does_to_both():
    difficulty = {0: 0.0, 1: 0.25, 2: 0.5}
    values = {seed: 0.25 + shift for seed, shift in difficulty.items()}
    assert paired_differences(values, difficulty) == [0.25, 0.25, 0.25]


def test_pairs_are_matched_by_key_and_others_left_out():
    values = {(0, "a"): 1.0, (0, "b"): 2.0, (1, "a"): 4.0}
    assert paired_differences(values, {(1, "a"): 1.0, (0, "b"): 0.5, (9, "a"): 7.0}) == [1.5, 3.0]


def exact_interval(values, confidence):
    """Quantiles of the bootstrap distribution itself: the mean of each of the n ** n samples, equally likely."""
    counts = Counter(round(sum(sample), 9) for sample in itertools.product(values, repeat=len(values)))
    total, tail = sum(counts.values()), (1 - confidence) / 2
    ends = []
    for quantile in (tail, 1 - tail):
        reached = 0
        for value in sorted(counts):
            reached += counts[value]
            if reached / total >= quantile:
                ends.append(value / len(values))
                break
    return tuple(ends)


@pytest.mark.parametrize("confidence", [0.95, 0.8, 0.5])
@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [0.1, 0.4, -0.3, 0.25, 0.7], [-1.0, 2.0, 4.0, 8.0]])
def test_bootstrap_interval_is_that_of_complete_enumeration(values, confidence):
    assert bootstrap_interval(values, confidence) == pytest.approx(exact_interval(values, confidence), abs=0.06)


def test_bootstrap_of_three_at_95_percent_is_their_range():
    # All three draws hit the smallest with probability 1/27 > 2.5 %.
    assert bootstrap_interval([0.3, -0.1, 0.2], 0.95) == pytest.approx((-0.1, 0.3))


def test_bootstrap_is_reproducible_and_shifts_with_the_values():
    values = [0.0, 0.5, 0.25, 0.75, 1.5, 0.125]
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([value + 2 for value in values]) == pytest.approx((low + 2, high + 2))
    assert bootstrap_interval([-value for value in values]) == pytest.approx((-high, -low), abs=0.02)


def test_bootstrap_width_approaches_the_normal_interval():
    values = [float(i % 10) for i in range(400)]
    low, high = bootstrap_interval(values, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * standard_deviation(values) / math.sqrt(400), rel=0.05)
    assert low < mean(values) < high


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_attainable_confidence_counts_the_sides_of_the_median(number):
    sides = list(itertools.product([False, True], repeat=number))
    assert attainable_confidence(number) == sum(len(set(s)) == 2 for s in sides) / len(sides)
