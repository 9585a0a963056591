"""Every decoder family that users have, against relevance carried explicitly; conservation, precision, adapters.

Agreement in float64 is asserted to 1e-12 of each tensor's largest entry (found: below 1e-14). It holds under
``KeepFloat64``, which undoes the float32 detours in transformers' norms, rotary angles and softmax; as shipped, they
cost up to 1e-6 of a tensor's largest entry, see ``test_narrow_floats_come_close``.
"""

import copy

import pytest
import torch
from reference_lrp import FAMILIES, canonical, reference_relevance
from tiny_decoders import IDS, POSITIONS, TARGETS
from tiny_families import EXPERTS, KINDS, MEMBERS, KeepFloat64, member

from agcl.attribution import conservation_error, lrp_rules, parameter_relevance, token_relevance

SAMPLE = {"positions": POSITIONS, "targets": TARGETS}
RULES = ("attnlrp", "cplrp")
VARIANTS = [(name, attention) for name, kinds in KINDS.items() for attention in kinds]
# lora_alpha / r of the adapters below
LORA_SCALE = 2.0


def reference(model, rule, **options):
    return reference_relevance(model, IDS[0], POSITIONS, TARGETS, rule, **options)


def relevance(model, rule, **options):
    with KeepFloat64():
        return parameter_relevance(model, IDS, rule=rule, **SAMPLE, **options)


def differences(found, expected):
    """Per tensor, the largest difference relative to the largest entry."""
    # Where theory says zero (a key's bias without rotation shifts all scores alike) there is noise to be compared:
    # hence the floor.
    floor = 1e-3 * max(float(value.abs().max()) for value in expected.values())
    return {
        name: float((found[name].double() - value).abs().max()) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    }


def assert_agrees(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    wrong = {name: value for name, value in differences(found, expected).items() if not value < tolerance}
    assert not wrong


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_every_parameter_agrees_with_the_reference(name, attention, rule):
    model = member(name, attention)
    expected = reference(model, rule)
    with KeepFloat64():
        logits = model(IDS, use_cache=False).logits[0].detach()
        tokens = token_relevance(model, IDS, rule=rule, **SAMPLE)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert_agrees(relevance(model, rule), expected.parameters)
    assert_agrees({"tokens": tokens}, {"tokens": expected.tokens.sum(-1)})


@pytest.mark.parametrize("name", MEMBERS)
def test_tied_and_untied_embeddings_agree_with_the_reference(name):
    _, options = MEMBERS[name]
    model = member(name, tied=not options.get("tie_word_embeddings", False))
    assert_agrees(relevance(model, "attnlrp"), reference(model, "attnlrp").parameters)


def layers_of(model):
    family = FAMILIES[model.config.model_type]
    return model.get_submodule(f"{family.body}.{family.layers}")


def relevance_entering_layers(model, rule):
    """Entry by entry, at the input of each layer; and the target."""
    inputs = []

    def keep(module, args):
        args[0].retain_grad()
        inputs.append(args[0])

    handles = [layer.register_forward_pre_hook(keep) for layer in layers_of(model)]
    with KeepFloat64(), lrp_rules(model, rule):
        target = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
    target.backward()
    for handle in handles:
        handle.remove()
    return [(x * x.grad)[0].detach() for x in inputs], target.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MEMBERS)
def test_relevance_between_layers_agrees_with_the_reference(name, rule):
    model = member(name)
    entering, target = relevance_entering_layers(model, rule)
    expected = reference(model, rule)
    torch.testing.assert_close(target, expected.target, rtol=1e-12, atol=1e-12)
    assert_agrees(dict(enumerate(entering)), dict(enumerate(expected.layer_inputs)))


# What keeps part of f from the token embeddings under CP-LRP: all other additive constants, and nothing else.
BIASED = ("llama with biases", "qwen2", "pythia", "gpt_neox in sequence", "gpt2", "opt", "opt, norm after")
WITH_POSITIONS = ("gpt2", "opt", "opt, norm after")


@pytest.mark.parametrize("name", MEMBERS)
def test_cplrp_conserves_up_to_biases_and_position_embeddings(name):
    """f = sum R(tokens) + sum R(biases) + sum R(positions); at each layer f = sum R(input) + sum R(biases above)."""
    model = member(name)
    found = relevance(model, "cplrp")
    with KeepFloat64():
        f = float(model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].detach().sum())
        tokens = float(token_relevance(model, IDS, rule="cplrp", **SAMPLE).sum())
        assert conservation_error(model, IDS, **SAMPLE) < 1e-12
    bias_names = [key for key in found if key.endswith(".bias")]
    biases = float(sum(found[key].sum() for key in bias_names))
    family = FAMILIES[model.config.model_type]
    places = float(found[f"{family.body}.{family.positions}.weight"].sum()) if family.positions else 0.0
    assert f - tokens == pytest.approx(biases + places, abs=1e-12)
    # neither part is too small to be noticed, where there is one
    assert (abs(biases) > 0.1 * abs(f)) == (name in BIASED)
    assert (abs(places) > 0.05 * abs(f)) == (name in WITH_POSITIONS)

    entering, _ = relevance_entering_layers(model, "cplrp")
    for index, stream in enumerate(entering):
        below = tuple(f"{family.body}.{family.layers}.{i}." for i in range(index))
        above = float(sum(found[key].sum() for key in bias_names if not key.startswith(below)))
        assert float(stream.sum()) + above == pytest.approx(f, abs=1e-12)


def test_soft_capping_conserves_under_the_identity_rule():
    """f = cap tanh(z / cap): R(z) = f by the identity rule; gradient times z would be z (1 - tanh^2(z / cap))."""
    capped, raw = member("gemma2"), member("gemma2")
    raw.config.final_logit_softcapping = None
    cap = capped.config.final_logit_softcapping
    with KeepFloat64():
        z, f = (m(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].detach() for m in (raw, capped))
    torch.testing.assert_close(f, cap * torch.tanh(z / cap), rtol=1e-12, atol=0)
    assert ((f - z).abs() > 0.1 * z.abs()).all()
    by_gradient = z * (1 - torch.tanh(z / cap) ** 2)
    assert ((by_gradient - f).abs() > 0.1 * f.abs()).all()
    to_capped, to_raw = (reference(m, "cplrp") for m in (capped, raw))
    for result, value in ((to_capped, f), (to_raw, z)):
        torch.testing.assert_close(result.tokens.sum(), value.sum(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.layer_inputs[1].sum(), value.sum(), rtol=1e-12, atol=1e-12)


FACTS = [
    *((name, {"sliding_window": None}) for name, (_, options) in MEMBERS.items() if "sliding_window" in options),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 4}),
    ("gemma3", {"rope_parameters": {"rope_theta": 100.0}}),
    ("phi3", {"rope_parameters": {"rope_theta": 10_000.0}}),
    ("pythia", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("mixtral", {"num_experts_per_tok": 3}),
]


@pytest.mark.parametrize(
    ("name", "change"), FACTS, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_the_comparison_notices_each_fact_of_a_family(name, change):
    """With one figure of the config changed in the reference alone, agreement is lost: windows and caps do bite."""
    model = member(name)
    found, expected = relevance(model, "attnlrp"), reference(model, "attnlrp", **change)
    assert max(differences(found, expected.parameters).values()) > 1e-2


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


# Measured over all families and both rules, worst tensor: relative difference 1e-6, 7e-6, 0.14; 1 - cosine 3e-13,
# 2e-11, 9e-3; of all parameters together, 1 - cosine in bfloat16 is 1.3e-4.
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MEMBERS)
def test_narrow_floats_come_close(name, rule):
    expected = relevance(member(name), rule)
    largest = max(float(value.abs().max()) for value in expected.values())
    heard = [key for key, value in expected.items() if float(value.abs().max()) > 1e-12 * largest]
    for dtype, tolerance, worst_tensor, together in (
        (torch.float64, 1e-5, 1e-9, 1e-9),
        (torch.float32, 1e-4, 1e-8, 1e-9),
        (torch.bfloat16, 0.5, 3e-2, 1e-3),
    ):
        found = parameter_relevance(member(name).to(dtype), IDS, rule=rule, **SAMPLE)
        assert {value.dtype for value in found.values()} == {dtype}
        assert_agrees(found, expected, tolerance)
        assert min(cosine(found[key], expected[key]) for key in heard) > 1 - worst_tensor
        whole = (torch.cat([values[key].double().flatten() for key in expected]) for values in (found, expected))
        assert cosine(*whole) > 1 - together


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_logits_are_the_same_bits_inside_and_outside(name, attention, dtype):
    model = member(name, attention).to(dtype)
    plain = model(IDS, use_cache=False).logits
    for rule in RULES:
        with lrp_rules(model, rule):
            assert torch.equal(model(IDS, use_cache=False).logits, plain)
    assert torch.equal(model(IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("name", MEMBERS)
def test_checkpointing_and_training_mode_change_nothing(name):
    model = member(name, KINDS[name][0])
    expected = relevance(model, "attnlrp")
    model.gradient_checkpointing_enable()
    model.train()
    found = relevance(model, "attnlrp")
    assert model.training
    assert all(layer.gradient_checkpointing for layer in layers_of(model))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# transformers counts GPT-2's positions from the padding on: other logits, with or without the rules
PADDINGS = [(name, side) for name in MEMBERS for side in ("right", "left") if (name, side) != ("gpt2", "left")]


@pytest.mark.parametrize(("name", "side"), PADDINGS)
def test_padding_changes_nothing(name, side):
    model = member(name)
    padding, before = torch.zeros(1, 3, dtype=torch.long), 3 if side == "left" else 0
    padded = torch.cat([padding, IDS] if before else [IDS, padding], 1)
    place = torch.arange(padded.shape[1])
    mask = ((place >= before) & (place < before + IDS.shape[1])).long()[None]
    with KeepFloat64():
        found = parameter_relevance(model, padded, mask, positions=POSITIONS + before, targets=TARGETS)
    assert_agrees(found, relevance(model, "attnlrp"))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_agree_with_the_reference(name, rule, implementation):
    model = member(name)
    expected = reference(model, rule).parameters
    model.set_experts_implementation(implementation)
    if implementation == "batched_mm":
        assert_agrees(relevance(model, rule), expected)
    else:  # no kernel for float64
        assert_agrees(parameter_relevance(model.float(), IDS, rule=rule, **SAMPLE), expected, 1e-5)


def with_adapters(model, seed=None, **options):
    """LoRA of rank 2 on every linear map; with a seed, B is random instead of zero."""
    peft = pytest.importorskip("peft")
    family = FAMILIES[model.config.model_type]
    maps = [*family.qkv, family.out, *(() if family.experts else family.mlp)]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=sorted({name.split(".")[-1] for name in maps}) if not options else [],
        fan_in_fan_out=family.transposed,
        lora_dropout=0.0 if options else 0.5,
        **options,
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return adapted


def relevance_by_canonical_name(model, rule):
    names = [name for name, _ in model.named_parameters()]
    return {canonical(name): value for name, value in relevance(model, rule, parameters=names).items()}


def adapters_in(found):
    return {name.split(".lora_")[0] for name in found if ".lora_" in name}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MEMBERS)
def test_adapters_agree_with_two_explicit_linear_maps(name, rule):
    model = with_adapters(member(name), seed=1)
    found = relevance_by_canonical_name(model, rule)
    assert_agrees(found, reference(model, rule, lora_scale=LORA_SCALE).parameters)
    # what goes through B A x passes B and A whole: there is no bias between them
    adapted = adapters_in(found)
    assert len(adapted) >= 2 * 2
    for prefix in adapted:
        to_a, to_b = (found[f"{prefix}.lora_{part}.default.weight"].sum() for part in "AB")
        torch.testing.assert_close(to_a, to_b, rtol=1e-9, atol=1e-12)
    assert any(float(found[f"{prefix}.lora_A.default.weight"].abs().max()) > 1e-3 for prefix in adapted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MEMBERS)
def test_an_adapter_that_adds_nothing_takes_nothing(name, rule):
    model = member(name)
    expected = relevance(model, rule)
    found = relevance_by_canonical_name(with_adapters(model), rule)
    assert adapters_in(found)
    assert all(not value.any() for key, value in found.items() if ".lora_" in key)
    assert_agrees({key: value for key, value in found.items() if ".lora_" not in key}, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_of_experts_equal_the_chain_rule_on_the_merged_weights(name, weight, rule):
    """With W + s B A in place of an expert's W: the share of each entry of A and B in the relevance of that."""
    merged = member(name)
    model = with_adapters(merged, seed=1, target_parameters=[f"mlp.experts.{weight}"])
    values = {canonical(key): value.detach() for key, value in model.named_parameters()}
    factors = {}
    for key, parameter in merged.named_parameters():
        if key.endswith(weight):
            names = [key.replace(weight, f"lora_{part}.default.weight") for part in "AB"]
            a, b = (values[name] for name in names)
            a, b = a.view(len(parameter), 2, -1), b.view(len(b), 2, len(parameter))  # as PEFT stacks the experts
            parameter.data += LORA_SCALE * torch.einsum("ore,eri->eoi", b, a)
            factors[key] = names, a, b
    assert len(factors) == 2
    expected, explicit = reference(merged, rule).parameters, {}
    for key, ((a_name, b_name), a, b) in factors.items():
        per_weight = LORA_SCALE * expected[key] / merged.get_parameter(key).detach()
        explicit[a_name] = (a * torch.einsum("ore,eoi->eri", b, per_weight)).reshape(values[a_name].shape)
        explicit[b_name] = (b * torch.einsum("eri,eoi->ore", a, per_weight)).reshape(values[b_name].shape)
    found = relevance_by_canonical_name(model, rule)
    assert_agrees({key: found[key] for key in explicit}, explicit, 1e-10)
