import math

import pytest
import torch

from agcl.metrics import functional

NAN = math.nan
# Three tasks: row 0 before training, then after each task.
MATRIX = torch.tensor(
    [[0.10, 0.20, 0.30], [0.90, 0.25, 0.30], [0.70, 0.80, 0.50], [0.75, 0.40, 0.95]], dtype=torch.float64
)


def test_by_hand():
    assert functional.average_performance(MATRIX).item() == pytest.approx((0.75 + 0.40 + 0.95) / 3)
    assert functional.backward_transfer(MATRIX).item() == pytest.approx(((0.75 - 0.90) + (0.40 - 0.80)) / 2)
    assert functional.forgetting(MATRIX).item() == pytest.approx(((0.90 - 0.75) + (0.80 - 0.40)) / 2)
    assert functional.forward_transfer(MATRIX).item() == pytest.approx(((0.25 - 0.20) + (0.50 - 0.30)) / 2)
    assert functional.learning_accuracy(MATRIX).item() == pytest.approx((0.90 + 0.80 + 0.95) / 3)


def test_forgetting_is_measured_from_the_best_score_since_training_began():
    # The best of task 1 comes after it was learned, that of task 2 before; row 0 is higher still and does not count.
    matrix = torch.tensor([[0.9, 0.9, 0.0], [0.5, 0.7, 0.0], [0.8, 0.6, 0.0], [0.3, 0.6, 0.7]])
    expected = pytest.approx(((0.8 - 0.3) + (0.7 - 0.6)) / 2)
    assert functional.forgetting(matrix).item() == expected
    matrix[0] = NAN
    assert functional.forgetting(matrix).item() == expected
    matrix[1, 0] = NAN  # a gap in the rows that count
    assert functional.forgetting(matrix).item() == expected


def test_forgetting_of_a_task_never_measured_before_is_undefined():
    matrix = MATRIX.clone()
    matrix[1:3, 0] = NAN
    assert functional.forgetting(matrix).isnan()


def test_mid_sequence_counts_only_learned_tasks():
    partial = MATRIX.clone()
    partial[3] = NAN
    assert functional.num_learned(partial) == 2
    assert functional.average_performance(partial).item() == pytest.approx((0.70 + 0.80) / 2)
    assert functional.backward_transfer(partial).item() == pytest.approx(0.70 - 0.90)
    assert functional.forgetting(partial).item() == pytest.approx(0.90 - 0.70)
    assert functional.forward_transfer(partial).item() == pytest.approx(0.25 - 0.20)
    assert functional.learning_accuracy(partial).item() == pytest.approx((0.90 + 0.80) / 2)


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_undefined_is_nan(num_rows):
    matrix = torch.full((4, 3), NAN)
    matrix[:num_rows] = MATRIX[:num_rows].float()
    for function in (functional.backward_transfer, functional.forgetting, functional.forward_transfer):
        assert function(matrix).isnan()
    for function in (functional.average_performance, functional.learning_accuracy):
        assert function(matrix).isnan().item() == (num_rows < 2)


def test_forward_transfer_needs_the_scores_before_training():
    matrix = MATRIX.clone()
    matrix[0] = NAN
    assert functional.forward_transfer(matrix).isnan()
    assert not functional.backward_transfer(matrix).isnan()


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed):
    num_tasks = 2 + seed
    a = torch.rand(num_tasks + 1, num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, last = a.tolist(), num_tasks
    before = range(1, num_tasks)  # tasks 1 .. T-1, 1-based as in the papers
    bwt = sum(rows[last][i - 1] - rows[i][i - 1] for i in before) / (num_tasks - 1)
    drop = sum(max(rows[t][i - 1] for t in range(1, last)) - rows[last][i - 1] for i in before) / (num_tasks - 1)
    fwt = sum(rows[i - 1][i - 1] - rows[0][i - 1] for i in range(2, num_tasks + 1)) / (num_tasks - 1)
    assert functional.backward_transfer(a).item() == pytest.approx(bwt)
    assert functional.forgetting(a).item() == pytest.approx(drop)
    assert functional.forward_transfer(a).item() == pytest.approx(fwt)


@pytest.mark.parametrize("shape", [(3, 3), (3,), (1, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"A score matrix has shape \(T \+ 1, T\)"):
        functional.average_performance(torch.zeros(shape))
