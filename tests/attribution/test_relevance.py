"""Parameter and token relevance: conservation, adapters, dtypes, refusals, nothing left behind."""

import weakref

import pytest
import torch
from tiny_decoders import IDS, POSITIONS, TARGETS, VOCAB, Snapshot, tiny_gpt2, tiny_llama
from torch import nn

from agcl.attribution import attribute_sample, conservation_error, lrp_rules, parameter_relevance, token_relevance
from agcl.errors import AgclError

SAMPLE = {"positions": POSITIONS, "targets": TARGETS}
RULES = ("attnlrp", "cplrp")


def test_cplrp_conserves_on_a_model_without_biases():
    model = tiny_llama()
    f = model(IDS).logits[0, POSITIONS, TARGETS].sum()
    total = token_relevance(model, IDS, rule="cplrp", **SAMPLE).sum()
    assert abs(total - f) < 1e-9 * abs(f)
    assert conservation_error(model, IDS, **SAMPLE) < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_conservation_counts_positions_and_biases(attention):
    model = tiny_gpt2(attention=attention)
    f = model(IDS).logits[0, POSITIONS, TARGETS].sum()
    tokens_alone = token_relevance(model, IDS, rule="cplrp", **SAMPLE).sum()
    assert abs(tokens_alone - f) > 1e-2 * abs(f)
    assert conservation_error(model, IDS, **SAMPLE) < 1e-9


def test_conservation_error_sees_a_wrong_rule(monkeypatch):
    monkeypatch.setattr(
        "agcl.attribution.rules.identity_rule", lambda inputs, outputs: torch.nn.functional.silu(inputs)
    )
    assert conservation_error(tiny_gpt2(), IDS, **SAMPLE) > 1e-3


def test_every_linear_layer_conserves():
    """Relevance of a layer's inputs, weights and outputs has one sum, also in the model's own backward pass."""
    model = tiny_llama(tied=False)
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def entry(module, args, name=name):
                alias = args[0] * 1.0  # this layer's own share of an input that several layers read
                alias.retain_grad()
                seen[name] = [alias]
                return (alias,)

            def leave(module, args, output, name=name):
                output.retain_grad()
                seen[name].append(output)

            handles += [module.register_forward_pre_hook(entry), module.register_forward_hook(leave)]
    with lrp_rules(model, "cplrp"):
        logits = model(IDS, use_cache=False).logits
        logits[0, POSITIONS, TARGETS].sum().backward()
    f = logits[0, POSITIONS, TARGETS].sum().detach()
    silent = [name for name, (x, _) in seen.items() if x.grad is None]
    assert silent == [n for n in seen if n.endswith(("q_proj", "k_proj", "gate_proj"))]
    for name in seen.keys() - set(silent):
        x, z = seen[name]
        weight = model.get_submodule(name).weight
        output = (z * z.grad).sum()
        torch.testing.assert_close((x * x.grad).sum(), output, rtol=1e-9, atol=1e-9 * float(abs(f)))
        torch.testing.assert_close((weight * weight.grad).sum(), output, rtol=1e-9, atol=1e-9 * float(abs(f)))
    z = seen["lm_head"][1]
    torch.testing.assert_close((z * z.grad).sum(), f, rtol=1e-12, atol=0)


def test_residual_stream_conserves_between_layers():
    model = tiny_llama()
    streams = []

    def keep(module, args, output):
        output.retain_grad()
        streams.append(output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with lrp_rules(model, "cplrp"):
        f = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
    f.backward()
    for stream in streams:
        torch.testing.assert_close((stream * stream.grad).sum(), f, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_eager_equals_sdpa(build, rule):
    # transformers' eager Llama casts the softmax to float32, hence the tolerance
    a = parameter_relevance(build(attention="sdpa"), IDS, rule=rule, **SAMPLE)
    b = parameter_relevance(build(attention="eager"), IDS, rule=rule, **SAMPLE)
    largest = max(float(value.abs().max()) for value in b.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6 * largest)


def test_padding_behind_the_answer_changes_nothing():
    model = tiny_llama()
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (torch.arange(padded.shape[1]) < IDS.shape[1]).long()[None]
    a = parameter_relevance(model, IDS, **SAMPLE)
    b = parameter_relevance(model, padded, mask, **SAMPLE)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


def test_rule_none_is_the_ordinary_gradient():
    model = tiny_llama()
    found = {}
    done = attribute_sample(
        model, IDS, rule="none", only_correct=False, consume=lambda n, p, g: found.__setitem__(n, g), **SAMPLE
    )
    assert done
    model(IDS).logits[0, POSITIONS, TARGETS].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_only_correct_answers_are_attributed():
    model = tiny_llama()
    calls = []

    def consume(name, parameter, gradient):
        calls.append(name)

    best = model(IDS).logits[0, POSITIONS].argmax(-1)
    wrong = torch.stack([best[0], (best[1] + 1) % VOCAB])
    assert not attribute_sample(model, IDS, positions=POSITIONS, targets=wrong, consume=consume)
    assert calls == []
    assert attribute_sample(model, IDS, positions=POSITIONS, targets=best, consume=consume)
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def test_gradients_are_released_one_by_one():
    model = tiny_llama()
    parameters = dict(model.named_parameters())
    earlier, alive = [], []

    def consume(name, parameter, gradient):
        assert parameter is parameters[name]
        assert gradient.shape == parameter.shape
        alive.append(sum(reference() is not None for reference in earlier))
        earlier.append(weakref.ref(gradient))

    attribute_sample(model, IDS, only_correct=False, consume=consume, **SAMPLE)
    assert alive == [0] * len(parameters)


def test_users_gradients_and_hooks_stay_out_of_it():
    model = tiny_llama()
    expected = parameter_relevance(model, IDS, **SAMPLE)
    fired = []
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
        parameter.register_hook(lambda g: fired.append(1) or 0 * g)
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(1))
    snapshot = Snapshot(model)
    found = parameter_relevance(model, IDS, **SAMPLE)
    snapshot.assert_untouched()
    assert not fired
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("function", [parameter_relevance, token_relevance, conservation_error])
def test_leaves_nothing_behind(function):
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()  # a mixture of flags
    snapshot = Snapshot(model)
    function(model, IDS, **SAMPLE)
    snapshot.assert_untouched()


def test_leaves_nothing_behind_after_an_exception_in_backward():
    model = tiny_llama().train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    snapshot = Snapshot(model)

    def fail(name, parameter, gradient):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        attribute_sample(model, IDS, only_correct=False, consume=fail, **SAMPLE)
    snapshot.assert_untouched()


def test_selected_parameters_also_frozen_ones():
    model = tiny_llama()
    everything = parameter_relevance(model, IDS, **SAMPLE)
    model.requires_grad_(False)
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    snapshot = Snapshot(model)
    found = parameter_relevance(model, IDS, parameters=iter(names), **SAMPLE)
    snapshot.assert_untouched()
    assert sorted(found) == sorted(names)
    for name in names:
        torch.testing.assert_close(found[name], everything[name], rtol=1e-12, atol=1e-14)


def test_unreached_parameters_get_zeros():
    model = tiny_llama()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    assert torch.equal(parameter_relevance(model, IDS, **SAMPLE)["spare"], torch.zeros(3))
    assert parameter_relevance(model, IDS, parameters=["spare"], **SAMPLE).keys() == {"spare"}


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(outside):
    model = tiny_llama()
    expected = parameter_relevance(model, IDS, **SAMPLE)
    with outside():
        sample = {key: value.clone() for key, value in SAMPLE.items()}
        found = parameter_relevance(model, IDS.clone(), torch.ones_like(IDS), **sample)
        assert not torch.is_grad_enabled()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_llama()
    expected = parameter_relevance(model, IDS, **SAMPLE)
    model.gradient_checkpointing_enable()
    model.train()
    found = parameter_relevance(model, IDS, **SAMPLE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def cosine(a, b):
    a, b = (torch.cat([value.double().flatten() for value in found.values()]) for found in (a, b))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_parameters_and_autocast_come_close(rule):
    model = tiny_llama()
    # weights that bfloat16 represents exactly, so that only the arithmetic differs
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    expected = parameter_relevance(model, IDS, rule=rule, **SAMPLE)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = parameter_relevance(model, IDS, rule=rule, **SAMPLE)
        assert torch.is_autocast_cache_enabled()
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert cosine(mixed, expected) > 0.99
    narrow = parameter_relevance(model.bfloat16(), IDS, rule=rule, **SAMPLE)
    assert all(value.dtype == torch.bfloat16 for value in narrow.values())
    assert cosine(narrow, expected) > 0.99


@pytest.mark.parametrize("rule", RULES)
def test_lora_adapters_equal_the_chain_rule_on_the_merged_weight(rule):
    """With W + s B A in place of W, the gradients of A and B follow from that of the merged weight."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(tiny_llama(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found = parameter_relevance(model, IDS, rule=rule, **SAMPLE)
    assert found
    assert all("lora_" in name for name in found)
    merged = tiny_llama()
    state = merged.state_dict()
    lora = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    prefixes = {name.split(".lora_")[0] for name in lora}
    for prefix in prefixes:
        key = prefix.removeprefix("base_model.model.") + ".weight"
        state[key] += 2 * lora[f"{prefix}.lora_B.default.weight"] @ lora[f"{prefix}.lora_A.default.weight"]
    gradients = {}
    attribute_sample(
        merged, IDS, rule=rule, only_correct=False, consume=lambda n, p, g: gradients.__setitem__(n, g), **SAMPLE
    )
    for prefix in prefixes:
        a, b = (lora[f"{prefix}.lora_{part}.default.weight"] for part in "AB")
        gradient = gradients.get(prefix.removeprefix("base_model.model.") + ".weight", torch.zeros(len(b), a.shape[1]))
        torch.testing.assert_close(found[f"{prefix}.lora_A.default.weight"], a * (2 * b.T @ gradient.double()))
        torch.testing.assert_close(found[f"{prefix}.lora_B.default.weight"], b * (2 * gradient.double() @ a.T))


def test_frozen_embeddings_do_not_change_the_uniform_rule():
    """With the gate's weight alone in training, the product with the frozen factor is still shared in halves."""
    model = tiny_llama()
    name = "model.layers.0.mlp.gate_proj.weight"
    expected = parameter_relevance(model, IDS, **SAMPLE)[name]
    model.requires_grad_(False)
    model.get_parameter(name).requires_grad_(True)
    torch.testing.assert_close(parameter_relevance(model, IDS, **SAMPLE)[name], expected, rtol=1e-12, atol=1e-14)
    assert torch.isfinite(token_relevance(model, IDS, **SAMPLE)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS.repeat(2, 1)}, r"`input_ids` has shape \(2, 7\); give one sample"),
        ({"input_ids": IDS[0]}, r"`input_ids` has shape \(7,\)"),
        ({"attention_mask": torch.ones(1, 6)}, r"`attention_mask` has shape \(1, 6\)"),
        ({"positions": torch.tensor([], dtype=torch.long), "targets": torch.tensor([], dtype=torch.long)}, "is empty"),
        ({"positions": torch.tensor([3, 7])}, r"`positions` runs from 3 to 7, but must lie in \[0, 7\)"),
        ({"positions": torch.tensor([-1, 3])}, "`positions` runs from -1"),
        ({"positions": POSITIONS[None]}, r"`positions` is torch.int64 of shape \(1, 2\)"),
        ({"targets": TARGETS.float()}, r"`targets` is torch.float32"),
        ({"targets": TARGETS[:1]}, "`positions` has 2 entries and `targets` 1"),
        ({"targets": torch.tensor([1, VOCAB])}, f"`targets` holds {VOCAB}, but the vocabulary has {VOCAB} tokens"),
        ({"targets": torch.tensor([1, -100])}, "`targets` holds -100"),
        ({"rule": "lrp"}, r"`rule` is 'lrp'; choose one of 'attnlrp', 'cplrp'"),
        ({"parameters": ["lm_head.weight"]}, "names 'lm_head.weight', which `LlamaForCausalLM` does not have"),
        ({"parameters": []}, "nothing to attribute"),
    ],
)
def test_refuses_wrong_samples(change, message):
    model = tiny_llama()
    snapshot = Snapshot(model)
    with pytest.raises(AgclError, match=message):
        parameter_relevance(model, **({"input_ids": IDS, **SAMPLE} | change))
    snapshot.assert_untouched()


def test_refuses_a_frozen_model_without_names():
    with pytest.raises(AgclError, match="nothing to attribute"):
        parameter_relevance(tiny_llama().requires_grad_(False), IDS, **SAMPLE)


def test_token_relevance_needs_input_embeddings():
    with pytest.raises(AgclError, match="has no `get_input_embeddings`"):
        token_relevance(nn.Linear(2, 2), IDS, **SAMPLE)
