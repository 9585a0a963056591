"""Every estimator against its published definition, computed sample by sample with plain autograd."""

import pytest
import torch
from tiny_decoders import VOCAB, Snapshot, tiny_gpt2, tiny_llama
from tiny_families import KINDS, member, unusual

from agcl.attribution import estimators as e
from agcl.attribution import parameter_relevance
from agcl.attribution.importance import ImportanceConfig
from agcl.attribution.passes import Sample
from agcl.errors import AgclError, UnsupportedModelError


def known_samples(model, count=3):
    """Random prompts with the model's own predictions as answers."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (6, 8, 5)[:count]:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        positions = torch.tensor([2, length - 1])
        targets = model(ids[None], use_cache=False).logits[0, positions].argmax(-1)
        found.append(Sample(ids, positions, targets))
    return found


def evidence_for(model, samples, **options):
    names = [name for name, _ in model.named_parameters()]
    return e.Evidence(model, names, samples, num_samples=len(samples), batch_size=2, **options)


def gradients(model, sample, objective):
    logits = model(sample.input_ids[None], use_cache=False).logits[0, sample.positions]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(objective(logits, sample.targets), parameters), strict=True))


def chosen(logits, targets):
    return sum(logits[i, target] for i, target in enumerate(targets))


def log_likelihood(logits, targets):
    return sum(logits[i].log_softmax(-1)[target] for i, target in enumerate(targets))


DEFINITIONS = {
    "GradientWeight": (chosen, lambda w, g: (w * g).abs()),
    "EmpiricalFisher": (log_likelihood, lambda w, g: g**2),
    "MAS": (lambda logits, targets: (logits**2).sum(), lambda w, g: g.abs()),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_mean_over_samples_of_the_definition(build, name):
    model = build()
    samples = known_samples(model)
    objective, score = DEFINITIONS[name]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    per_sample = [gradients(model, sample, objective) for sample in samples]
    evidence = evidence_for(model, samples)
    found = getattr(e, name)().scores(evidence)
    assert evidence.num_used == 3
    assert found.keys() == weights.keys()
    for key, w in weights.items():
        expected = sum(score(w, g[key]) for g in per_sample) / 3
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("rule", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("score", ["relevance", "sensitivity"])
def test_lrp_is_the_mean_relevance(rule, score):
    model = tiny_llama()
    samples = known_samples(model)
    found = e.LRP(rule, score).scores(evidence_for(model, samples))
    for key, w in model.named_parameters():
        expected = 0
        for s in samples:
            r = parameter_relevance(model, s.input_ids[None], positions=s.positions, targets=s.targets, rule=rule)[key]
            expected = expected + (r.abs() if score == "relevance" else (r / w.detach()) ** 2) / 3
        if key not in found:  # CP-LRP cuts queries and keys
            assert rule == "cplrp"
            assert not expected.any()
            continue
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_fisher_draws_labels_from_the_models_distribution():
    """Over many draws the mean is the exact expectation over all labels at the (single) answer position."""
    model = tiny_llama()
    sample = known_samples(model, 1)[0]
    single = Sample(sample.input_ids, sample.positions[:1], sample.targets[:1])
    logits = model(single.input_ids[None], use_cache=False).logits[0, single.positions]
    probabilities = logits.softmax(-1)[0].detach()
    name = "model.norm.weight"
    exact = 0
    for label, probability in enumerate(probabilities):
        g = gradients(model, single, lambda z, _, label=label: z[0].log_softmax(-1)[label])[name]
        exact = exact + probability * g**2
    evidence = e.Evidence(model, [name], [single] * 1500, num_samples=1500, batch_size=100)
    found = e.Fisher().scores(evidence)[name].double()
    assert float((found - exact).norm() / exact.norm()) < 0.15
    again = e.Fisher().scores(e.Evidence(model, [name], [single] * 1500, num_samples=1500, batch_size=100))[name]
    assert torch.equal(again.double(), found)


def test_fisher_squares_each_sample_and_not_the_batchs_mean():
    model = tiny_llama()
    samples = known_samples(model)
    per_sample = [gradients(model, sample, log_likelihood) for sample in samples]
    found = e.EmpiricalFisher().scores(evidence_for(model, samples))
    of_the_mean = {key: (sum(g[key] for g in per_sample) / 3) ** 2 for key in found}
    assert all(bool((found[key] + 1e-12 >= of_the_mean[key] * (1 - 1e-4)).all()) for key in found)  # Jensen
    ratio = sum(float(v.sum()) for v in of_the_mean.values()) / sum(float(v.sum()) for v in found.values())
    assert ratio < 0.9


def test_spg_standardises_the_mean_gradient():
    model = tiny_llama()
    samples = known_samples(model)
    per_sample = [gradients(model, sample, log_likelihood) for sample in samples]
    found = e.SPG().scores(evidence_for(model, samples))
    for key, values in found.items():
        g = sum(sample[key] for sample in per_sample)
        expected = torch.tanh((g - g.mean()) / g.std(correction=0)).abs()
        torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-5)


def test_wanda_is_weight_times_input_norm():
    model = tiny_llama(tied=False)
    samples = known_samples(model)
    layer = model.model.layers[1].mlp.down_proj
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].detach()))
    for sample in samples:
        model(sample.input_ids[None], use_cache=False)
    handle.remove()
    norm = torch.cat(inputs).norm(dim=0)
    found = e.Wanda().scores(evidence_for(model, samples))
    weight = layer.weight.detach()
    torch.testing.assert_close(
        found["model.layers.1.mlp.down_proj.weight"].double(), weight.abs() * norm, rtol=1e-5, atol=1e-9
    )
    table, counts = model.model.embed_tokens.weight.detach(), torch.zeros(VOCAB)
    for sample in samples:
        counts += torch.bincount(sample.input_ids, minlength=VOCAB)
    expected = table.abs() * counts.sqrt()[:, None]
    torch.testing.assert_close(found["model.embed_tokens.weight"].double(), expected, rtol=1e-5, atol=1e-9)


def test_wanda_reads_transposed_weights_and_biases():
    model = tiny_gpt2()
    samples = known_samples(model, 1)
    inputs = []
    layer = model.transformer.h[0].mlp.c_fc
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].detach()))
    model(samples[0].input_ids[None], use_cache=False)
    handle.remove()
    found = e.Wanda().scores(evidence_for(model, samples))
    expected = layer.weight.detach().abs() * inputs[0].norm(dim=0)[:, None]
    torch.testing.assert_close(found["transformer.h.0.mlp.c_fc.weight"].double(), expected, rtol=1e-5, atol=1e-9)
    bias = layer.bias.detach().abs() * len(samples[0].input_ids) ** 0.5
    torch.testing.assert_close(found["transformer.h.0.mlp.c_fc.bias"].double(), bias, rtol=1e-5, atol=1e-9)


def entered(model, samples, modules):
    """What went into each module in each forward pass, all arguments."""
    calls = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: calls[name].append(args))
        for name in modules
    ]
    with torch.no_grad():
        for sample in samples:
            model(sample.input_ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_wanda_of_norms_that_add_one_to_their_weight(family):
    model = member(family, KINDS[family][0]).float()
    samples = known_samples(model)
    name = "model.layers.1.pre_feedforward_layernorm"
    norm = model.get_submodule(name)
    x = torch.cat([args[0][0] for args in entered(model, samples, [name])[name]]).double()
    normalised = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    found = e.Wanda().scores(evidence_for(model, samples))
    assert found.keys() == dict(model.named_parameters()).keys()
    expected = norm.weight.detach().double().abs() * normalised.norm(dim=0)
    torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-4, atol=1e-7)


def wanda_of_experts(experts, calls):
    """Expert by expert and token by token, in float64."""
    values = {name: value.detach().double() for name, value in experts.named_parameters()}
    squares = {name: torch.zeros_like(value) for name, value in values.items()}
    is_transposed = "gate_up_proj_bias" in values
    for hidden, chosen, _ in calls:
        for row, picked in zip(hidden.double(), chosen.tolist(), strict=True):
            for expert in picked:
                x = row
                for weight in ("gate_up_proj", "down_proj"):
                    w = values[weight][expert]
                    squares[weight][expert] += x.square()[:, None] if is_transposed else x.square()
                    x = x @ w if is_transposed else w @ x
                    if is_transposed:
                        squares[f"{weight}_bias"][expert] += 1
                        x = x + values[f"{weight}_bias"][expert]
                    if weight == "gate_up_proj":
                        gate, up = (x[::2], x[1::2]) if is_transposed else x.chunk(2)
                        x = experts._apply_gate(x) if is_transposed else torch.nn.functional.silu(gate) * up
    return {name: values[name].abs() * squares[name].sqrt() for name in values}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_wanda_of_experts_counts_the_tokens_sent_to_each(family, implementation):
    model = (unusual(family) if family == "gpt_oss" else member(family)).float()
    model.set_experts_implementation(implementation)
    samples = known_samples(model)
    prefix = "model.layers.1.mlp.experts"
    expected = wanda_of_experts(model.get_submodule(prefix), entered(model, samples, [prefix])[prefix])
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    evidence = e.Evidence(model, names, samples, num_samples=len(samples), batch_size=2)
    found = e.Wanda().scores(evidence)
    assert found.keys() == set(names)
    for name, scores in expected.items():
        torch.testing.assert_close(found[f"{prefix}.{name}"].double(), scores, rtol=1e-4, atol=1e-6)
    if family == "mixtral":  # all else is seen as well
        assert e.Wanda().scores(evidence_for(model, samples)).keys() == dict(model.named_parameters()).keys()


def test_wanda_names_what_it_cannot_see():
    model = unusual("gpt_oss").float()  # attention sinks are scores, not factors
    with pytest.raises(UnsupportedModelError, match=r"Wanda cannot see .* `parameters`"):
        e.Wanda().scores(evidence_for(model, known_samples(model)))
    with pytest.raises(UnsupportedModelError, match="Wanda cannot see"):
        e.Wanda().check(model, [name for name, _ in model.named_parameters()], known_samples(model, 1)[0])


def test_magnitude_change_and_random():
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    change = e.Change()
    with pytest.raises(AgclError, match="begin_task"):
        change.scores(evidence_for(model, []))
    change.begin_task(model, names)
    restored = e.Change()
    restored.load_state_dict(change.state_dict())
    with torch.no_grad():
        model.model.norm.weight += 0.25
    for estimator in (change, restored):
        found = estimator.scores(evidence_for(model, []))
        assert torch.allclose(found["model.norm.weight"], torch.tensor(0.25))
        assert not found["model.layers.0.mlp.up_proj.weight"].any()
    weight = model.model.norm.weight.detach()
    assert torch.allclose(e.Magnitude().scores(evidence_for(model, []))["model.norm.weight"].double(), weight.abs())
    a, b = (e.Random().scores(evidence_for(model, [], seed=seed))["model.norm.weight"] for seed in (0, 1))
    assert torch.equal(a, e.Random().scores(evidence_for(model, [], seed=0))["model.norm.weight"])
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["LRP", "GradientWeight", "Fisher", "EmpiricalFisher", "MAS", "SPG", "Wanda"])
def test_wrong_answers_are_skipped_and_the_model_is_left_alone(name):
    model = tiny_llama()
    right = known_samples(model)
    wrong = [Sample(s.input_ids, s.positions, (s.targets + 1) % VOCAB) for s in right]
    before = Snapshot(model)
    mixed = e.Evidence(
        model, [n for n, _ in model.named_parameters()], [wrong[0], right[0], wrong[1], right[1]], 2, batch_size=2
    )
    found = getattr(e, name)().scores(mixed)
    assert mixed.num_used == 2
    only_right = e.Evidence(model, list(found), right[:2], 2, batch_size=1)
    if name != "Fisher":  # other batches draw other labels
        for key, values in getattr(e, name)().scores(only_right).items():
            torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-6)
    nothing = e.Evidence(model, list(found), wrong, 3, batch_size=2, config=ImportanceConfig())
    assert getattr(e, name)().scores(nothing) == {}
    before.assert_untouched()


@pytest.mark.parametrize("per_sample", [True, False])
def test_blocks_are_cut_for_the_draws_to_come(per_sample):
    """Four samples in batches of two: four draws, or two sums."""
    model = tiny_llama()
    samples = [*known_samples(model), *known_samples(model, 1)]
    config = ImportanceConfig(top_k=2, top_k_method="blocks")
    found = e.GradientWeight().scores(evidence_for(model, samples, per_sample=per_sample, config=config))
    weights = {n: p.detach() for n, p in model.named_parameters()}
    values = [gradients(model, sample, chosen) for sample in samples]
    for key, score in found.items():
        first, second, third, fourth = (weights[key] * value[key] for value in values)
        if per_sample:
            expected = (first.abs().maximum(second.abs()) + third.abs().maximum(fourth.abs())) / 2
        else:
            expected = ((first + second).abs() + (third + fourth).abs()) / 2
        torch.testing.assert_close(score, expected.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("per_sample", [True, False], ids=["pieces", "whole"])
@pytest.mark.parametrize("factor", [1e-3, 3e3])
def test_squares_of_a_float16_gradient_are_not_lost(per_sample, factor):
    """Squared in float16, the small ones would be 0 and the large ones infinite."""

    class Scaled(e.LRP):
        def objective(self, logits, targets):
            return factor * super().objective(logits, targets)

    scores = []
    for dtype in (torch.float16, torch.float32):
        model = tiny_llama().to(torch.float16).to(dtype)  # the same weights
        evidence = evidence_for(model, known_samples(tiny_llama()), only_correct=False, per_sample=per_sample)
        scores.append(Scaled(rule="none", score="sensitivity").scores(evidence))
    half, whole = scores
    for name, expected in whole.items():
        scale = float(expected.max())
        assert torch.allclose(half[name], expected, rtol=0.3, atol=0.02 * scale), name
