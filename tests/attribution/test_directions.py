import pytest
import torch
from tiny_decoders import IDS, POSITIONS, TARGETS, tiny_gpt2, tiny_llama
from tiny_families import member

from agcl.attribution.computing import compute_input_moments
from agcl.attribution.directions import InputMoments, MomentSums, find_matrices, input_moments, is_seen, shares_kept
from agcl.attribution.estimators import LRP, SPG, Evidence, Fisher
from agcl.attribution.passes import Sample
from agcl.attribution.relevance import attribute_batch
from agcl.errors import AgclError, UnsupportedModelError

SAMPLE = Sample(IDS[0], POSITIONS, TARGETS)
LONGER = Sample(torch.tensor([1, 4, 4, 8, 2, 11, 20, 6, 3]), torch.tensor([2, 5, 7]), torch.tensor([1, 2, 3]))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Scaled(torch.autograd.Function):
    """A product out of sight."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(context, upstream):
        x, weight = context.saved_tensors
        return upstream * weight, (upstream * x).sum_to_size(weight.shape)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def evidence_of(model, samples, **options):
    return Evidence(model, names_of(model), samples, len(samples), **{"only_correct": False, **options})


def moments_of(evidence, estimator, **options):
    matrices = find_matrices(evidence.model, evidence.parameters, SAMPLE, "none")
    return input_moments(evidence, estimator, MomentSums(matrices, **options)).sums


def reference(model, name, samples, weighted=True):
    """By module hooks, one sample at a time."""
    module, total = model.get_submodule(name.removesuffix(".weight")), 0
    for sample in samples:
        seen = {}

        def keep(module, args, output, seen=seen):
            seen["x"] = args[0].detach()[0]
            output.register_hook(lambda gradient: seen.update(g=gradient[0]))

        handle = module.register_forward_hook(keep)
        logits = model(sample.input_ids[None]).logits[0]
        logits[sample.positions, sample.targets].sum().backward()
        handle.remove()
        weights = seen["g"].square().sum(1)
        weights = weights if weighted else (weights > 1e-12 * weights.max()).double()
        total = total + torch.einsum("t,ti,tj->ij", weights, seen["x"], seen["x"])
    return total


def test_matrices_are_the_linear_maps_alone():
    found = find_matrices(tiny_llama(), names_of(tiny_llama()), SAMPLE, "attnlrp")
    assert len(found) == 14
    assert all(name.split(".")[-2] in PROJECTIONS and not is_transposed for name, is_transposed in found.items())
    untied = tiny_llama(tied=False)
    assert "lm_head.weight" in find_matrices(untied, names_of(untied), SAMPLE, "attnlrp")
    gpt2 = find_matrices(tiny_gpt2(), names_of(tiny_gpt2()), SAMPLE, "none")
    assert set(gpt2.values()) == {True}
    assert all(name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) for name in gpt2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("batch_size", "weighted"), [(1, True), (2, True), (2, False)])
def test_moments_are_the_inputs_weighted_by_the_squared_gradient_at_the_output(make, batch_size, weighted):
    model, samples = make(), [SAMPLE, LONGER]
    moments = moments_of(evidence_of(model, samples, batch_size=batch_size), LRP(rule="none"), weighted=weighted)
    assert moments
    for name, moment in moments.items():
        expected = reference(model, name, samples, weighted)
        assert torch.allclose(moment.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()), name


@pytest.mark.parametrize(
    "estimator",
    [LRP(), LRP(score="sensitivity"), Fisher(), SPG()],
    ids=["whole", "pieces", "drawn labels", "no by_entry"],
)
def test_moments_can_be_seen_while_the_parameters_are_scored(estimator):
    model, samples = tiny_llama(), [SAMPLE, LONGER, LONGER]  # the last one is a batch of its own
    expected = moments_of(evidence_of(model, samples, batch_size=2), estimator)
    sums = MomentSums(find_matrices(model, names_of(model), SAMPLE, estimator.rule))
    scores = estimator.scores(evidence_of(model, samples, batch_size=2))
    observed = estimator.scores(evidence_of(model, samples, batch_size=2, observe=sums.observe))
    for name, score in scores.items():
        torch.testing.assert_close(observed[name], score, rtol=1e-4, atol=1e-6 * float(score.max()), msg=name)
    assert sums.moments().sums.keys() == expected.keys()
    for name, moment in sums.moments().sums.items():
        assert torch.allclose(moment, expected[name], rtol=1e-4, atol=1e-6 * float(moment.max())), name


def test_where_samples_cannot_be_told_apart_nothing_is_seen():
    model = member("mixtral")
    assert is_seen(tiny_llama(), names_of(tiny_llama()), SAMPLE, LRP())
    assert not is_seen(model, names_of(model), SAMPLE, LRP())
    assert is_seen(model, [name for name in names_of(model) if "experts" not in name], SAMPLE, LRP())
    hidden = tiny_llama()
    hidden.model.norm.forward = lambda x, norm=hidden.model.norm: Scaled.apply(x, norm.weight)
    assert not is_seen(hidden, names_of(hidden), SAMPLE, LRP(rule="none"))
    with pytest.raises(UnsupportedModelError, match="`observe` cannot see"):
        attribute_batch(model, [SAMPLE, LONGER], consume=lambda *_: None, observe=lambda *_: None)


def test_a_direction_that_no_input_has_does_not_count():
    model = tiny_llama()
    moments = moments_of(evidence_of(model, [SAMPLE]), LRP())
    for moment in moments.values():  # 7 tokens, of which at most 7 directions are met
        values = torch.linalg.eigvalsh(moment.double())
        assert values[-1] > 0
        assert values[: len(moment) - 7].abs().max() < 1e-5 * values[-1]


def test_rows_answered_wrongly_do_not_count():
    model = tiny_llama()
    right = model(LONGER.input_ids[None]).logits[0, LONGER.positions].argmax(-1)
    known = Sample(LONGER.input_ids, LONGER.positions, right)
    evidence = evidence_of(model, [SAMPLE, known], batch_size=2, only_correct=True)
    moments = moments_of(evidence, LRP())
    alone = moments_of(evidence_of(model, [known]), LRP())
    assert evidence.num_used == 1
    for name, moment in moments.items():
        assert torch.allclose(moment, alone[name], rtol=1e-4, atol=1e-6 * float(alone[name].abs().max()))
    nothing = evidence_of(model, [SAMPLE], only_correct=True)
    assert moments_of(nothing, LRP()) == {}
    assert nothing.num_used == 0


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("plasticity", [0.1, 0.5, 0.9])
def test_shares_are_soft_and_have_the_wanted_mean(plasticity, sharpness):
    importance = torch.tensor([3.0, 1e-3, 50.0, 0.2])
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    shares, directions = shares_kept((rotation * importance) @ rotation.T, plasticity, sharpness)
    assert float(shares.mean()) == pytest.approx(plasticity, abs=1e-5)
    ratios = torch.logit(shares.double()).neg() / sharpness  # log(a / c)
    between = (shares > 1e-4) & (shares < 1 - 1e-4)
    log_c = (importance.sort().values.log() - ratios)[between]
    assert between.any()
    assert torch.allclose(log_c, log_c.mean().expand_as(log_c), atol=1e-2)
    assert abs(float(directions[:, -1] @ rotation[:, 2])) == pytest.approx(1, abs=1e-4)


def test_where_most_directions_are_free_the_others_are_closed():
    shares, _ = shares_kept(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])), 0.5)
    assert torch.allclose(shares, torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_rounding_errors_close_no_direction():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    moment = rotation[:, :4] @ rotation[:, :4].T  # the eigenvalues of the other 60 are rounding errors, not zero
    assert torch.linalg.eigvalsh(moment)[:60].abs().max() > 0
    shares, _ = shares_kept(moment, 0.5)
    assert shares[:60].min() > 0.8
    assert torch.allclose(shares[60:], torch.zeros(4))


def test_sharper_shares_hold_what_matters_most_more_and_fewer_directions():
    moment = torch.diag(torch.logspace(-4, 0, 32))
    soft, sharp = (shares_kept(moment, 0.8, sharpness)[0] for sharpness in (1.0, 4.0))
    assert float(soft.mean()) == pytest.approx(0.8, abs=1e-5)
    assert float(sharp.mean()) == pytest.approx(0.8, abs=1e-5)
    assert sharp[-1] < soft[-1] / 100
    assert (sharp < 254 / 255).sum() < (soft < 254 / 255).sum() / 2  # columns to multiply with


def test_moments_are_added_up_in_float32_under_autocast():
    model = tiny_llama().float()
    with torch.autocast("cpu", torch.bfloat16):
        moments = moments_of(evidence_of(model, [SAMPLE, LONGER], batch_size=2), LRP())
    wide = moments_of(evidence_of(model, [SAMPLE, LONGER], batch_size=2), LRP())
    for name, moment in moments.items():
        assert moment.dtype == torch.float32
        assert not torch.equal(moment, moment.bfloat16().float())
        assert torch.allclose(moment, wide[name], atol=0.1 * float(wide[name].abs().max())), name


def test_moments_that_are_no_numbers_make_no_map():
    moments = InputMoments({"weight": torch.eye(3).fill_diagonal_(torch.nan)}, {"weight": False})
    with pytest.raises(AgclError, match="inputs of `weight` are not finite; compute them anew"):
        moments.maps()


def test_moments_of_tasks_add_up_and_make_maps():
    model = tiny_llama().float()
    rows = [{"input_ids": s.input_ids, "labels": torch.full_like(s.input_ids, -100)} for s in (SAMPLE, LONGER)]
    for row, sample in zip(rows, (SAMPLE, LONGER), strict=True):
        row["labels"][-1] = sample.input_ids[-1]
    both = compute_input_moments(model, rows, only_correct=False)
    each = [compute_input_moments(model, [row], only_correct=False) for row in rows]
    together = InputMoments() + each[0] + each[1]
    assert together.transposed == both.transposed
    for name, moment in both.sums.items():
        assert torch.allclose(moment, together.sums[name], rtol=1e-4, atol=1e-6 * float(moment.max()))
    for name, (held, is_transposed) in both.maps(0.6).items():
        assert not is_transposed
        shares, directions = shares_kept(both.sums[name], 0.6)
        assert float(shares.mean()) > 0.6 - 1e-5  # more, where rows are few and inputs wide
        assert 1 - float(held.square().sum()) / len(held) == pytest.approx(float(shares.mean()), abs=1 / 255), name
        expected = (directions * (1 - shares)) @ directions.T
        assert torch.allclose(held @ held.T, expected, atol=1.01 / 255)  # hardly held directions are left out
        random = both.maps(0.6, control="shuffled", seed=1)[name][0]
        assert torch.allclose(torch.linalg.svdvals(random), torch.linalg.svdvals(held), atol=1e-4)
        assert not torch.allclose(random, held, atol=0.1)
    with pytest.raises(AgclError, match=r"`plasticity` is 1\.5"):
        both.maps(1.5)
    with pytest.raises(AgclError, match="`sharpness` is 0"):
        both.maps(0.6, sharpness=0)
    with pytest.raises(AgclError, match="No row is answered correctly"):
        compute_input_moments(model, rows)
    with pytest.raises(AgclError, match="none has an answer"):
        compute_input_moments(model, [])
