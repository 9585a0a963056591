"""Writing the folder: weights and tokenizer, importance files, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from agcl.attribution.storage import index_of
from agcl.checkpoints import look_into, model_weights
from agcl.errors import AgclError, one_line
from agcl.files import replacing_folder
from agcl.models import load_model, load_tokenizer, put_adapter_on, save_model, with_quantised
from agcl.results import shown_name
from agcl.task_pairs import activate, add_pairs, num_pairs

from .card import model_card
from .finding import Trained

_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's


def export_model(trained: Trained, output: Path, *, name: str | None = None, trust_remote_code: bool = False) -> None:
    """Write a trained model (or its adapter), tokenizer, importance files and model card to a folder.

    The folder appears whole or not at all.

    Args:
        trained: From `find_trained`.
        output: The folder to write; it must not exist, or be empty.
        name: The model's name on its card; the folder's if left out.
        trust_remote_code: Run model code that comes with the model. Off unless you trust its author.

    Raises:
        AgclError: If the folder is in use, or the checkpoint's weights do not fit the model that it names.
    """
    if output.resolve() == Path.cwd():
        raise AgclError(f"{output} is the folder that you are in, which cannot be replaced; name one in it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AgclError(f"{output} exists; choose a folder that does not, or an empty one.")
    with replacing_folder(output) as partial:
        if trained.weights.is_dir():
            shutil.copytree(trained.weights, partial)
        else:
            _write_checkpoint(trained.weights, partial, trust_remote_code)
        for file in trained.importance:
            _copy_importance(file.files, file.path, partial / "importance")
        is_adapter = (partial / _ADAPTER_CONFIG).exists()
        if is_adapter:
            _name_base(partial / _ADAPTER_CONFIG, shown_name(trained.model_name))
        # PEFT has left a card of its own there.
        model_card(trained, name or output.name, is_adapter=is_adapter).save(partial / "README.md")


def _name_base(path: Path, name: str) -> None:
    """Say what an adapter's base model is called; PEFT writes where it was loaded from, one machine's matter."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": name}, indent=2, sort_keys=True), encoding="utf-8")


def _copy_importance(files: list[Path], path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in [*files, *([index_of(path)] if index_of(path).exists() and path not in files else [])]:
        shutil.copy2(file, folder / file.name)


def _write_checkpoint(path: Path, folder: Path, trust_remote_code: bool) -> None:
    checkpoint = look_into(path, "cpu")
    settings = checkpoint["hyper_parameters"]
    weights = model_weights(checkpoint)
    source: dict[str, Any] = {"gguf_file": settings.get("gguf_file"), "trust_remote_code": trust_remote_code}
    name, adapter = settings["model_name_or_path"], settings.get("adapter")
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    with torch.random.fork_rng(devices=[]):  # an adapter's first weights are drawn, and then replaced
        model: Any = load_model(name, dtype=dtype, quantization_config=settings.get("quantization_config"), **source)
        if adapter is not None:
            model = put_adapter_on(model, adapter)
        if num_tasks := num_pairs(weights):
            add_pairs(model, num_tasks)
        try:
            model.load_state_dict(with_quantised(model, weights))
        except RuntimeError as error:
            reason = one_line(error, 200)
            raise AgclError(
                f"The weights in {path} are not those of `{name}` with its adapter ({reason}). Where a method has "
                "changed the model (O-LoRA), export the run's folder, whose final model is written as one adapter."
            ) from error
        if num_tasks:
            activate(model)
        save_model(model, folder)
    load_tokenizer(name, **source).save_pretrained(folder)
