"""What configurations and modules of transformers' models say of them."""

from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


def not_causal(config: Any) -> str | None:
    """What a model is instead, if it is no causal language model, in which a token sees none that come after it.

    Args:
        config: Of transformers.
    """
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder ({config.model_type})"
    # transformers makes a language model of these too, whose tokens then see the answer that is to be learned.
    kind, is_decoder = getattr(config, "model_type", None), getattr(config, "is_decoder", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        return f"an encoder ({kind} without `is_decoder`)"
    return None


def context_tokens(config: Any) -> int | None:
    """How many tokens a model can look back on, if its configuration states it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map by weights that are no floating-point numbers, as its operations do not tell.

    Args:
        module: Of bitsandbytes, or of another library that replaces ``nn.Linear`` by one with its attributes.
    """
    is_linear = hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children())
    return is_linear and not any(p.dim() > 1 and p.is_floating_point() for p in module.parameters())
