"""The context: what it changes, what it leaves alone, what it refuses. Conservation over families of decoders."""

import pickle
import threading

import pytest
import torch
from tiny_decoders import IDS, POSITIONS, TARGETS, Snapshot, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

from agcl.attribution import OPERATIONS, conservation_error, lrp_rules
from agcl.errors import AgclError, UnsupportedModelError

RULES = ("attnlrp", "cplrp")
BUILDERS = (tiny_llama, tiny_gpt2)

FAMILIES = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4, "attn_implementation": "eager"},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "stablelm": {},
    "nemotron": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "attn_implementation": "eager"},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def family(name):
    base = {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    options = {key: value for key, value in (base | FAMILIES[name]).items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_conserve_and_keep_their_values(name):
    model = family(name)
    plain = model(IDS, use_cache=False).logits
    for rule in RULES:
        with lrp_rules(model, rule):
            assert torch.equal(model(IDS, use_cache=False).logits, plain)
    assert conservation_error(model, IDS, positions=POSITIONS, targets=TARGETS) < 1e-4  # float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", BUILDERS)
def test_forward_values_are_unchanged_bit_for_bit(build, rule, attention, dtype):
    model = build(attention=attention).to(dtype)
    plain = model(IDS).logits
    with lrp_rules(model, rule):
        inside = model(IDS).logits
    assert torch.equal(inside, plain)
    with torch.no_grad(), lrp_rules(model, rule) as context:
        assert torch.equal(model(IDS).logits, plain)
        assert context.report() == {}


@pytest.mark.parametrize("build", BUILDERS)
def test_dropout_is_off_inside_and_flags_return(build):
    model = build().train()
    model.get_submodule("lm_head").eval()
    snapshot = Snapshot(model)
    with lrp_rules(model):
        assert not any(module.training for module in model.modules())
    snapshot.assert_untouched()


def gradients(model, f=None):
    f = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum() if f is None else f
    return torch.autograd.grad(f, list(model.parameters()), allow_unused=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("build", BUILDERS)
def test_other_instance_and_same_instance_afterwards_have_ordinary_gradients(build):
    model, other = build(), build(seed=1)
    mine, theirs = gradients(model), gradients(other)
    snapshot, other_snapshot = Snapshot(model), Snapshot(other)
    with lrp_rules(model):
        assert same(gradients(other), theirs)  # inside the context of the first
        assert not same(gradients(model), mine)
    assert same(gradients(other), theirs)
    assert same(gradients(model), mine)
    snapshot.assert_untouched()
    other_snapshot.assert_untouched()


def test_the_backward_pass_may_follow_the_context():
    model = tiny_llama()
    with lrp_rules(model):
        f = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
        inside = torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
    assert same(torch.autograd.grad(f, list(model.parameters())), inside)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("build", BUILDERS)
def test_nothing_is_left_after_an_exception_in_the_forward_pass(build, error):
    model = build().train()
    expected = gradients(model.eval())
    model.train()
    layers = model.get_submodule("model.layers" if build is tiny_llama else "transformer.h")

    def fail(module, args, output):
        raise error("stop")

    handle = layers[1].mlp.act_fn.register_forward_hook(fail) if build is tiny_llama else None
    handle = handle or layers[1].mlp.act.register_forward_hook(fail)
    snapshot = Snapshot(model)
    with pytest.raises(error, match="stop"), lrp_rules(model):
        model(IDS)
    snapshot.assert_untouched()
    assert torch.overrides._get_current_function_mode() is None
    handle.remove()
    assert same(gradients(model.eval()), expected)


def test_a_failed_pass_does_not_spoil_the_next_one_in_the_same_context():
    model = tiny_llama()
    with lrp_rules(model):
        expected = gradients(model)
        handle = model.model.layers[0].mlp.act_fn.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        handle.remove()
        assert same(gradients(model), expected)


def test_exception_in_the_body_survives():
    model = tiny_llama()
    snapshot = Snapshot(model)
    with pytest.raises(KeyError, match="mine"), lrp_rules(model):
        raise KeyError("mine")
    snapshot.assert_untouched()


def test_contexts_on_two_models_nest():
    a, b = tiny_llama(), tiny_gpt2()
    with lrp_rules(a, "cplrp"):
        alone_a = gradients(a)
    with lrp_rules(b, "attnlrp"):
        alone_b = gradients(b)
    with lrp_rules(a, "cplrp"), lrp_rules(b, "attnlrp"):
        assert [g is None for g in gradients(a)] == [g is None for g in alone_a]
        assert same([g for g in gradients(a) if g is not None], [g for g in alone_a if g is not None])
        assert same(gradients(b), alone_b)


def test_contexts_in_two_threads():
    models = [tiny_llama(seed=0), tiny_llama(seed=1)]

    def attributed(model):
        with lrp_rules(model):
            return gradients(model)

    alone = [attributed(model) for model in models]
    found = {}

    def work(index):
        for _ in range(5):
            found[index] = attributed(models[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[index], alone[index]) for index in range(2))


def test_the_same_model_or_a_part_of_it_is_refused():
    model = tiny_llama()
    snapshot = Snapshot(model)
    for part in (model, model.model, model.model.layers[0]):
        with lrp_rules(model), pytest.raises(AgclError, match="is on already"), lrp_rules(part):
            pass
    with pytest.raises(AgclError, match="inside another one"), lrp_rules(model), lrp_rules(model.model.embed_tokens):
        model(IDS)
    snapshot.assert_untouched()


def test_given_embeddings_equal_looked_up_ones_and_carry_nothing_afterwards():
    model = tiny_llama()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    weights = [model.get_parameter(name) for name in names]
    with lrp_rules(model):
        by_ids = model(IDS, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
        by_embeds = model(inputs_embeds=embeds, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
        positional = model(None, None, None, None, embeds, use_cache=False).logits[0, POSITIONS, TARGETS].sum()
    expected = torch.autograd.grad(by_ids, weights)
    assert same(torch.autograd.grad(by_embeds, weights, retain_graph=True), expected)
    assert same(torch.autograd.grad(positional, weights), expected)
    assert embeds.__dict__ == {}


def test_outputs_carry_no_marks():
    model = tiny_llama()
    with lrp_rules(model):
        output = model(IDS, use_cache=False, output_hidden_states=True)
    assert output.logits.__dict__ == {}
    assert all(state.__dict__ == {} for state in output.hidden_states)
    assert torch.equal(pickle.loads(pickle.dumps(output.logits.detach())), output.logits)


@pytest.mark.parametrize(
    ("build", "attention", "rule", "expected"),
    [
        (tiny_llama, "sdpa", "attnlrp", {"normaliser": 5, "attention": 2, "identity": 2, "uniform product": 2}),
        (tiny_llama, "sdpa", "cplrp", {"normaliser": 5, "attention": 2, "identity": 2, "gate cut": 2}),
        (tiny_llama, "eager", "attnlrp", {"normaliser": 5, "softmax": 2, "identity": 2, "uniform product": 6}),
        (tiny_gpt2, "sdpa", "attnlrp", {"normaliser": 5, "attention": 2, "identity": 2}),
        (tiny_gpt2, "eager", "attnlrp", {"normaliser": 5, "softmax": 2, "identity": 2, "uniform product": 4}),
    ],
)
def test_report_counts_the_rules_of_the_last_pass(build, attention, rule, expected):
    model = build(attention=attention)
    with lrp_rules(model, rule) as context:
        model(IDS)
        model(IDS)
    assert context.report() == expected


class Small(nn.Module):
    """A plain module around a function of ``x`` of shape (2, 4) and a weight (4, 4)."""

    def __init__(self, function):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def relevance(function, rule="attnlrp"):
    """(relevance of x, relevance of the weight, output), with f = sum of the output."""
    model = Small(function)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    with lrp_rules(model, rule):
        y = model(x)
    assert torch.equal(y, model(x))
    grads = torch.autograd.grad(y.sum(), [x, model.weight], allow_unused=True)
    return [v * g if g is not None else None for v, g in zip((x, model.weight), grads, strict=True)] + [y]


CONSERVING = {
    "square by product": lambda x, w: (x @ w) * (x @ w),
    "square": lambda x, w: (x @ w).square(),
    "cube": lambda x, w: (x @ w) ** 3,
    "root": lambda x, w: (x @ w).abs().sqrt(),
    "three factors": lambda x, w: torch.einsum("bi,bi,bi->b", x @ w, x, x @ w.T),
    "list of factors": lambda x, w: torch.einsum("bi,bj->bij", [x @ w, x]),
    "keywords": lambda x, w: torch.mul(input=x @ w, other=x),
    "in place": lambda x, w: (x @ w).mul_(x),
    "summand": lambda x, w: torch.addmm(x[:, :2], x @ w, x.repeat(2, 1)[:, :2]),
    "summand by keyword": lambda x, w: torch.addmm(x[:, :2], mat1=x @ w, mat2=x.repeat(2, 1)[:, :2]),
    "divided": lambda x, w: (x @ w) / (x.abs().sum(-1, keepdim=True)),
    "divided in place": lambda x, w: (x @ w).div_(x.norm(dim=-1, keepdim=True)),
    "divided by keyword": lambda x, w: torch.div(x @ w, other=x.norm(dim=-1, keepdim=True)),
    "negative power": lambda x, w: (x @ w) * x.pow(2).mean(-1, keepdim=True) ** -0.5,
    "torch RMSNorm": lambda x, w: torch.nn.functional.rms_norm(x @ w, (4,), w[0], 1e-3),
    "written into a buffer": lambda x, w: _written(x @ w) * x,
    "selected": lambda x, w: (x @ w).topk(2).values * x.max(-1, keepdim=True).values,
    "scattered": lambda x, w: torch.zeros_like(x).index_add_(0, torch.tensor([1, 0]), x @ w) * x,
    "functional activation": lambda x, w: torch.tanh(x @ w),
    "in-place relu": lambda x, w: torch.relu_(x @ w) * x,
    "gate": lambda x, w: torch.nn.functional.gelu(x @ w) * x,
}


def _written(x):
    buffer = torch.empty(2, 8, dtype=x.dtype)
    view = buffer.view(2, 2, 4)
    view[:, 0].copy_(x)
    buffer[:, 4:] = 2 * x
    return view.sum(1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONSERVING)
def test_operations_conserve(name, rule):
    to_x, _, y = relevance(CONSERVING[name], rule)
    torch.testing.assert_close(to_x.sum(), y.sum(), rtol=1e-12, atol=0)


def test_marks_do_not_spread_to_what_lends_a_dtype():
    """A weight cast to the dtype of an activation is still a weight: no product of activations, nothing halved."""
    to_x, to_weight, y = relevance(lambda x, w: x @ w.type_as(x).view_as(w))
    torch.testing.assert_close(to_x.sum(), y.sum())
    torch.testing.assert_close(to_weight.sum(), y.sum())


def test_cplrp_cuts_the_gate_and_attnlrp_shares():
    def gated(x, w):
        return torch.nn.functional.silu(x @ w) * (x @ w.T)

    plain = {rule: relevance(lambda x, w: torch.nn.functional.silu(x @ w).detach() * (x @ w.T), rule) for rule in RULES}
    cut, shared = relevance(gated, "cplrp"), relevance(gated, "attnlrp")
    torch.testing.assert_close(cut[0], plain["cplrp"][0])
    assert not torch.allclose(shared[0], plain["attnlrp"][0])


def test_cplrp_cuts_attention_weights_written_out():
    def mixed(x, w):
        return torch.softmax((x @ w) @ x.T, -1) @ x

    def constant(x, w):
        return torch.softmax((x @ w) @ x.T, -1).detach() @ x

    torch.testing.assert_close(relevance(mixed, "cplrp")[0], relevance(constant, "cplrp")[0])


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "quick_gelu", "silu", "relu", "relu2", "tanh", "gelu_fast", "mish"]
)
def test_activation_modules_pass_relevance_unchanged(name):
    model = nn.Sequential(ACT2FN[name]).double()
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with lrp_rules(model) as context:
        y = model(x)
    y.sum().backward()
    assert torch.equal(y, model(x))
    torch.testing.assert_close(x * x.grad, y, rtol=1e-12, atol=1e-15)
    assert context.report() == {"identity": 1}


def test_plain_mlp_conserves():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 2, bias=False)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with lrp_rules(model):
        y = model(x)
    y.sum().backward()
    torch.testing.assert_close((x * x.grad).sum(), y.sum())
    torch.testing.assert_close((model[0].weight * model[0].weight.grad).sum(), y.sum())


def test_users_module_backward_hooks_still_work():
    model = tiny_llama()
    with lrp_rules(model):
        expected = gradients(model)
        seen = []
        model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
        assert same(gradients(model), expected)
    assert seen == [(1, 7, 16)]


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@torch.jit.script
def scripted(x):
    return x * 2


REFUSED = {
    "unknown": (lambda x, w: torch.exp(x @ w), r"No relevance rule for `torch.exp` in `model` \(Small\).*OPERATIONS"),
    "unknown native": (lambda x, w: torch.ops.aten.exp(x @ w), "No relevance rule for `aten.exp`"),
    "in-place activation": (
        lambda x, w: torch.nn.functional.silu(x @ w, inplace=True),
        "No relevance rule for `torch.nn.functional.silu`",
    ),
    "power of tensors": (lambda x, w: (x @ w).abs() ** x, "No relevance rule for `torch.Tensor.__pow__`"),
    "custom function": (lambda x, w: Doubling.apply(x @ w) + x, "out of attribution's sight.*DoublingBackward"),
    "custom function last": (lambda x, w: Doubling.apply(x @ w), "out of attribution's sight.*DoublingBackward"),
    "script": (lambda x, w: scripted(x @ w) + x, "out of attribution's sight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_operations_it_does_not_understand(name):
    function, message = REFUSED[name]
    model = Small(function)
    snapshot = Snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message), lrp_rules(model):
        model(torch.randn(2, 4, dtype=torch.float64))
    snapshot.assert_untouched()
    assert torch.overrides._get_current_function_mode() is None


def test_refusal_names_the_enclosing_module():
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = Small(lambda x, w: torch.exp(x))
    message = r"`torch.exp` in `model.layers.1.mlp.act_fn` \(Small\)"
    with pytest.raises(UnsupportedModelError, match=message), lrp_rules(model):
        model(IDS)


def test_cplrp_refuses_to_overwrite_a_gate():
    with pytest.raises(UnsupportedModelError, match=r"No relevance rule for `torch.Tensor.mul_`"):
        relevance(lambda x, w: torch.tanh(x @ w).mul_(x), "cplrp")


def test_unknown_operations_can_be_declared(monkeypatch):
    def function(x, w):
        return torch.logcumsumexp(x @ w, 0)

    with pytest.raises(UnsupportedModelError, match=r"torch\.logcumsumexp"):
        relevance(function)
    monkeypatch.setitem(OPERATIONS, torch.logcumsumexp, "linear")
    assert torch.isfinite(relevance(function)[0]).all()


def test_a_cache_of_an_earlier_pass_is_refused():
    model = tiny_llama()
    with lrp_rules(model):
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="no cache of an earlier pass"):
            model(IDS[:, :1], past_key_values=cache)


def test_refuses_compiled_models():
    compiled = torch.compile(tiny_llama())
    in_place = tiny_llama()
    in_place.model.layers[0].compile()
    for model, name in ((compiled, "OptimizedModule"), (in_place, r"model.layers.0` \(LlamaDecoderLayer")):
        with pytest.raises(UnsupportedModelError, match=f"{name}.*is compiled.*_orig_mod"), lrp_rules(model):
            pass


def test_refuses_scripted_modules():
    with pytest.raises(UnsupportedModelError, match="TorchScript"), lrp_rules(torch.jit.script(nn.Linear(2, 2))):
        pass


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_refuses_opaque_attention(attention):
    model = tiny_llama()
    model.config._attn_implementation_internal = attention
    message = rf'`LlamaForCausalLM` runs attention with {attention!r}.*call `model.set_attn_implementation\("sdpa"\)`'
    with pytest.raises(UnsupportedModelError, match=message), lrp_rules(model):
        pass


def test_refuses_encoder_decoders():
    config = T5Config(vocab_size=23, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    message = r"`T5ForConditionalGeneration` is an encoder-decoder \(t5\)"
    with pytest.raises(UnsupportedModelError, match=message), lrp_rules(model):
        pass


def test_refuses_transformers_without_visible_attention_or_normaliser():
    model = tiny_llama()
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"No normaliser was seen.*`LlamaForCausalLM`"), lrp_rules(model):
        model(IDS)

    class Silent(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn = Silent()
    with pytest.raises(UnsupportedModelError, match="No attention was seen"), lrp_rules(model):
        model(IDS)


def test_refuses_other_rules_and_things():
    message = "`rule` is 'epsilon'; choose one of 'attnlrp', 'cplrp'"
    with pytest.raises(AgclError, match=message), lrp_rules(nn.Linear(1, 1), "epsilon"):
        pass
    with pytest.raises(AgclError, match="`model` is a int"), lrp_rules(3):
        pass
