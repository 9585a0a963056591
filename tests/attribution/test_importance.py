import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from agcl.attribution import importance as module
from agcl.attribution.importance import (
    ImportanceConfig,
    SampleAggregator,
    log_scale,
    normalise,
)
from agcl.attribution.levels import dequantise, quantise
from agcl.errors import AgclError

SHAPES = {"matrix": (7, 5), "vector": (6,), "experts": (2, 3, 4)}


def samples(count, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [
        {name: scale * torch.randn(shape, generator=generator) ** 3 for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def reference_scores(relevances, config):
    """Eq. 10 in float64, all samples at once."""
    scores = {}
    for name in SHAPES:
        values = np.stack([sample[name].double().numpy() for sample in relevances])
        if config.sign == "absolute":
            values = np.abs(values)
        if config.normalisation == "log":
            largest = np.abs(values).reshape(len(values), -1).max(1).reshape(-1, *[1] * (values.ndim - 1))
            values = np.sign(values) * np.log1p(config.alpha * np.abs(values) / largest) / np.log1p(config.alpha)
        kept = np.sort(values, axis=0)[::-1][: config.top_k]
        scores[name] = np.clip(kept.mean(0), 0, None)
    return scores


@pytest.mark.parametrize("num_samples", [1, 3, 20])
@pytest.mark.parametrize("top_k", [None, 1, 8])
@pytest.mark.parametrize("sign", ["positive", "absolute"])
@pytest.mark.parametrize("normalisation", ["log", "quantile"])
def test_aggregation_equals_the_naive_reference(monkeypatch, num_samples, top_k, sign, normalisation):
    monkeypatch.setattr(module, "_CPU_CHUNK", 8)  # several chunks and a ragged one
    config = ImportanceConfig(sign=sign, normalisation=normalisation, top_k=top_k, top_k_method="exact")
    relevances = samples(num_samples, scale=1e-9)  # float16 would flush unscaled relevance of this size to zero
    aggregator = SampleAggregator(config)
    for index, sample in enumerate(relevances):
        for name in sorted(sample, reverse=bool(index % 2)):
            before = sample[name].clone()
            aggregator.update(name, sample[name])
            assert torch.equal(sample[name], before)
    assert aggregator.num_samples == num_samples
    # float32 mean; float16 (2^-11) and bfloat16 (2^-8) buffers for the top-K mean.
    tolerance = 1e-6 if top_k is None else (2**-11 if normalisation == "log" else 2**-8)
    expected = reference_scores(relevances, config)
    scores = aggregator.aggregate()
    assert set(scores) == set(SHAPES)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        largest = np.abs(np.stack([sample[name].numpy() for sample in relevances])).max()
        bound = tolerance * (1 if normalisation == "log" else largest)
        np.testing.assert_allclose(score.numpy(), expected[name], rtol=0, atol=bound)
    assert aggregator.aggregate() == {}


def test_top_k_mean_of_negative_relevance_is_not_padded_with_zeros():
    aggregator = SampleAggregator(ImportanceConfig(sign="positive", top_k=8, top_k_method="exact"))
    for value in (4.0, -2.0):
        aggregator.update("weight", torch.tensor([value, -1.0]))
    # (4 - 2) / 2, not 4 / 1 or 2 / 8; a negative mean is clipped.
    assert aggregator.pop("weight").tolist() == [1.0, 0.0]


def aggregated(relevances, num_planned, **options):
    aggregator = SampleAggregator(ImportanceConfig(**options), num_planned)
    for sample in relevances:
        for name, relevance in sample.items():
            aggregator.update(name, relevance)
    return aggregator.aggregate()


@pytest.mark.parametrize("lengths", [(2,) * 8, (3, 3), (2, 1, 2), (4, 3, 4, 3), (1, 1, 2), (6,), (1,) * 5])
@pytest.mark.parametrize("sign", ["positive", "absolute"])
@pytest.mark.parametrize("normalisation", ["log", "quantile"])
def test_blocks_equal_the_mean_of_block_maxima(monkeypatch, lengths, sign, normalisation):
    monkeypatch.setattr(module, "_CPU_CHUNK", 8)
    num_samples, top_k = sum(lengths), len(lengths)
    cuts = [-(-block * num_samples // top_k) for block in range(top_k + 1)]
    assert sorted(np.diff(cuts)) == sorted(lengths)
    relevances = samples(num_samples, scale=1e-9)
    options = {"sign": sign, "normalisation": normalisation}
    found = aggregated(relevances, num_samples, top_k=top_k, top_k_method="blocks", **options)
    for name, score in found.items():
        values = np.stack([sample[name].double().numpy() for sample in relevances])
        if normalisation == "log":
            values = np.stack([log_scale(sample[name]).double().numpy() for sample in relevances])
        values = np.abs(values) if sign == "absolute" else values
        maxima = [values[start:end].max(0) for start, end in pairwise(cuts)]
        expected = np.clip(np.mean(maxima, axis=0), 0, None)
        bound = 2**-11 if normalisation == "log" else 2**-8 * np.abs(values).max()
        np.testing.assert_allclose(score.numpy(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("sign", ["positive", "absolute"])
@pytest.mark.parametrize("num_samples", [1, 5, 16])
def test_limits_of_blocks(sign, num_samples):
    relevances = samples(num_samples)
    everything = aggregated(relevances, None, sign=sign)
    for top_k in (num_samples, num_samples + 3):
        found = aggregated(relevances, num_samples, sign=sign, top_k=top_k, top_k_method="blocks")
        assert all(torch.equal(found[name], everything[name]) for name in SHAPES)
    largest = aggregated(relevances, None, sign=sign, top_k=1, top_k_method="exact")
    for num_planned in (2, num_samples + 1, 2 * num_samples):  # fewer and more than there are
        found = aggregated(relevances, num_planned, sign=sign, top_k=1, top_k_method="blocks")
        assert all(torch.equal(found[name], largest[name]) for name in SHAPES)


@pytest.mark.parametrize("num_planned", [16, 23, 40])
@pytest.mark.parametrize("num_samples", [1, 3, 8, 13, 16, 40])
def test_blocks_are_never_above_the_exact_mean(num_planned, num_samples):
    """However many samples turn out to come; and, with as many as planned, not below the plain mean either."""
    relevances = samples(num_samples)
    exact = aggregated(relevances, None, top_k=8, top_k_method="exact")
    blocks = aggregated(relevances, num_planned, top_k=8, top_k_method="blocks")
    mean = aggregated(relevances, None)
    for name in SHAPES:
        assert (blocks[name] <= exact[name] * (1 + 2**-7)).all()
        assert (blocks[name] > 0).all()
        if num_planned == num_samples == 16:
            assert (blocks[name] >= mean[name] * (1 - 2**-7)).all()


def test_blocks_missed_by_an_expert_count_as_zero():
    aggregator = SampleAggregator(ImportanceConfig(top_k=4, top_k_method="blocks"), num_planned=8)
    for index in range(8):
        aggregator.update("always", torch.ones(1))
        if index % 2:
            aggregator.update("expert", torch.tensor([float(index)]))
        if index == 4:
            aggregator.update("seldom", torch.tensor([3.0]))
    assert aggregator.num_samples == 8
    assert aggregator.pop("always").item() == 1.0
    assert aggregator.pop("expert").item() == (3 + 7) / 4  # values 1, 3 | 5, 7; exact: 4
    assert aggregator.pop("seldom").item() == 3.0


def test_blocks_must_know_how_many_samples_come():
    for num_planned in (None, 0):
        with pytest.raises(AgclError, match=f"`num_planned` is {num_planned}; `top_k_method` 'blocks' needs"):
            SampleAggregator(ImportanceConfig(top_k=2), num_planned)
    SampleAggregator(ImportanceConfig())


def test_mean_counts_a_parameter_that_a_sample_missed_as_zero():
    aggregator = SampleAggregator(ImportanceConfig())
    for index in range(4):
        aggregator.update("always", torch.ones(1))
        if index == 2:
            aggregator.update("once", torch.full((1,), -2.0))
    assert aggregator.pop("once").item() == 0.5
    assert aggregator.pop("always").item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_aggregator_takes_other_dtypes_and_strides(dtype):
    relevance = torch.randn(4, 6).to(dtype).T
    blocks = ImportanceConfig(top_k=2)
    for config in (ImportanceConfig.paper(), ImportanceConfig(), replace(blocks, top_k_method="exact"), blocks):
        aggregator, plain = (SampleAggregator(config, num_planned=4) for _ in range(2))
        for factor in (1, -2, 4, 0.5):
            aggregator.update("weight", factor * relevance)
            plain.update("weight", factor * relevance.float().contiguous())
        torch.testing.assert_close(aggregator.pop("weight"), plain.pop("weight"), rtol=1e-3, atol=1e-3)


def test_aggregator_refuses_another_shape():
    aggregator = SampleAggregator(ImportanceConfig())
    aggregator.update("head.weight", torch.ones(2, 3))
    with pytest.raises(AgclError, match=r"`head.weight` has shape \(3, 2\).*\(2, 3\)"):
        aggregator.update("head.weight", torch.ones(3, 2))


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_log_scale_against_its_formula(magnitude):
    relevance = samples(1)[0]["matrix"] * magnitude
    exact = relevance.double()
    expected = exact.sign() * torch.log1p(100 * exact.abs() / exact.abs().max()) / math.log1p(100)
    torch.testing.assert_close(log_scale(relevance, 100).double(), expected, rtol=1e-5, atol=1e-6)


def test_log_scale_of_zeros_and_of_nothing():
    assert torch.equal(log_scale(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert log_scale(torch.zeros(0, 3)).shape == (0, 3)
    assert log_scale(torch.tensor([1e-42, 0.0])).isfinite().all()


def levels(scores, **options):
    options = {"normalisation": "quantile", "scope": "tensor", **options}
    return normalise({name: torch.tensor(score) for name, score in scores.items()}, ImportanceConfig(**options))


def test_quantile_ignores_zeros():
    # Non-zero entries 1, 2, 3, 4; the median by the inverse of the empirical CDF is 2.
    result = levels({"weight": [[0.0, 4.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0]]}, quantile=0.5)
    expected = [[0.0, 4 / 6, 0.0, 2 / 4], [0.0, 1 / 3, 3 / 5, 0.0]]
    assert torch.equal(result["weight"], quantise(torch.tensor(expected)))


def test_quantile_per_row_and_over_the_model():
    scores = {"weight": [[0.0, 1.0, 3.0], [10.0, 0.0, 30.0], [0.0, 0.0, 0.0]], "bias": [0.0, 100.0]}
    by_row = levels(scores, scope="row", quantile=0.5)
    expected = [[0, 1 / 2, 3 / 4], [1 / 2, 0, 3 / 4], [0.0, 0.0, 0.0]]
    assert torch.equal(by_row["weight"], quantise(torch.tensor(expected)))
    assert by_row["bias"].tolist() == [0, 128]
    # Non-zero entries of the model: 1, 3, 10, 30, 100.
    by_model = levels(scores, scope="model", quantile=0.5)
    assert torch.equal(by_model["bias"], quantise(torch.tensor([0.0, 100 / 110])))
    assert by_model["weight"][0].tolist() == [0, round(255 / 11), round(255 * 3 / 13)]


@pytest.mark.parametrize("quantile", [0.1, 0.7, 0.9, 0.999])
def test_quantile_agrees_with_numpy(quantile):
    score = torch.rand(23, 11).double().pow(4).float() * (torch.rand(23, 11) > 0.3)
    half = np.quantile(score[score > 0].numpy(), quantile, method="inverted_cdf")
    expected = quantise(score / (score + half))
    assert torch.equal(levels({"weight": score.tolist()}, quantile=quantile)["weight"], expected)


@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
@pytest.mark.parametrize("normalisation", ["quantile", "rank", "log"])
def test_zeros_stay_zero_and_edge_shapes_pass(normalisation, scope):
    scores = {"zero": torch.zeros(3, 4), "some": torch.tensor([0.0, 0.5]), "scalar": torch.tensor(0.5)}
    scores |= {"empty": torch.zeros(0, 3)}
    shapes = {name: score.shape for name, score in scores.items()}
    result = normalise(scores, ImportanceConfig(normalisation=normalisation, scope=scope))
    assert scores == {}
    assert {name: value.shape for name, value in result.items()} == shapes
    assert all(value.dtype == torch.uint8 for value in result.values())
    assert not result["zero"].any()
    assert result["some"][0] == 0
    assert result["some"][1] > 0


def test_rank_by_hand():
    result = levels({"weight": [[0.0, 5.0], [1.0, 1.0]], "bias": [7.0]}, normalisation="rank")
    assert torch.equal(result["weight"], quantise(torch.tensor([[0.0, 3 / 4], [1 / 4, 1 / 4]])))
    assert result["bias"].tolist() == [0]
    by_row = levels({"weight": [[0.0, 5.0], [1.0, 1.0]]}, normalisation="rank", scope="row")
    assert by_row["weight"].tolist() == [[0, 128], [0, 0]]
    by_model = levels({"weight": [[0.0, 5.0], [1.0, 1.0]], "bias": [7.0]}, normalisation="rank", scope="model")
    assert by_model["bias"].tolist() == [round(255 * 4 / 5)]


@pytest.mark.parametrize("size", [1, 2, 100, 255, 256, 5000])
def test_rank_is_the_count_below_rounded_to_nearest(size):
    score = (torch.rand(size) * 300).round()  # with ties and zeros
    below = (score[None] < score[:, None]).sum(1).double() / size
    error = (levels({"w": score.tolist()}, normalisation="rank")["w"].double() - 255 * below).abs()
    assert error.max() <= 0.5


@pytest.mark.parametrize("normalisation", ["rank", "quantile"])
def test_model_scope_by_sample_is_close_and_deterministic(monkeypatch, normalisation):
    config = ImportanceConfig(normalisation=normalisation, scope="model")
    scores = {"a": torch.rand(300, 512), "b": torch.rand(100, 512) * 2}
    exact = normalise({name: score.clone() for name, score in scores.items()}, config)
    monkeypatch.setattr(module, "_MODEL_SAMPLE_ENTRIES", 2**14)
    sampled = [normalise({name: score.clone() for name, score in scores.items()}, config) for _ in range(2)]
    for name in scores:
        assert torch.equal(sampled[0][name], sampled[1][name])
        # Four standard errors of a rank, 0.5 / sqrt(2^14) each, in steps of 1 / 255, and rounding.
        assert (sampled[0][name].int() - exact[name].int()).abs().max() <= 255 * 4 * 0.5 / 2**7 + 1
    assert not torch.equal(sampled[0]["a"], exact["a"])


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_normalise_refuses_bad_scores_by_name(bad):
    with pytest.raises(AgclError, match=r"`layer\.weight`"):
        levels({"fine": [1.0], "layer.weight": [1.0, bad]})


def test_log_importance_is_the_score_itself():
    score = torch.rand(5000)
    error = levels({"w": score.tolist()}, normalisation="log")["w"].double() - 255 * score.double()
    # Normalising multiplies in float32, whose rounding may decide a tie: half a step, and an ulp of 255.
    assert error.abs().max() <= 0.5 + 2**-16


def test_fixed_point_is_within_half_a_step_and_exact_at_the_ends():
    values = torch.linspace(0, 1, 10_001)
    restored = dequantise(quantise(values.clone()))
    assert (restored - values).abs().max() <= 1 / 510 + 1e-7
    assert restored[0] == 0
    assert restored[-1] == 1
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(dequantise(every)), every)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("sign", "negative", "'positive', 'absolute'"),
        ("normalisation", "softmax", "'log', 'rank', 'quantile'"),
        ("scope", "block", "'row', 'tensor', 'layer', 'model'"),
        ("quantile", 1.0, "between 0 and 1"),
        ("quantile", math.nan, "between 0 and 1"),
        ("top_k", 0, ">= 1"),
        ("top_k_method", "approximate", "'exact', 'blocks'"),
        ("alpha", 0.0, "above 0"),
    ],
)
def test_config_names_option_and_allowed_values(option, value, allowed):
    with pytest.raises(AgclError, match=f"`{option}` is .*{allowed}"):
        ImportanceConfig(**{option: value})


def test_config_of_the_paper():
    paper = ImportanceConfig.paper()
    assert (paper.sign, paper.normalisation, paper.top_k) == ("positive", "log", 8)
    assert paper.top_k_method == "exact"


def test_scope_layer_compares_within_each_block():
    scores = {
        "layers.0.a": torch.tensor([1.0, 2.0]),
        "layers.0.b": torch.tensor([3.0, 4.0]),
        "layers.1.a": torch.tensor([10.0, 20.0]),
        "norm": torch.tensor([7.0]),
    }
    found = normalise(scores, ImportanceConfig(normalisation="rank", scope="layer"))
    expected = {"layers.0.a": [0, 64], "layers.0.b": [128, 191], "layers.1.a": [0, 128], "norm": [0]}
    assert {name: levels.tolist() for name, levels in found.items()} == expected


def test_scores_may_be_taken_as_they_are():
    found = normalise({"w": torch.tensor([0.0, 0.2, 1.0, 3.0])}, ImportanceConfig(normalisation="none"))
    assert found["w"].tolist() == [0, 51, 255, 255]


@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
@pytest.mark.parametrize("shape", [(3, 50), (2, 70_000)])  # fewer and more entries than levels
def test_rank_in_16_bits_is_the_count_below_rounded_to_nearest(shape, scope):
    score = (torch.rand(shape) * 20_000).round()  # with ties
    config = ImportanceConfig(normalisation="rank", scope=scope)
    found = normalise({"w": score.clone()}, config, bits=16)["w"]
    assert found.dtype == torch.uint16
    for rows, levels_found in zip(*([score, found] if scope == "row" else [score[None], found[None]]), strict=True):
        ordered = rows.flatten().sort().values
        below = torch.searchsorted(ordered, rows.flatten()).double() / rows.numel()
        assert (levels_found.flatten().double() - 65535 * below).abs().max() <= 0.5


@pytest.mark.parametrize("normalisation", ["quantile", "log", "none"])
def test_16_bits_are_the_same_importance_more_finely(normalisation):
    score = torch.rand(40, 60)
    config = ImportanceConfig(normalisation=normalisation)
    fine = normalise({"w": score.clone()}, config, bits=16)["w"]
    coarse = normalise({"w": score.clone()}, config)["w"]
    assert (dequantise(fine) - dequantise(coarse)).abs().max() <= 1 / 510 + 1 / 131070 + 1e-7
    quantile = score.double().flatten().sort().values[math.ceil(0.9 * score.numel()) - 1]
    exact = score.double() / (score + quantile) if normalisation == "quantile" else score.double()
    assert (fine.double() / 65535 - exact).abs().max() <= 1 / 131070 + 1e-6
