"""Ordinary text in windows of equal length, to measure what a language model makes of it."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agcl.data.sources import builtin_file
from agcl.errors import AgclError


def load_text(source: str) -> str:
    """Read a text.

    Args:
        source: ``builtin:text/alice``, or a text file in UTF-8.

    Raises:
        AgclError: If it is not there or not text.
    """
    if source.startswith("builtin:"):
        path = builtin_file(source, ".txt", "There is no built-in text")
    else:
        path = Path(source).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AgclError(f"The text {source} cannot be read: {error}.") from error


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, num_windows: int, window_tokens: int) -> Tensor:
    """Cut a text into windows that do not overlap, evenly spaced from its beginning to its end.

    Where the tokenizer begins every input with a beginning-of-sequence token, each window gets one in front.

    Args:
        text: The text.
        tokenizer: The model's.
        num_windows: Number of windows.
        window_tokens: Tokens of the text in each.

    Returns:
        Token ids, int64, shape ``(num_windows, window_tokens)``, or one longer with the token in front.

    Raises:
        AgclError: If the text is too short.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    spacing = len(ids) // num_windows
    if spacing < window_tokens:
        raise AgclError(
            f"The text has {len(ids)} tokens, too few for {num_windows} windows of {window_tokens}: take fewer or "
            "shorter ones, or a longer text."
        )
    windows = torch.tensor([ids[start : start + window_tokens] for start in range(0, spacing * num_windows, spacing)])
    beginning = tokenizer.bos_token_id
    if beginning is None or tokenizer("a")["input_ids"][0] != beginning:
        return windows
    return torch.cat([torch.full((num_windows, 1), int(beginning)), windows], dim=1)
