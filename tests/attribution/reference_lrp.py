"""Relevance of whole decoders, carried explicitly: each family is a declaration of which steps it is made of."""

from dataclasses import dataclass, replace

import torch
from reference_steps import Steps, chain, residual, rotary_maps, soft_cap, split
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """What a family is made of, in the names of its parameters; figures come from the config."""

    body: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    position_offset: int = 0
    norm: str = "rms"  # or "layer", or "rms + 1": weights are stored minus one
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, str] | None = None
    final_norm: str = "norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one name: fused
    qkv_by_head: bool = False
    qk_norms: tuple[str, str] | None = None
    out: str = "self_attn.o_proj"
    rotary: bool = True
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # (gate_up, down) if fused; or two maps
    gated: bool = True
    activation: str = "silu"
    experts: bool = False
    transposed: bool = False
    scaled_embedding: bool = False


_GEMMA = Family(
    norm="rms + 1",
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    activation="gelu_tanh",
    scaled_embedding=True,
)
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_PLAIN = Family(norm="layer", gated=False)

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norms=_QK_NORMS),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, qk_norms=_QK_NORMS),
    "phi3": Family(qkv=("self_attn.qkv_proj",), mlp=("mlp.gate_up_proj", "mlp.down_proj")),
    "mixtral": Family(experts=True),
    "qwen3_moe": Family(qk_norms=_QK_NORMS, experts=True),
    "gpt2": replace(
        _PLAIN,
        body="transformer",
        layers="h",
        embedding="wte",
        positions="wpe",
        norms=("ln_1", "ln_2"),
        final_norm="ln_f",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        rotary=False,
        mlp=("mlp.c_fc", "mlp.c_proj"),
        activation="gelu_tanh",
        transposed=True,
    ),
    "gpt_neox": replace(
        _PLAIN,
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        out="attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        activation="gelu",
    ),
    "opt": replace(
        _PLAIN,
        body="model.decoder",
        positions="embed_positions",
        position_offset=2,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="final_layer_norm",
        out="self_attn.out_proj",
        rotary=False,
        mlp=("fc1", "fc2"),
        activation="relu",
    ),
}


@dataclass
class Reference:
    """What came out: relevance of parameters by name, of the token embeddings and of each layer's input; the target."""

    parameters: dict[str, Tensor]
    tokens: Tensor
    layer_inputs: list[Tensor]
    target: Tensor
    logits: Tensor


def canonical(name: str) -> str:
    """A parameter's name as it is without the wrappings of PEFT."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def reference_relevance(model, ids, positions, targets, rule, *, lora_scale=1.0, **changes) -> Reference:
    """Relevance of a causal language model for ``sum_k logits[positions[k], targets[k]]``; ``changes`` of figures."""
    family = FAMILIES[model.config.model_type]
    parameters = {canonical(name): value.detach().double() for name, value in model.named_parameters()}
    steps = Steps(parameters, cplrp=rule == "cplrp", transposed=family.transposed, lora_scale=lora_scale)
    config = {key: getattr(model.config, key, None) for key in _FIGURES} | changes
    return _Decoder(family, config, steps, len(ids)).run(ids, positions, targets)


_FIGURES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "layer_types", "sliding_window"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
    *("num_experts_per_tok", "num_local_experts", "num_experts", "norm_topk_prob", "do_layer_norm_before"),
)


class _Decoder:
    def __init__(self, family: Family, config: dict, steps: Steps, seq: int):
        self.family, self.config, self.steps, self.seq = family, config, steps, seq
        self.heads = config["num_attention_heads"]
        self.groups = config["num_key_value_heads"] or self.heads
        self.d = config["head_dim"] or config["hidden_size"] // self.heads

    def norm(self, name):
        epsilons = [self.config[key] for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")]
        eps = next((value for value in epsilons if value is not None), 1e-5)
        if self.family.norm == "layer":
            return self.steps.layer_norm(name, eps)
        return self.steps.rms_norm(name, eps, offset=float(self.family.norm == "rms + 1"))

    def figure_of_layer(self, key, index):
        kinds = self.config["layer_types"]
        if key == "sliding_window":
            return self.config[key] if kinds is None or kinds[index] == "sliding_attention" else None
        figures = self.config[key]
        return figures[kinds[index]] if kinds is not None and kinds[index] in figures else figures

    def split_heads(self, fused):
        """(tokens, all outputs) -> q, k, v of shapes (heads, tokens, d)."""
        if self.family.qkv_by_head:
            return fused.view(self.seq, self.heads, 3, self.d).permute(2, 1, 0, 3).unbind(0)
        parts = fused.split([count * self.d for count in (self.heads, self.groups, self.groups)], -1)
        return [part.reshape(self.seq, -1, self.d).transpose(0, 1) for part in parts]

    def join_heads(self, q, k, v):
        if self.family.qkv_by_head:
            return torch.stack([q, k, v]).permute(2, 1, 0, 3).reshape(self.seq, -1)
        return torch.cat([part.transpose(0, 1).reshape(self.seq, -1) for part in (q, k, v)], -1)

    def turn(self, index, layer, which):
        """What happens to queries (0) or keys (1) between projection and product: norm and rotation."""
        family, parts = self.family, []
        if family.qk_norms:
            parts.append(self.norm(layer + family.qk_norms[which]))
        if family.rotary:
            rope = self.figure_of_layer("rope_parameters", index)
            turned = int(self.d * rope.get("partial_rotary_factor", 1.0))
            parts.append(self.steps.rotate(rotary_maps(self.seq, self.d, turned, rope["rope_theta"])))
        return chain(*parts)

    def mixing(self, index, layer):
        config, repeats = self.config, self.heads // self.groups
        options = {
            "scale": (config["query_pre_attn_scalar"] or self.d) ** -0.5,
            "window": self.figure_of_layer("sliding_window", index),
            "cap": config["attn_logit_softcapping"],
        }

        def step(fused):
            q, k, v = self.split_heads(fused)
            (q, back_q), (k, back_k) = (self.turn(index, layer, n)(x) for n, x in enumerate((q, k)))
            k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
            mixed, back_mixed = self.steps.mixing(q, k, v, **options)

            def back(relevance):
                per_head = relevance.view(self.seq, self.heads, self.d).transpose(0, 1)
                to_q, to_k, to_v = back_mixed(per_head)
                to_k, to_v = (r.view(self.groups, repeats, self.seq, self.d).sum(1) for r in (to_k, to_v))
                return self.join_heads(back_q(to_q), back_k(to_k), to_v)

            return mixed.transpose(0, 1).reshape(self.seq, -1), back

        return step

    def attention(self, index, layer):
        project = self.steps.side_by_side(*(self.steps.linear(layer + name) for name in self.family.qkv))
        return chain(project, self.mixing(index, layer), self.steps.linear(layer + self.family.out))

    def mlp(self, layer):
        family, steps, config = self.family, self.steps, self.config
        if family.experts:

            def expert(e):
                up, down = (steps.matrix(f"{layer}mlp.experts.{n}_proj", e) for n in ("gate_up", "down"))
                return chain(up, steps.gate(family.activation), down)

            # Mixtral has no switch for it: the chosen scores always add up to one
            renormalised = config["norm_topk_prob"] in (None, True)
            top = config["num_experts_per_tok"]
            return steps.mixture(layer + "mlp.gate.weight", expert, top=top, renormalised=renormalised)
        *first, last = (layer + name for name in family.mlp)
        if not family.gated:
            return steps.plain_mlp(*first, last, family.activation)
        up = steps.side_by_side(*(steps.linear(name) for name in first))
        return chain(up, steps.gate(family.activation), steps.linear(last))

    def layer(self, index):
        name = f"{self.family.body}.{self.family.layers}.{index}."
        blocks = [self.attention(index, name), self.mlp(name)]
        norms = [self.norm(name + norm) for norm in self.family.norms]
        if self.config["do_layer_norm_before"] is False:
            return chain(residual(blocks[0]), norms[0], residual(blocks[1]), norms[1])
        branches = [chain(norm, block) for norm, block in zip(norms, blocks, strict=True)]
        if self.family.post_norms:
            after = [self.norm(name + norm) for norm in self.family.post_norms]
            branches = [chain(branch, norm) for branch, norm in zip(branches, after, strict=True)]
        if self.config["use_parallel_residual"]:
            return residual(*branches)
        return chain(*(residual(branch) for branch in branches))

    def run(self, ids, positions, targets):
        family, steps = self.family, self.steps
        embedding, final = f"{family.body}.{family.embedding}.weight", f"{family.body}.{family.final_norm}"
        factor = self.config["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0
        terms = [steps.p[embedding][ids] * factor]
        places = torch.arange(self.seq) + family.position_offset
        if family.positions:
            terms.append(steps.p[f"{family.body}.{family.positions}.weight"][places])
        x, backs = sum(terms), []
        for index in range(self.config["num_hidden_layers"]):
            x, back = self.layer(index)(x)
            backs.append(back)
        head = [self.norm(final)] if steps.has(final + ".weight") else []
        head.append(steps.matrix("lm_head.weight" if steps.has("lm_head.weight") else embedding))
        if self.config["final_logit_softcapping"]:
            head.append(soft_cap(self.config["final_logit_softcapping"]))
        logits, back = chain(*head)(x)
        relevance = torch.zeros_like(logits)
        relevance[positions, targets] = logits[positions, targets]
        target, relevance = relevance.sum(), back(relevance)
        layer_inputs = []
        for back in reversed(backs):
            relevance = back(relevance)
            layer_inputs.insert(0, relevance)
        to_tokens, *to_places = split(relevance, terms)
        steps.relevance[embedding].index_add_(0, ids, to_tokens)
        if family.positions:
            steps.relevance[f"{family.body}.{family.positions}.weight"].index_add_(0, places, *to_places)
        return Reference(steps.relevance, to_tokens, layer_inputs, target, logits)
