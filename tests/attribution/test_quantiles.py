"""Quantiles and rank steps of rows: exact, and the same wherever the rows lie."""

import pytest
import torch

from agcl.attribution import quantiles


def scores(rows, columns, share_of_zeros):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    values = torch.rand(rows, columns, generator=generator).mul_(20).round_().div_(7)  # with ties
    return values.masked_fill_(torch.rand(rows, columns, generator=generator) < share_of_zeros, 0.0)


CASES = [(1, 1, 0), (1, 10, 0), (1, 1000, 0.3), (1, 50, 1), (4, 10, 0), (5, 300, 0.5), (3, 7, 1), (6, 9, 0.9)]


@pytest.mark.parametrize("quantile", [1e-6, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_quantile_is_the_smallest_value_that_its_share_of_nonzero_entries_reach(case, quantile):
    rows = scores(*case)
    found = quantiles.row_quantile(rows, quantile)
    for row, value in zip(rows, found, strict=True):
        nonzero = row[row > 0].sort().values
        # In integers: the least count k with k / n >= quantile.
        least = next((k for k in range(1, len(nonzero) + 1) if k >= quantile * len(nonzero) - 1e-9), 1)
        assert value.tolist() == ([nonzero[least - 1].item()] if len(nonzero) else [1.0])
    assert torch.equal(found, quantiles._row_quantile_on_device(rows, quantile))


@pytest.mark.parametrize("columns", [5, 300])
def test_rank_steps_are_where_the_level_steps_up(columns):
    rows, levels = scores(3, columns, 0.2), 15
    steps = quantiles.rank_steps(rows, levels)
    assert torch.equal(steps, steps.sort(dim=1).values)
    assert steps.shape == (3, min(columns, levels))
    if columns > levels:
        below = torch.stack([(row[:, None] > row).sum(1) for row in rows])
        wanted = (levels * below / columns + 0.5).floor().long()
        assert torch.equal(torch.searchsorted(steps, rows), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu_have_the_same():
    for case in CASES:
        rows = scores(*case)
        assert torch.equal(quantiles.row_quantile(rows.cuda(), 0.1).cpu(), quantiles.row_quantile(rows, 0.1))
        assert torch.equal(quantiles.rank_steps(rows.cuda(), 4).cpu(), quantiles.rank_steps(rows, 4))
