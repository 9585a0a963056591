"""Text that a model writes by itself: what it could do before the first task, with no data kept."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agcl.architectures import context_tokens
from agcl.attribution.computing import check_options, compute_input_moments
from agcl.attribution.directions import InputMoments
from agcl.attribution.estimators import PerSampleGradient
from agcl.attribution.lrp import evaluation_mode
from agcl.attribution.passes import Sample
from agcl.errors import AgclError
from agcl.scoring import plain_generation


def write_text(model: Any, tokenizer: PreTrainedTokenizerBase, num_pieces: int, num_tokens: int, seed: int) -> Tensor:
    """Pieces of text, drawn from the model's own distribution after the token that its inputs begin with.

    Args:
        model: The language model.
        tokenizer: Its tokenizer; without a beginning-of-sequence token, its end-of-sequence token begins each piece.
        num_pieces: How many.
        num_tokens: Tokens of each, the first one included; at most the model's context.
        seed: Of what is drawn. The global random state stays as it is.

    Returns:
        Token ids, int64, shape ``(num_pieces, num_tokens)``, on the model's device.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    start = torch.full((num_pieces, 1), int(begin), device=model.device)
    context = context_tokens(model.config) or num_tokens
    written = min(num_tokens, context) - 1
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            generation_config=plain_generation(
                tokenizer,
                max_new_tokens=written,
                min_new_tokens=written,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            ),
        )


def text_samples(pieces: Tensor) -> list[Sample]:
    """A sample for each piece of text, shape ``(num_pieces, num_tokens)``: every token but the first is an answer."""
    places = torch.arange(pieces.shape[1] - 1, device=pieces.device)
    return [Sample(piece, places, piece[1:]) for piece in pieces]


def own_text_moments(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_pieces: int = 16,
    num_tokens: int = 64,
    batch_size: int = 8,
    estimator: PerSampleGradient | None = None,
    parameters: str = "",
    seed: int = 0,
) -> InputMoments:
    """What the model's own text asks of the directions of each weight matrix's inputs.

    Computed before the first task and held like a task, it keeps what the model could do before, with no data.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        num_pieces: Pieces of text that the model writes.
        num_tokens: Tokens of each.
        batch_size: Pieces that are run together.
        estimator: See :func:`agcl.compute_input_moments`.
        parameters: See :func:`agcl.compute_input_moments`.
        seed: Of what is drawn.

    Returns:
        The moments, as from :func:`agcl.compute_input_moments`.

    Raises:
        AgclError: For options that cannot be used.
        UnsupportedModelError: If the estimator cannot see into the model.
    """
    check_options(num_pieces, batch_size, 8, parameters)
    if num_tokens < 2:
        raise AgclError(f"`num_tokens` is {num_tokens}; choose 2 or more.")
    pieces = write_text(model, tokenizer, num_pieces, num_tokens, seed)
    return compute_input_moments(
        model,
        [{"input_ids": piece, "labels": piece} for piece in pieces],
        num_samples=num_pieces,
        batch_size=batch_size,
        estimator=estimator,
        only_correct=False,  # what was drawn is seldom the likeliest
        parameters=parameters,
    )
