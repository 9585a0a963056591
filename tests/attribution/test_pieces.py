"""Gradients made a few rows at a time: the same numbers as those of whole matrices."""

import pytest
import torch
from test_estimators import evidence_for, known_samples
from tiny_decoders import VOCAB, tiny_gpt2, tiny_llama
from tiny_families import KINDS, member

from agcl.attribution import estimators as e
from agcl.attribution import pieces
from agcl.attribution.importance import ImportanceConfig, SampleAggregator
from agcl.attribution.passes import Sample
from agcl.attribution.pieces import Part, SampleGradients
from agcl.attribution.relevance import attribute_batch

CONFIGS = {
    "mean": ImportanceConfig(),
    "signed mean": ImportanceConfig(sign="positive"),
    "exact top-2": ImportanceConfig(sign="positive", top_k=2, top_k_method="exact"),
    "blocks": ImportanceConfig(top_k=2),
    "every sample a block": ImportanceConfig(top_k=3),
    "log scale": ImportanceConfig.paper(),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_CPU_PIECE", 50)  # 3 rows of the tiny models, and ragged ends


def scores(estimator, model, config, monkeypatch, *, whole):
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(SampleAggregator, "takes_pieces", False)
        evidence = evidence_for(model, known_samples(model), config=config)
        evidence.batch_size = 3
        return estimator.scores(evidence)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=2e-6, atol=1e-6 * float(score.max()), msg=name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_every_aggregation_is_what_it_is_of_whole_matrices(monkeypatch, build, config):
    model = build()
    for estimator in (e.LRP(), e.LRP(score="sensitivity")):
        found, expected = (scores(estimator, model, CONFIGS[config], monkeypatch, whole=whole) for whole in (0, 1))
        assert_same(found, expected)


@pytest.mark.parametrize("name", KINDS)
def test_every_family_is_scored_as_of_whole_matrices(monkeypatch, name):
    model = member(name, KINDS[name][0])
    for estimator in (e.GradientWeight(), e.EmpiricalFisher()):
        found, expected = (scores(estimator, model, ImportanceConfig(), monkeypatch, whole=whole) for whole in (0, 1))
        assert_same(found, expected)


def test_the_order_of_samples_counts_over_batches():
    """A batch's samples are added side by side, yet each belongs to the block of its place among all."""
    gradients = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    for options in ({"top_k": 2}, {"top_k": 2, "top_k_method": "exact"}, {"top_k": 3, "sign": "positive"}):
        one_by_one, in_batches = (SampleAggregator(ImportanceConfig(**options), num_planned=5) for _ in range(2))
        for gradient in gradients:
            one_by_one.update("w", gradient)
        for batch in gradients.split(3):
            whole = [[Part(torch.eye(4), gradient)] for gradient in batch]
            in_batches.update_batch("w", SampleGradients(torch.ones(4, 6), whole), lambda w, g: w * g)
        assert in_batches.num_samples == 5
        assert torch.equal(in_batches.pop("w"), one_by_one.pop("w"))


@pytest.mark.parametrize("skips_zeros", [False, True])
def test_pieces_make_up_the_gradient_of_a_tied_embedding(skips_zeros):
    """Looked up at the input, multiplied with at the output, twice in a row for one token and not at all for most."""
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(40, 10)
    parts, expected = [], []
    for ids in ([3, 3, 17], [38, 2, 39]):
        left, right, sent = torch.zeros(2, 40), torch.randn(2, 10, generator=generator), torch.randn(3, 10)
        left[0, 17], left[1, 5] = 2.0, -1.0
        parts.append([Part(left, right), Part(torch.tensor(ids), sent)])
        one_hot = torch.nn.functional.one_hot(torch.tensor(ids), 40).float()
        expected.append(left.T @ right + one_hot.T @ sent)
    found = torch.zeros(2, 40, 10)
    seen = []
    for rows, number, gradient in SampleGradients(like, parts).pieces(skips_zeros=skips_zeros):
        found[number, rows] += gradient
        seen += torch.arange(40)[rows].tolist() if number == 0 else []
    torch.testing.assert_close(found, torch.stack(expected))
    assert seen == ([2, 3, 5, 17, 38, 39] if skips_zeros else list(range(40)))


def test_rows_that_no_token_touches_are_left_out():
    """Of the tied embedding: those neither looked up nor a target. The last token is seen by no logit that counts."""
    model = tiny_llama()
    rows = {}

    def consume_pieces(name, gradients):
        found = [r for r, number, _ in gradients.pieces(skips_zeros=True) if number == 0]
        rows[name] = torch.cat([torch.arange(len(gradients.like))[r] for r in found]).tolist()

    batch = [
        Sample(torch.tensor([4, 6, 6, 9]), torch.tensor([1, 2]), torch.tensor([6, 9])),
        Sample(torch.tensor([4, 5, 8]), torch.tensor([1]), torch.tensor([8])),
    ]
    attribute_batch(model, batch, consume=lambda *_: None, consume_pieces=consume_pieces, only_correct=False)
    assert rows.pop("model.embed_tokens.weight") == [4, 5, 6, 8, 9]
    assert all(found == list(range(len(model.get_parameter(name)))) for name, found in rows.items())


def test_wrong_samples_are_left_out_of_the_pieces():
    model = tiny_llama()
    samples, counts = known_samples(model), set()
    samples[1].targets[0] = (samples[1].targets[0] + 1) % VOCAB
    flags = attribute_batch(
        model, samples, consume=lambda *_: None, consume_pieces=lambda name, g: counts.add(g.num_samples)
    )
    assert flags == [True, False, True]
    assert counts == {2}


class OfWholeMatrices(e.LRP):
    """A score that compares the entries of a tensor, and says nothing of pieces."""

    def score(self, parameter, gradient):
        assert gradient.shape in self.shapes
        return gradient / gradient.abs().max()


def test_a_score_that_is_not_marked_sees_whole_gradients():
    model = tiny_llama()
    estimator = OfWholeMatrices()
    estimator.shapes = {p.shape for p in model.parameters()}
    assert estimator.scores(evidence_for(model, known_samples(model)))
