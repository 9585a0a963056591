"""``agcl check-model NAME``: does attribution understand this model?"""

from typing import Any, Literal

import torch

from agcl.errors import AgclError, one_line

# transformers takes seconds to import, which the other commands do without: it is imported where it is used.

_SEED = 0


def check_model(
    model_name_or_path: str,
    *,
    gguf_file: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    random_weights: bool = False,
    layers: int | None = None,
) -> int:
    """Check whether attribution understands a model, and print a report.

    Args:
        model_name_or_path: Hub name, local folder, or builtin:NAME.
        gguf_file: Name of a GGUF file in that folder or repository.
        prompt: Text to attribute on. Left out, a random prompt of 16 tokens is drawn, and no tokenizer is needed.
        answer: Text that follows the prompt (it usually starts with a space), whose tokens are attributed. Left out,
            the tokens that the model predicts at the last 4 positions of the prompt are.
        trust_remote_code: Run model code that comes with the checkpoint. Off unless you trust its author.
        dtype: Floating-point type of the weights; float32 tells rounding from a wrong rule, bfloat16 hardly.
        random_weights: Build the model from its configuration alone, without its weights.
        layers: Number of layers to build it with, so that the architecture of a large model can be checked; with
            random weights only.

    Returns:
        Exit status: 0 if the verdict is "supported", 1 otherwise.

    Raises:
        AgclError: If the model or its tokenizer cannot be loaded or built, or the options do not go together.
    """
    from agcl.attribution.selfcheck import check_model as run_check
    from agcl.models import load_model

    if answer is not None and prompt is None:
        raise AgclError("`answer` is given without `prompt`; give the text that it follows.")
    if layers is not None and not random_weights:
        raise AgclError("`layers` is given, but a checkpoint has the layers it has; add `random_weights`.")
    if layers is not None and layers < 1:
        raise AgclError(f"`layers` is {layers}; give at least 1.")
    options: dict[str, Any] = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    sample: dict[str, Any] = {} if prompt is None else _sample(model_name_or_path, prompt, answer, options)
    if random_weights:
        model = random_model(model_name_or_path, getattr(torch, dtype), layers, options)
    else:
        model = load_model(model_name_or_path, dtype=getattr(torch, dtype), **options)
    check = run_check(model, **sample)
    print(check)
    return 0 if check.verdict == "supported" else 1


def _sample(name: str, prompt: str, answer: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from agcl.models import load_tokenizer

    tokenizer = load_tokenizer(name, **options)
    prompt_ids = tokenizer(prompt)["input_ids"]
    if not prompt_ids:
        raise AgclError(f"`prompt` is {prompt!r}, which has no tokens.")
    if answer is None:
        return {"input_ids": torch.tensor([prompt_ids])}
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not answer_ids:
        raise AgclError(f"`answer` is {answer!r}, which has no tokens.")
    first = len(prompt_ids) - 1
    return {
        "input_ids": torch.tensor([[*prompt_ids, *answer_ids[:-1]]]),
        "positions": torch.arange(first, first + len(answer_ids)),
        "targets": torch.tensor(answer_ids),
    }


def random_model(name: str, dtype: torch.dtype, layers: int | None, options: dict[str, Any]) -> Any:
    """The architecture alone; the same weights each time, without touching the random state.

    Args:
        name: Hub name, local folder, or builtin:NAME.
        dtype: Of the weights.
        layers: Number of layers; the configuration's if None.
        options: ``gguf_file`` and ``trust_remote_code``.

    Raises:
        AgclError: If it cannot be built.
    """
    from transformers import AutoModelForCausalLM

    from agcl.models import load_config

    config = load_config(name, **options)
    try:
        if layers is not None:
            _shrink(config.get_text_config(), layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=options["trust_remote_code"]
            ).eval()
    except Exception as error:  # each configuration has its own validation
        reason = one_line(error)
        raise AgclError(f"`{name}` cannot be built from its configuration ({reason}).") from error


def _shrink(config: Any, layers: int) -> None:
    """Set the number of layers, and shorten the lists that have an entry for each (types of attention and the like)."""
    former = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == former and layers < former:
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
