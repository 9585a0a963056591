import pickle

import pytest
import torch
import torch.distributed as dist
from matplotlib import colors
from matplotlib.figure import Figure
from torchmetrics import MetricCollection

from agcl.errors import AgclError
from agcl.metrics import (
    AveragePerformance,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    ScoreMatrix,
    functional,
    plot_score_matrix,
)

MATRIX = torch.tensor(
    [[0.10, 0.20, 0.30], [0.90, 0.25, 0.30], [0.70, 0.80, 0.50], [0.75, 0.40, 0.95]], dtype=torch.float64
)
CLASSES = {
    AveragePerformance: functional.average_performance,
    BackwardTransfer: functional.backward_transfer,
    Forgetting: functional.forgetting,
    ForwardTransfer: functional.forward_transfer,
    LearningAccuracy: functional.learning_accuracy,
}


def fill(metric, matrix=MATRIX, **options):
    for learned, row in enumerate(matrix):
        for task, score in enumerate(row):
            metric.update(learned, task, score, **options)
    return metric


def test_matrix_holds_what_was_entered_and_nan_elsewhere():
    matrix = ScoreMatrix(3)
    matrix.update(1, 0, 0.5)
    matrix.update(3, 2, torch.tensor(0.25))
    result = matrix.compute()
    assert result.shape == (4, 3)
    assert result[1, 0] == 0.5
    assert result[3, 2] == 0.25
    assert result.isnan().sum() == 10
    assert torch.equal(fill(ScoreMatrix(3)).compute(), MATRIX)


def test_entering_a_score_again_changes_nothing():
    assert torch.equal(fill(fill(ScoreMatrix(3))).compute(), MATRIX)


@pytest.mark.parametrize(("metric_class", "function"), CLASSES.items())
def test_metrics_follow_from_the_matrix(metric_class, function):
    metric = fill(metric_class(3))
    assert metric.compute() == function(MATRIX)
    assert metric.higher_is_better is (metric_class is not Forgetting)


def test_collection_shares_one_state():
    collection = fill(MetricCollection({cls.__name__: cls(3) for cls in CLASSES}))
    assert len(collection.compute_groups) == 1
    for cls, function in CLASSES.items():
        assert collection.compute()[cls.__name__] == function(MATRIX)


def test_pickle_state_dict_and_reset():
    metric = fill(BackwardTransfer(3))
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    restored = BackwardTransfer(3)
    restored.load_state_dict(metric.state_dict())
    assert restored.compute() == metric.compute()
    metric.reset()
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0, 0.5), r"`learned` is 4; with 3 tasks it lies in \[0, 3\]"),
        ((-1, 0, 0.5), r"`learned` is -1"),
        ((1, 3, 0.5), r"`task` is 3; with 3 tasks it lies in \[0, 2\]"),
        ((1, 0, float("nan")), "score of task 0 after 1 tasks is nan"),
    ],
)
def test_bad_updates_are_refused(arguments, message):
    with pytest.raises(AgclError, match=message):
        ScoreMatrix(3).update(*arguments)


def test_plots():
    figure, axes = fill(ScoreMatrix(3)).plot()
    assert sorted(text.get_text() for text in axes.texts) == sorted(f"{v:.2f}" for v in MATRIX.flatten())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["task 1", "task 2", "task 3"]
    figure, axes = fill(BackwardTransfer(3)).plot()
    assert figure is axes.figure


def test_without_numbers_the_colours_are_the_same():
    with_numbers, without = (
        plot_score_matrix(MATRIX, ["a", "b", "c"], numbers=numbers)[1] for numbers in (True, False)
    )
    assert len(with_numbers.texts) == 12
    assert not without.texts
    assert (with_numbers.images[0].get_array() == without.images[0].get_array()).all()


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_cell_text_stands_out_from_its_cell():
    values = torch.linspace(0, 1, 110).view(11, 10)
    _, axes = plot_score_matrix(values, [f"t{i}" for i in range(10)])
    image = axes.images[0]
    for text, value in zip(axes.texts, values.flatten().tolist(), strict=True):
        dark, light = sorted((luminance(text.get_color()), luminance(image.cmap(image.norm(value))[:3])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, value  # WCAG 2, level AA


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 15])
def test_a_long_title_stays_inside_and_keeps_names_with_their_numbers(num_tasks):
    names = "average performance", "backward transfer", "forgetting", "forward transfer", "learning accuracy"
    parts = [f"{name} -0.123" for name in names]
    matrix = torch.zeros(num_tasks + 1, num_tasks)
    figure, axes = plot_score_matrix(matrix, [f"task{i}" for i in range(num_tasks)], title=", ".join(parts))
    figure.draw_without_rendering()
    title = axes.title.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width
    assert title.y1 <= figure.bbox.height
    lines = axes.get_title().replace("\u00a0", " ").splitlines()
    assert [part for line in lines for part in line.rstrip(",").split(", ")] == parts


def test_joint_training_is_drawn_as_before_and_after():
    matrix = MATRIX.clone()
    matrix[1:-1] = torch.nan
    _, axes = plot_score_matrix(matrix, ["a", "b", "c"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before training", "after joint training"]
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.20", "0.30", "0.75", "0.40", "0.95"]
    assert {text.get_fontweight() for text in axes.texts} == {"normal"}


def test_a_matrix_can_be_drawn_on_given_axes():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_score_matrix(MATRIX, ["a", "b", "c"], ax=right, title="right") == (figure, right)
    assert not left.images
    assert list(figure.get_size_inches()) == [6.4, 4.8]


def _rank(rank, init_file, results):
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    matrix, transfer = ScoreMatrix(2), BackwardTransfer(2)
    for metric in (matrix, transfer):
        # Rank 0 scores three rows of a task, rank 1 one row of it; rank 1 alone scores the other task.
        metric.update(1, 0, 1.0, weight=3)
        metric.update(2, 0, [1.0, 0.0][rank], weight=[3, 1][rank])
        if rank == 1:
            metric.update(2, 1, 0.5)
    torch.save((matrix.compute(), transfer.compute()), f"{results}.{rank}")
    dist.destroy_process_group()


def test_ranks_merge_to_the_weighted_mean(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path / "init", tmp_path / "result"), nprocs=2)
    for rank in range(2):
        matrix, transfer = torch.load(f"{tmp_path / 'result'}.{rank}")
        assert matrix[1, 0] == 1.0
        assert matrix[2].tolist() == [0.75, 0.5]
        assert transfer == pytest.approx(0.75 - 1.0)
