"""Tiny random members of the decoder families that users have, and float64 where transformers insists on float32."""

import copy
import functools

import torch
from tiny_decoders import VOCAB, randomised
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

_SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_SMALL,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
_WINDOW_IN_LAYER_1 = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_GEMMA = {"query_pre_attn_scalar": 9, "sliding_window": 3}

# name -> (model_type, what differs from the base)
MEMBERS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {**_WINDOW_IN_LAYER_1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _WINDOW_IN_LAYER_1),
    # caps low enough to bend the logits and the scores
    "gemma2": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.3, "tie_word_embeddings": True},
    ),
    "gemma2 without cap on scores": ("gemma2", {**_GEMMA, "attn_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2, "rope_parameters": _ROPES}),
    "phi3": ("phi3", {"sliding_window": 3, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "pythia": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "gpt_neox in sequence": (
        "gpt_neox",
        {"use_parallel_residual": False, "rope_parameters": {"partial_rotary_factor": 1.0}},
    ),
    "opt": ("opt", {"ffn_dim": 12, "tie_word_embeddings": True}),
    "opt, norm after": ("opt", {"ffn_dim": 12, "do_layer_norm_before": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
}
EXPERTS = ("mixtral", "qwen3_moe")
# Further architectures, whose parameters have unusual names or uses; not among those proved against the reference.
_MIXED_ATTENTION = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
_UNUSUAL = {
    "gpt_oss": {**_BASE, **_MIXED_ATTENTION, "num_local_experts": 4, "num_experts_per_tok": 2},
    "xglm": {**_SMALL, "d_model": 16, "ffn_dim": 12, "num_layers": 2, "attention_heads": 4},
    "ctrl": {**_SMALL, "n_embd": 16, "dff": 12, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gemma3n_text": {
        **_BASE,
        **_MIXED_ATTENTION,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
}
UNUSUAL = tuple(_UNUSUAL)
# transformers refuses sdpa for Gemma 2: it has no soft-cap
KINDS = {name: ("eager",) if kind == "gemma2" else ("sdpa", "eager") for name, (kind, _) in MEMBERS.items()}


@functools.cache
def _model(name, attention, tied):
    model_type, differences = MEMBERS[name]
    options = _BASE | differences | ({} if tied is None else {"tie_word_embeddings": tied})
    if model_type == "gpt2":
        options = {"n_inner": 12} | {k: v for k, v in options.items() if k not in ("head_dim", "num_key_value_heads")}
    if model_type in ("gpt_neox", "opt"):
        options = {k: v for k, v in options.items() if k not in ("head_dim", "num_key_value_heads")}
    config = AutoConfig.for_model(model_type, attn_implementation=attention, **copy.deepcopy(options))
    model = randomised(AutoModelForCausalLM.from_config(config), seed=0)
    for parameter in model.parameters():  # values that float32 and bfloat16 hold exactly
        parameter.data = parameter.data.bfloat16().double()
    if name in EXPERTS:
        model.set_experts_implementation("eager")  # the fused kernel has no float64
    return model


def member(name, attention="eager", tied=None):
    """A model of the caller's own, float64, in evaluation mode."""
    return copy.deepcopy(_model(name, attention, tied))


def unusual(model_type):
    """A model of the caller's own, float64, in evaluation mode."""
    config = AutoConfig.for_model(model_type, attn_implementation="eager", **copy.deepcopy(_UNUSUAL[model_type]))
    model = randomised(AutoModelForCausalLM.from_config(config), seed=0)
    if "experts" in " ".join(dict(model.named_parameters())):
        model.set_experts_implementation("eager")  # the fused kernel has no float64
    return model


class KeepFloat64(TorchFunctionMode):
    """Inside, what asks for float32 gets float64: norms, rotary angles, softmax of eager attention and routers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
