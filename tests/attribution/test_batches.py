"""Samples run together: each one's gradient is what it is alone."""

import pytest
import torch
from test_families import with_adapters
from tiny_decoders import VOCAB, Snapshot, tiny_llama
from tiny_families import EXPERTS, KINDS, KeepFloat64, member
from torch import nn

from agcl.attribution import roles
from agcl.attribution.estimators import Evidence, Wanda
from agcl.attribution.passes import Sample
from agcl.attribution.relevance import attribute_batch
from agcl.errors import AgclError, UnsupportedModelError


def samples():
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in (7, 4, 9):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        found.append(Sample(ids, torch.tensor([1, length - 2]), torch.randint(3, VOCAB, (2,), generator=generator)))
    return found


def collected(model, batch, **options):
    found = {}
    flags = attribute_batch(
        model,
        batch,
        consume=lambda name, parameter, gradient: found.setdefault(name, []).append(gradient.clone()),
        **options,
    )
    return found, flags


# With experts, which sample a row belongs to is not known: one by one.
IN_ONE_PASS = [name for name in KINDS if name not in EXPERTS]


def count_passes(model):
    passes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return passes


@pytest.mark.parametrize("rule", ["attnlrp", "none"])
@pytest.mark.parametrize("name", KINDS)
def test_each_samples_gradient_is_what_it_is_alone(name, rule):
    model = member(name, KINDS[name][0])
    alone = {}
    with KeepFloat64():
        for sample in samples():
            for key, (gradient,) in collected(model, [sample], rule=rule, only_correct=False)[0].items():
                alone.setdefault(key, []).append(gradient)
        passes = count_passes(model)
        together, flags = collected(model, samples(), rule=rule, only_correct=False)
    assert flags == [True, True, True]
    assert passes == ([3] if name in IN_ONE_PASS else [3, 1, 1, 1])
    assert together.keys() == alone.keys()
    for key, gradients in alone.items():
        assert len(together[key]) == len(gradients), key
        for found, expected in zip(together[key], gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_samples_padded_on_the_left_keep_their_mask_in_a_batch(name, per_sample):
    model = member(name)
    plain = samples()
    padded = []
    for sample, count in zip(plain, (2, 5, 0), strict=True):
        padding = torch.zeros(count, dtype=torch.long)
        ids = torch.cat([padding, sample.input_ids])
        mask = torch.cat([padding, torch.ones_like(sample.input_ids)]).to(torch.bool if count == 2 else torch.int64)
        padded.append(Sample(ids, sample.positions + count, sample.targets, mask if count else None))
    without = [Sample(s.input_ids, s.positions, s.targets) for s in padded]
    with KeepFloat64():
        expected, found, unmasked = (
            collected(model, batch, only_correct=False, per_sample=per_sample)[0] for batch in (plain, padded, without)
        )
    assert found.keys() == expected.keys()
    for key, gradients in expected.items():
        for gradient, other in zip(gradients, found[key], strict=True):
            torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-12, msg=key)
    assert any(not torch.allclose(unmasked[key][0], expected[key][0], rtol=1e-2) for key in expected)


def test_a_mask_of_another_length_is_refused():
    sample = Sample(torch.tensor([3, 4, 5]), torch.tensor([1]), torch.tensor([5]), torch.ones(2))
    with pytest.raises(AgclError, match=r"`attention_mask` has shape \(2,\), but the sample's `input_ids` \(3,\)"):
        collected(tiny_llama(), [sample, sample])


def test_the_batchs_sum_is_the_sum_of_the_samples():
    model = tiny_llama()
    apart, _ = collected(model, samples(), only_correct=False)
    together, _ = collected(model, samples(), only_correct=False, per_sample=False)
    for name, gradients in apart.items():
        (total,) = together[name]
        torch.testing.assert_close(total, sum(gradients), rtol=1e-9, atol=1e-12)


def answered(model, sample):
    logits = model(sample.input_ids[None], use_cache=False).logits[0, sample.positions]
    return Sample(sample.input_ids, sample.positions, logits.argmax(-1))


def test_wrong_samples_of_a_batch_leave_no_trace():
    model = tiny_llama()
    wrong, right, other = samples()
    right = answered(model, right)
    found, flags = collected(model, [wrong, right, other])
    expected, _ = collected(model, [right])
    assert flags == [False, True, False]
    for name, gradients in expected.items():
        (gradient,) = found[name]
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)


def test_nothing_is_left_on_the_model():
    model = tiny_llama()
    before = Snapshot(model)
    collected(model, samples(), only_correct=False)
    before.assert_untouched()


@pytest.mark.parametrize("name", KINDS)
def test_adapters_in_bfloat16_under_checkpointing_in_a_batch(name):
    """All at once, as large models are trained: the same as alone in float64, up to rounding."""
    model = with_adapters(member(name, KINDS[name][0]), seed=1)
    with KeepFloat64():
        expected = [collected(model, [sample], rule="attnlrp", only_correct=False)[0] for sample in samples()]
    model.bfloat16().train()
    model.gradient_checkpointing_enable()
    found, _ = collected(model, samples(), rule="attnlrp", only_correct=False)
    assert found
    assert all("lora_" in key for key in found)
    for index, alone in enumerate(expected):
        whole = (
            torch.cat([x.double().flatten() for x in parts])
            for parts in ([alone[key][0] for key in alone], [found[key][index] for key in alone])
        )
        assert float(torch.nn.functional.cosine_similarity(*whole, dim=0)) > 0.99


def test_only_chosen_parameters_of_an_adapter_are_reported():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    apart = [collected(model, [sample], only_correct=False)[0] for sample in samples()]
    together, _ = collected(model, samples(), only_correct=False)
    assert together.keys() == apart[0].keys()
    assert all("lora_" in name for name in together)
    for name, gradients in together.items():
        for gradient, single in zip(gradients, apart, strict=True):
            torch.testing.assert_close(gradient, single[name][0], rtol=1e-9, atol=1e-12)


def test_an_operation_not_understood_makes_the_samples_run_one_by_one(monkeypatch):
    model = tiny_llama()
    linear = torch.nn.functional.linear
    monkeypatch.delitem(roles.ROLES, linear)
    passes = count_passes(model)
    collected(model, samples(), only_correct=False)  # not understood: one by one
    assert passes[-3:] == [1, 1, 1]


class Mixed(nn.Module):
    """Uses of a parameter that look like an expert's, or like those of a batch, and are not."""

    def __init__(self, width, use):
        super().__init__()
        self.use = use
        self.table = nn.Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, x):
        return x + self.use(x, self.table)


USES = {
    "a row times": lambda x, w: x * w[2],
    "a product with a row": lambda x, w: (x @ w[2])[..., None],
    "chosen rows": lambda x, w: nn.functional.linear(x, w[torch.arange(len(w)).flip(0)]),
    "a matrix product": lambda x, w: x @ w,
    "a sum with a row": lambda x, w: x + w[1],
}


@pytest.mark.parametrize("use", USES)
def test_other_uses_are_seen_for_what_they_are_or_refused(use):
    model = tiny_llama()
    model.model.norm = nn.Sequential(model.model.norm, Mixed(16, USES[use]))
    name = "model.norm.1.table"
    alone = [collected(model, [s], rule="none", only_correct=False)[0][name][0] for s in samples()]
    together = collected(model, samples(), rule="none", only_correct=False)[0][name]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    evidence = Evidence(model, [name], [answered(model, samples()[0])], 1, batch_size=1)
    if use in ("a row times", "a product with a row", "chosen rows"):
        with pytest.raises(UnsupportedModelError, match="Wanda cannot see"):
            Wanda().scores(evidence)
        return
    scores = Wanda().scores(evidence)[name].double()
    table, states = model.get_parameter(name).detach(), []
    model.model.norm[1].register_forward_pre_hook(lambda module, args: states.append(args[0][0].detach()))
    model(samples()[0].input_ids[None])
    norms = states[0].norm(dim=0)[:, None] if "matrix" in use else (torch.arange(16) == 1)[:, None] * 7**0.5
    torch.testing.assert_close(scores, table.abs() * norms, rtol=1e-5, atol=1e-9)


def test_an_empty_batch_is_refused():
    with pytest.raises(AgclError, match="`samples` is empty"):
        collected(tiny_llama(), [])
