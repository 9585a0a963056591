"""What the check of a model finds: supported families, operations without a rule, and where relevance gets lost."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lrp import FAMILIES, Doubling, Small, family
from tiny_decoders import IDS, POSITIONS, TARGETS, Snapshot, tiny_gpt2, tiny_llama
from tiny_families import KINDS, MEMBERS, UNUSUAL, member, unusual
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from agcl.attribution import OPERATIONS, conservation_error, lrp_rules
from agcl.attribution.observing import find_blocks
from agcl.attribution.selfcheck import check_model
from agcl.errors import AgclError, UnsupportedModelError

SAMPLE = {"input_ids": IDS, "positions": POSITIONS, "targets": TARGETS}


class Extra(nn.Module):
    """The identity, plus a function of the activations scaled down so that the model stays tame."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x + 0.1 * self.function(x)


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def with_extra(function, layer=1, build=tiny_llama):
    model = build()
    model.model.layers[layer].mlp.down_proj = nn.Sequential(model.model.layers[layer].mlp.down_proj, Extra(function))
    return model


def found(check):
    return {(op.operation, op.module, op.module_class): op.count for op in check.uncovered}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_supported(name):
    check = check_model(family(name), **SAMPLE)
    assert check.verdict == "supported", str(check)
    assert check.reasons == check.uncovered == check.refusals == check.failures == ()
    assert check.forward_identical
    assert check.forward_difference == 0
    assert [layer.name.rsplit(".", 1)[-1] for layer in check.layers] == ["embeddings", "0", "1", "head"]
    assert max(abs(layer.lost) for layer in check.layers) < 1e-4  # float32, and f may be small
    assert check.conservation_error == conservation_error(family(name), **SAMPLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_family_is_supported_in_narrow_floats(name, dtype):
    check = check_model(member(name, KINDS[name][0]).to(dtype))
    assert check.verdict == "supported", str(check)


def test_a_random_prompt_is_the_same_each_time_and_avoids_special_tokens():
    model = tiny_gpt2()
    model.config.eos_token_id = [2, 3]
    seen = []
    handle = model.transformer.wte.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state = torch.get_rng_state()
    checks = [check_model(model) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    assert checks[0] == checks[1]
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    assert seen[0].shape == (1, 16)
    assert not set(seen[0].flatten().tolist()) & {1, 2, 3}
    predicted = model(seen[0]).logits[0, -4:].max(-1).values.sum()
    torch.testing.assert_close(checks[0].target, predicted.item())


def test_a_random_prompt_fits_a_short_context():
    model = tiny_gpt2()
    model.config.n_positions = 5
    assert check_model(model).verdict == "supported"


def test_biases_are_accounted_for_layer_by_layer():
    model = tiny_gpt2()
    check = check_model(model, **SAMPLE)
    biases = [(name, p) for name, p in model.named_parameters() if name.endswith("bias")]
    with lrp_rules(model, "cplrp"):
        f = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
    gradients = torch.autograd.grad(f, [p for _, p in biases], allow_unused=True)
    for layer in check.layers:
        prefix = {"embeddings": "nowhere", "head": "transformer.ln_f"}.get(layer.name, layer.name + ".")
        parts = zip(biases, gradients, strict=True)
        expected = sum((p * g).sum().item() for (name, p), g in parts if name.startswith(prefix) and g is not None)
        assert layer.additive == pytest.approx(expected, abs=1e-12)
        assert layer.name == "embeddings" or abs(expected) > 1e-3  # there is something to account for
        assert abs(layer.lost) < 1e-13


def test_relevance_at_the_blocks_is_value_times_gradient_of_the_hidden_state():
    model = tiny_llama()
    with lrp_rules(model, "cplrp"):
        output = model(IDS, use_cache=False, output_hidden_states=True)
        states = output.hidden_states[:2]  # those that enter the blocks
        gradients = torch.autograd.grad(output.logits[0, POSITIONS, TARGETS].sum(), states)
    layers = {layer.name: layer for layer in check_model(model, **SAMPLE).layers}
    for index, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
        expected = (state * gradient).sum().item()
        assert layers[f"model.layers.{index}"].at_input == pytest.approx(expected, rel=1e-12)


def test_parameters_and_constants_that_are_added_count_whatever_their_name():
    model = tiny_llama()

    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.offset = inner, nn.Parameter(torch.full((16,), 0.3, dtype=torch.float64))

        def forward(self, x):
            return torch.sub(self.inner(x), self.offset) + 0.5

    model.model.layers[0].mlp.down_proj = Shifted(model.model.layers[0].mlp.down_proj)
    assert conservation_error(model, **SAMPLE) < 1e-13
    check = check_model(model, **SAMPLE)
    assert check.verdict == "supported"
    additive = {layer.name: layer.additive for layer in check.layers}
    assert abs(additive.pop("model.layers.0")) > 1e-3
    assert set(additive.values()) == {0}


@pytest.mark.parametrize("name", UNUSUAL)
def test_conservation_with_sources_of_any_name(name):
    """Biases of experts named ``*_bias``, sinusoidal positions, overwritten embeddings, embeddings for each layer."""
    model = unusual(name).float()  # XGLM clamps its mask to float32's range
    named = sum(p.numel() for key, p in model.named_parameters() if key.endswith("bias"))
    assert conservation_error(model, **SAMPLE) < 1e-5  # the norms compute in float32
    check = check_model(model, **SAMPLE)
    assert check.verdict == "supported", str(check)
    additive = sum(abs(layer.additive) for layer in check.layers)
    assert named == 0 or additive > 1e-2 * abs(check.target)


def test_conservation_with_padding_on_the_left_is_that_without():
    model = tiny_llama()
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1), torch.ones(1, 10, dtype=torch.long)
    mask[:, :3] = 0
    found = check_model(model, padded, mask, positions=POSITIONS + 3, targets=TARGETS)
    assert found.target == pytest.approx(check_model(model, **SAMPLE).target, rel=1e-6)  # rotary angles are float32
    assert conservation_error(model, padded, mask, positions=POSITIONS + 3, targets=TARGETS) < 1e-13


def test_conservation_error_refuses_what_the_rules_do_not_cover():
    model = with_extra(lambda x: torch.cumprod(x, -1))
    with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.\*\.mlp\.down_proj\.\*` \(Extra\)"):
        conservation_error(model, **SAMPLE)


def test_an_activation_that_was_detached_is_no_source():
    for function in (lambda x: 1e4 * x.tanh().detach(), lambda x: 2 * (x.sign() + 3.0)):
        check = check_model(with_extra(function), **SAMPLE)
        assert check.conservation_error > 1e-2
        assert check.verdict != "supported"


UNKNOWN = {
    "one": (lambda x: torch.cumprod(x, -1), {"torch.cumprod": 1}),
    "the same twice": (lambda x: torch.cumprod(x, -1) + torch.cumprod(x, 0), {"torch.cumprod": 2}),
    "two": (lambda x: torch.cumprod(x, -1) + torch.logcumsumexp(x, -1), {"torch.cumprod": 1, "torch.logcumsumexp": 1}),
    "one after the other": (lambda x: torch.sinh(torch.exp(x)), {"torch.exp": 1, "torch.sinh": 1}),
    "complex": (lambda x: torch.view_as_real(torch.fft.fft(x))[..., 0], {"torch.fft.fft": 1}),
    "power of tensors": (lambda x: x.abs() ** x, {"torch.Tensor.__pow__": 1}),
    "in-place activation": (lambda x: nn.functional.silu(x.clone(), inplace=True), {"torch.nn.functional.silu": 1}),
    "custom function": (lambda x: Doubling.apply(x) + x, {"DoublingBackward": 1}),
    "custom and unknown": (lambda x: torch.exp(Doubling.apply(x)), {"DoublingBackward": 1, "torch.exp": 1}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_all_operations_without_a_rule_are_listed(name):
    function, expected = UNKNOWN[name]
    model = with_extra(function)
    plain = model(IDS).logits
    check = check_model(model, **SAMPLE)
    assert found(check) == {(op, "model.layers.1.mlp.down_proj.1", "Extra"): n for op, n in expected.items()}
    assert check.verdict == "not supported"
    assert all(op in str(check) for op in expected)
    assert check.forward_identical
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("rule", ["attnlrp", "cplrp"])
def test_a_tolerated_operation_has_its_ordinary_gradient(rule):
    """cumprod is no less differentiable for having no rule: the parameter before it is reached all the same."""
    check = check_model(with_extra(lambda x: torch.cumprod(x, -1)), **SAMPLE, rule=rule)
    assert "model.layers.1.mlp.down_proj.0.weight" not in check.unreached
    cut = {name for name in check.unreached if "q_proj" in name or "k_proj" in name or "gate_proj" in name}
    assert set(check.unreached) == cut
    assert len(cut) == (6 if rule == "cplrp" else 0)  # CP-LRP sends nothing there


def test_an_overwritten_gate_is_listed_under_cplrp():
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = Small(lambda x, w: torch.tanh(x).mul_(x))
    check = check_model(model, **SAMPLE)
    assert found(check) == {("torch.Tensor.mul_", "model.layers.0.mlp.act_fn", "Small"): 1}


def test_a_custom_function_is_listed_with_the_module_that_called_it():
    model = BloomForCausalLM(BloomConfig(vocab_size=23, hidden_size=16, n_layer=2, n_head=2)).eval()
    check = check_model(model)
    assert found(check) == {
        ("GeLUFunctionBackward", f"transformer.h.{index}.mlp.gelu_impl", "BloomGelu"): 1 for index in range(2)
    }
    assert "GeLUFunctionBackward: 2 x in transformer.h.*.mlp.gelu_impl (BloomGelu)" in str(check)
    assert check.verdict == "not supported"
    reason = check.reasons[0]
    assert "in `transformer.h.*.mlp.gelu_impl` (BloomGelu)" in reason  # where, and what to do
    assert "plain torch operations, or an estimator that needs no rules" in reason


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_rule_shows_as_relevance_lost_in_its_layer(monkeypatch, layer):
    monkeypatch.setitem(OPERATIONS, torch.sinh, "linear")
    check = check_model(with_extra(lambda x: torch.sinh(3 * x), layer), **SAMPLE)
    lost = {item.name: abs(item.lost) for item in check.layers}
    assert lost.pop(f"model.layers.{layer}") > 1e-3
    assert max(lost.values()) < 1e-12
    assert check.verdict != "supported"
    assert f"Most of it is lost in `model.layers.{layer}`" in " ".join(check.reasons)
    # Summed from the head: nothing lost above, all of it from there on.
    errors = {item.name: item.error for item in check.layers}
    assert errors["head"] < 1e-12
    assert errors["embeddings"] == pytest.approx(check.conservation_error, abs=1e-12)
    assert errors[f"model.layers.{layer}"] == pytest.approx(check.conservation_error, abs=1e-12)


def test_losses_of_all_degrees(monkeypatch):
    monkeypatch.setitem(OPERATIONS, torch.sinh, "linear")

    def verdict(scale):
        return check_model(with_extra(lambda x: scale * torch.sinh(4 * x)), **SAMPLE).verdict

    assert verdict(0.0) == "supported"
    assert verdict(0.1) == "supported with losses"
    assert verdict(1e3) == "not supported"


def test_what_passes_from_layer_to_layer_beside_the_hidden_state_is_accounted_for():
    """Layers that use the values of an earlier layer, by way of a dict: each layer balances all the same."""
    model = tiny_llama()
    store = {}
    first, second = (layer.self_attn.v_proj for layer in model.model.layers)

    class Keeping(nn.Module):
        def forward(self, x):
            store["value"] = first(x)
            return store["value"]

    class Reusing(nn.Module):
        def forward(self, x):
            return second(x) + store["value"]

    model.model.layers[0].self_attn.v_proj, model.model.layers[1].self_attn.v_proj = Keeping(), Reusing()
    check = check_model(model, **SAMPLE)
    layers = {layer.name: layer for layer in check.layers}
    assert max(abs(layer.lost) for layer in check.layers) < 1e-13
    # More arrives at the lower layer than the upper one's hidden state brings.
    with lrp_rules(model, "cplrp"):
        output = model(IDS, use_cache=False, output_hidden_states=True)
        state = output.hidden_states[1]
        (gradient,) = torch.autograd.grad(output.logits[0, POSITIONS, TARGETS].sum(), state)
    beside = layers["model.layers.0"].at_output - (state * gradient).sum().item()
    assert abs(beside) > 1e-3


def test_state_space_models_are_not_supported():
    model = MambaForCausalLM(MambaConfig(vocab_size=23, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    check = check_model(model)
    assert check.verdict == "not supported"
    assert found(check) == {("torch.exp", f"backbone.layers.{i}.mixer", "MambaMixer"): 1 for i in range(2)}
    assert "No attention was seen" in check.refusals[0]


def test_what_is_refused_up_front_is_told_with_the_remedy():
    model = tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    model.model.layers[0].compile()
    check = check_model(model)
    assert check.verdict == "not supported"
    assert len(check.refusals) == 2  # the inner model is not refused a second time
    assert 'call `model.set_attn_implementation("sdpa")` first' in " ".join(str(check).split())
    assert "`model.layers.0` (LlamaDecoderLayer) is compiled" in str(check)
    assert check.num_parameters == sum(p.numel() for p in model.parameters())
    encoder = T5ForConditionalGeneration(T5Config(vocab_size=23, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "is an encoder-decoder (t5)" in check_model(encoder).refusals[0]


def test_a_custom_function_without_a_backward_pass_is_a_failure_not_a_crash():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no backward kernel\nhere")

    check = check_model(with_extra(Forward.apply), **SAMPLE)
    assert any("no backward kernel here" in text for text in check.failures)
    assert check.conservation_error is None
    assert check.verdict == "not supported"
    assert "no backward kernel" in str(check)


def test_relevance_that_is_not_finite_is_a_failure():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    check = check_model(model, **SAMPLE)
    assert check.verdict == "not supported"
    assert any("is not finite" in text for text in check.failures)


def test_parameters_that_the_answer_does_not_reach_are_named():
    model = tiny_llama()
    model.model.unused = nn.Linear(3, 3).double()
    check = check_model(model, **SAMPLE)
    assert check.unreached == ("model.unused.weight", "model.unused.bias")
    assert check.num_attributed == check.num_parameters - 12
    assert check.verdict == "supported"  # it is no fault of attribution's


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_errors_by_dtype(build, dtype, bound):
    check = check_model(build().to(dtype))
    assert check.dtype == dtype
    assert check.conservation_error < bound
    assert check.verdict == "supported"
    assert check.expected_error <= 0.1


def test_adapters_are_checked_with_the_model():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    check = check_model(model.double(), **SAMPLE)
    assert check.verdict == "supported"
    assert check.unreached == ()
    assert [layer.name for layer in check.layers][1] == "base_model.model.model.layers.0"
    assert check.conservation_error < 1e-13


def test_the_coarsest_dtype_counts():
    model = tiny_llama(tied=False)
    model.lm_head = nn.Sequential(Cast(torch.bfloat16), model.lm_head.bfloat16())
    check = check_model(model)
    assert check.dtype == torch.bfloat16
    assert check.verdict == "supported"


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_nothing_is_left_on_the_model(build):
    model = build().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    snapshot = Snapshot(model)
    with torch.no_grad():
        assert check_model(model).verdict == "supported"
    snapshot.assert_untouched()
    with torch.inference_mode():
        assert check_model(model, IDS).verdict == "supported"
    snapshot.assert_untouched()
    assert torch.overrides._get_current_function_mode() is None


def test_nothing_is_left_after_a_failure():
    model = with_extra(lambda x: torch.exp(x))
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 1 / 0)
    snapshot = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        check_model(model)
    snapshot.assert_untouched()
    handle.remove()


def test_strict_rules_stay_strict_after_and_beside_a_check():
    model = with_extra(lambda x: torch.exp(Doubling.apply(x)))
    for rule in ("attnlrp", "cplrp"):
        assert len(check_model(model, **SAMPLE, rule=rule).uncovered) == 2
        with pytest.raises(UnsupportedModelError, match="out of attribution's sight"), lrp_rules(model, rule):
            model(IDS)
    with pytest.raises(AgclError, match="is on already"), lrp_rules(model):
        check_model(model)
    with pytest.raises(UnsupportedModelError), lrp_rules(model):
        model(IDS)


def test_blocks_are_found_among_experts_and_shared_layers():
    class Model(nn.Module):
        def __init__(self, experts, shared):
            super().__init__()
            block = nn.Linear(2, 2)
            self.layers = nn.ModuleList([block if shared else nn.Linear(2, 2) for _ in range(2)])
            for layer in set(self.layers):
                layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(experts))
                layer.register_forward_hook(lambda module, args, output: sum(e(output) for e in module.experts))
            self.unused = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    for shared in (False, True):
        model = Model(5, shared)
        name, blocks = find_blocks(model, lambda model=model: model(torch.ones(2)))
        assert name == "layers"
        assert blocks == list(model.layers)
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert find_blocks(plain, lambda: plain(torch.ones(2))) == ("", list(plain))
    backwards = Model(1, False)
    backwards.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert find_blocks(backwards, lambda: backwards.layers[0](backwards.layers[1](torch.ones(2)))) == ("", [])


class Hidden(nn.Module):
    """Holds blocks as a ModuleList does, without being one."""

    def __init__(self, blocks):
        super().__init__()
        self.first, self.second = blocks

    def __getitem__(self, index):
        return [self.first, self.second][index]

    def __iter__(self):
        return iter(self[:])


def test_without_a_list_of_blocks_only_the_total_is_told():
    model = tiny_llama()
    expected = check_model(model, **SAMPLE)
    model.model.layers = Hidden(model.model.layers)
    check = check_model(model, **SAMPLE)
    assert check.layers == ()
    assert check.target == expected.target
    assert check.conservation_error < 1e-13
    assert check.verdict == "supported"
    assert "No list of blocks" in str(check)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "epsilon"}, "`rule` is 'epsilon'"),
        ({"targets": TARGETS}, "`targets` is given without `positions`"),
        ({"input_ids": IDS[0]}, r"`input_ids` has shape \(7,\)"),
        ({"input_ids": IDS, "positions": torch.tensor([7])}, r"`positions` runs from 7 to 7, but must lie in \[0, 7\)"),
        ({**SAMPLE, "targets": torch.tensor([1, 23])}, "`targets` holds 23, but the vocabulary has 23 tokens"),
        ({**SAMPLE, "targets": torch.tensor([1])}, "one per target"),
    ],
)
def test_refuses_samples_that_do_not_fit(options, message):
    with pytest.raises(AgclError, match=message):
        check_model(tiny_llama(), **options)


def test_refuses_what_is_no_language_model():
    with pytest.raises(AgclError, match="`model` is a int"):
        check_model(3)
    with pytest.raises(AgclError, match=r"`Linear` has no token embeddings.*give `input_ids`"):
        check_model(nn.Linear(2, 2))

    class Bare(nn.Module):
        def forward(self, input_ids):
            return input_ids.float()

    with pytest.raises(AgclError, match="output of `Bare` has no `logits`"):
        check_model(Bare(), IDS)


def test_the_report_is_readable():
    model = with_extra(lambda x: torch.exp(x))
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj, Extra(torch.exp))
    model.model.add_module("a_module_that_nothing_ever_calls" * 4, nn.Linear(1, 1).double())
    lines = str(check_model(model)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "LlamaForCausalLM (float64): not supported"
    text = "\n".join(lines)
    assert "torch.exp: 2 x in model.layers.*.mlp.down_proj.* (Extra)" in text
    order = [next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("head", "model.layers.1")]
    assert order == sorted(order)
    assert str(check_model(tiny_gpt2())).splitlines()[0] == "GPT2LMHeadModel (float64): supported"
