"""A second, slow derivation of the rules: relevance carried explicitly, layer by layer, from the published definitions.

No autograd and no model code: activations are computed from the weights by hand, then relevance goes back through each
step in the ratio form ``R_i = (contribution of i) / (sum of contributions) * R_o``. Float64, one sample.
"""

from collections import defaultdict

import torch
from torch import Tensor


def share(relevance: Tensor, value: Tensor) -> Tensor:
    """R / z, and 0 where nothing arrived."""
    return torch.where(relevance == 0, 0.0, relevance / torch.where(relevance == 0, 1.0, value))


class Explicit:
    """Collects the relevance of parameters by name; tied uses add up."""

    def __init__(self, model, rule):
        self.p = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.config = model.config
        self.cplrp = rule == "cplrp"
        self.relevance = defaultdict(float)

    def linear(self, x, relevance, weight_name, bias_name=None, transposed=False):
        weight = self.p[weight_name].T if transposed else self.p[weight_name]  # (out, in)
        contributions = torch.einsum("oi,ti->toi", weight, x)
        z = contributions.sum(-1) + (self.p[bias_name] if bias_name else 0.0)
        ratio = share(relevance, z)
        to_weight = torch.einsum("toi,to->oi", contributions, ratio)
        self.relevance[weight_name] = self.relevance[weight_name] + (to_weight.T if transposed else to_weight)
        if bias_name:
            self.relevance[bias_name] = self.relevance[bias_name] + (self.p[bias_name] * ratio).sum(0)
        return torch.einsum("toi,to->ti", contributions, ratio)

    def residual(self, a, b, relevance):
        ratio = share(relevance, a + b)
        return a * ratio, b * ratio

    def rms_norm(self, relevance, weight_name):
        # y = w * c * x with c constant: x and w are each the only input of an element-wise linear map.
        self.relevance[weight_name] = self.relevance[weight_name] + relevance.sum(0)
        return relevance

    def layer_norm(self, x, relevance, name, eps):
        width = x.shape[-1]
        centring = torch.eye(width, dtype=x.dtype) - 1 / width
        weight, bias = self.p[name + ".weight"], self.p[name + ".bias"]
        constant = 1 / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)
        contributions = weight[None, :, None] * constant[:, :, None] * centring[None] * x[:, None, :]
        ratio = share(relevance, contributions.sum(-1) + bias)
        self.relevance[name + ".weight"] = self.relevance[name + ".weight"] + (contributions.sum(-1) * ratio).sum(0)
        self.relevance[name + ".bias"] = self.relevance[name + ".bias"] + (bias * ratio).sum(0)
        return torch.einsum("toi,to->ti", contributions, ratio)

    def attention(self, q, k, v, relevance):
        """One head: o = softmax(q k / sqrt(d)) v, causal. Uniform rule at both products, Taylor at the softmax."""
        scale = q.shape[-1] ** -0.5
        terms = torch.einsum("td,jd->tjd", q, k) * scale
        scores = terms.sum(-1)
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        weights = torch.where(causal, scores, -torch.inf).softmax(-1)
        contributions = torch.einsum("tj,jd->tjd", weights, v)
        passed = contributions * share(relevance, contributions.sum(1))[:, None, :]
        if self.cplrp:
            return torch.zeros_like(q), torch.zeros_like(k), passed.sum(0)
        to_weights, to_v = passed.sum(-1) / 2, passed.sum(0) / 2
        to_scores = torch.where(causal, scores * (to_weights - weights * to_weights.sum(-1, keepdim=True)), 0.0)
        to_terms = terms * share(to_scores, scores)[:, :, None]
        return to_terms.sum(1) / 2, to_terms.sum(0) / 2, to_v

    def embedding(self, ids, relevance, name):
        table = torch.zeros_like(self.p[name])
        for position, token in enumerate(ids.tolist()):
            table[token] += relevance[position]
        self.relevance[name] = self.relevance[name] + table


def start(logits, positions, targets):
    """Relevance at the output: the target logits themselves."""
    relevance = torch.zeros_like(logits)
    for position, target in zip(positions.tolist(), targets.tolist(), strict=True):
        relevance[position, target] += logits[position, target]
    return relevance


def llama_relevance(model, ids, positions, targets, rule):
    """(relevance of the embeddings, {parameter: relevance}, f) of a LlamaForCausalLM whose norms compute in float64."""
    e = Explicit(model, rule)
    config, seq = model.config, len(ids)
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    frequencies = 1.0 / (theta ** (torch.arange(0, d, 2, dtype=torch.float) / d))
    angles = torch.arange(seq, dtype=torch.float)[:, None] * frequencies  # float32, as in the model
    cos, sin = angles.cos().double(), angles.sin().double()
    rotations = torch.stack([_rotation(cos[t], sin[t]) for t in range(seq)])  # (seq, out, in)

    def norm(x, name):
        return e.p[name] * x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    def split(x, count):
        return x.view(seq, count, d).transpose(0, 1)

    def join(x):
        return x.transpose(0, 1).reshape(seq, -1)

    x = e.p["model.embed_tokens.weight"][ids]
    embedded, stack = x, []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        normed = norm(x, layer + "input_layernorm.weight")
        raw = {
            n: split(normed @ e.p[f"{layer}self_attn.{n}_proj.weight"].T, heads if n == "q" else groups) for n in "qkv"
        }
        turned = {n: torch.einsum("toi,hti->hto", rotations, raw[n]) for n in "qk"}
        per_head = {n: (turned | {"v": raw["v"]})[n] for n in "qkv"}
        if heads != groups:
            per_head |= {n: per_head[n].repeat_interleave(heads // groups, 0) for n in "kv"}
        scores = per_head["q"] @ per_head["k"].transpose(1, 2) * d**-0.5
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        mixed = join(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ per_head["v"])
        attended = mixed @ e.p[layer + "self_attn.o_proj.weight"].T
        middle = x + attended
        normed2 = norm(middle, layer + "post_attention_layernorm.weight")
        gate, up = (normed2 @ e.p[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        product = gate * torch.sigmoid(gate) * up
        out = product @ e.p[layer + "mlp.down_proj.weight"].T
        stack.append((layer, x, normed, raw, turned, per_head, mixed, attended, middle, normed2, product, out))
        x = middle + out
    final = norm(x, "model.norm.weight")
    head = "lm_head.weight" if "lm_head.weight" in e.p else "model.embed_tokens.weight"
    logits = final @ e.p[head].T

    relevance = start(logits, positions, targets)
    f = relevance.sum()
    relevance = e.rms_norm(e.linear(final, relevance, head), "model.norm.weight")
    for layer, x, normed, raw, turned, per_head, mixed, attended, middle, normed2, product, out in reversed(stack):
        to_middle, to_out = e.residual(middle, out, relevance)
        to_product = e.linear(product, to_out, layer + "mlp.down_proj.weight")
        to_gate, to_up = (0 * to_product, to_product) if e.cplrp else (to_product / 2, to_product / 2)
        to_normed2 = e.linear(normed2, to_up, layer + "mlp.up_proj.weight")
        to_normed2 = to_normed2 + e.linear(normed2, to_gate, layer + "mlp.gate_proj.weight")
        to_middle = to_middle + e.rms_norm(to_normed2, layer + "post_attention_layernorm.weight")
        to_x, to_attended = e.residual(x, attended, to_middle)
        to_mixed = split(e.linear(mixed, to_attended, layer + "self_attn.o_proj.weight"), heads)
        back = [e.attention(per_head["q"][h], per_head["k"][h], per_head["v"][h], to_mixed[h]) for h in range(heads)]
        to_heads = dict(zip("qkv", (torch.stack(part) for part in zip(*back, strict=True)), strict=True))
        if heads != groups:
            to_heads |= {n: to_heads[n].view(groups, heads // groups, seq, d).sum(1) for n in "kv"}
        for n in "qk":  # the rotation is a linear map
            ratio = share(to_heads[n], turned[n])
            to_heads[n] = torch.einsum("toi,hti,hto->hti", rotations, raw[n], ratio)
        to_normed = sum(e.linear(normed, join(to_heads[n]), f"{layer}self_attn.{n}_proj.weight") for n in "qkv")
        relevance = to_x + e.rms_norm(to_normed, layer + "input_layernorm.weight")
    e.embedding(ids, relevance, "model.embed_tokens.weight")
    assert torch.equal(embedded, e.p["model.embed_tokens.weight"][ids])
    return relevance, dict(e.relevance), f


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE at one position as a matrix (out, in)."""
    return torch.cat([torch.cat([cos.diag(), -sin.diag()], 1), torch.cat([sin.diag(), cos.diag()], 1)], 0)


def gpt2_relevance(model, ids, positions, targets, rule):
    """(relevance of the token embeddings, {parameter: relevance}, f) of a GPT2LMHeadModel."""
    e = Explicit(model, rule)
    config, seq = model.config, len(ids)
    heads, eps = config.n_head, config.layer_norm_epsilon
    d = config.n_embd // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return e.p[name + ".weight"] * centred / torch.sqrt(variance + eps) + e.p[name + ".bias"]

    def conv(x, name):
        return x @ e.p[name + ".weight"] + e.p[name + ".bias"]

    def split(x):
        return x.view(seq, heads, d).transpose(0, 1)

    def join(x):
        return x.transpose(0, 1).reshape(seq, -1)

    def back_conv(x, relevance, name):
        return e.linear(x, relevance, name + ".weight", name + ".bias", transposed=True)

    tokens, places = e.p["transformer.wte.weight"][ids], e.p["transformer.wpe.weight"][:seq]
    x, stack = tokens + places, []
    for index in range(config.n_layer):
        layer = f"transformer.h.{index}."
        normed = norm(x, layer + "ln_1")
        q, k, v = (split(part) for part in conv(normed, layer + "attn.c_attn").split(config.n_embd, -1))
        scores = q @ k.transpose(1, 2) * d**-0.5
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        mixed = join(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
        attended = conv(mixed, layer + "attn.c_proj")
        middle = x + attended
        normed2 = norm(middle, layer + "ln_2")
        hidden = conv(normed2, layer + "mlp.c_fc")
        bent = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        out = conv(bent, layer + "mlp.c_proj")
        stack.append((layer, x, normed, q, k, v, mixed, attended, middle, normed2, bent, out))
        x = middle + out
    final = norm(x, "transformer.ln_f")
    head = "lm_head.weight" if "lm_head.weight" in e.p else "transformer.wte.weight"
    logits = final @ e.p[head].T

    relevance = start(logits, positions, targets)
    f = relevance.sum()
    relevance = e.layer_norm(x, e.linear(final, relevance, head), "transformer.ln_f", eps)
    for layer, x, normed, q, k, v, mixed, attended, middle, normed2, bent, out in reversed(stack):
        to_middle, to_out = e.residual(middle, out, relevance)
        to_bent = back_conv(bent, to_out, layer + "mlp.c_proj")  # identity rule: bent -> hidden
        to_middle = to_middle + e.layer_norm(
            middle, back_conv(normed2, to_bent, layer + "mlp.c_fc"), layer + "ln_2", eps
        )
        to_x, to_attended = e.residual(x, attended, to_middle)
        to_mixed = split(back_conv(mixed, to_attended, layer + "attn.c_proj"))
        back = [e.attention(q[h], k[h], v[h], to_mixed[h]) for h in range(heads)]
        to_qkv = torch.cat([join(torch.stack(part)) for part in zip(*back, strict=True)], -1)
        to_normed = back_conv(normed, to_qkv, layer + "attn.c_attn")
        relevance = to_x + e.layer_norm(x, to_normed, layer + "ln_1", eps)
    to_tokens, to_places = e.residual(tokens, places, relevance)
    e.embedding(ids, to_tokens, "transformer.wte.weight")
    e.embedding(torch.arange(seq), to_places, "transformer.wpe.weight")
    return to_tokens, dict(e.relevance), f
