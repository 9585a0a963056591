"""``agcl plan --config ...``: memory and time of a run, before anything is loaded."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from agcl.attribution.directions import is_of_pair
from agcl.attribution.estimators import LRP
from agcl.callbacks import AttributionCallback, Directions
from agcl.callbacks.directions import directions_problem
from agcl.configurations import all_callbacks
from agcl.data.sequence import Regime
from agcl.errors import AgclError, one_line
from agcl.forecast import MACHINES, Forecast, Machine, ModelSize, Precision, Settings, Work, forecast
from agcl.lightning_cli import FitConfiguration
from agcl.models import check_not_quantised, load_config, put_adapter_on
from agcl.task_pairs import add_pairs, pairs_problem, unfit_pairs

DESCRIPTION = "Print what memory and time `agcl fit` with this configuration would take; nothing is loaded."

_PRECISIONS: dict[str, Precision] = {
    "32": "32",
    "32-true": "32",
    "bf16": "bf16",
    "bf16-true": "bf16",
    "16-true": "bf16",
}
_PROBE_ENTRIES = 64  # rows and columns of the parameter that an optimizer's state is counted on


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say.

    Args:
        machine: Each device; left out, cpu where the Trainer's accelerator is, or no GPU is found, else h100.
        rows: Training rows of a task.
        tokens: Tokens of a row.
        answer_tokens: Tokens of the answers among them.
        read_data: Read and encode the tasks' data, and take rows and tokens from there.
    """

    machine: Literal["cpu", "a100", "h100"] | None = None
    rows: int = 1000
    tokens: int = 128
    answer_tokens: int = 16
    read_data: bool = False


def run(args: Sequence[str]) -> int:
    """Print the forecast of the configuration that the arguments give; the exit status: 1 if it does not fit."""
    cli = FitConfiguration(args, prog="agcl plan", description=DESCRIPTION, options=Assumptions)
    machine = machine_of(cli.config)
    size = model_size(cli.config)
    settings = read_settings(cli.config, machine)
    work = _read_work(cli) if cli.config.read_data else read_work(cli.config, settings.devices)
    found = forecast(size, settings, work, machine)
    console = Console(highlight=False)
    console.print(_summary(size, settings, work, machine, is_read=cli.config.read_data), soft_wrap=True)
    for table in _tables(found, machine):
        console.print(table)
    fits = machine.memory is None or found.peak_bytes <= machine.memory
    if not fits:
        has_adapter = cli.config.model.adapter is not None
        helps = "; ".join(remedies(size, settings, has_adapter=has_adapter))
        console.print(f"It does not fit. What would help: {helps}.", soft_wrap=True)
    return 0 if fits else 1


def remedies(size: ModelSize, settings: Settings, *, has_adapter: bool) -> list[str]:
    """What takes less memory on a device, what costs least first.

    Args:
        size: Of the model that does not fit.
        settings: Of the run.
        has_adapter: Whether an adapter alone is trained.
    """
    found = ["fewer rows in a batch (`data.batch_size`)"]
    if not settings.gradient_checkpointing:
        found.append("`model.gradient_checkpointing: true`")
    if size.squares and not settings.importance_on_host:
        found.append("`importance_on: host` (the moments that directions are found from are kept in host memory)")
    if has_adapter and not size.quantised and settings.strategy != "fsdp":
        found.append("`model.quantization_config: {load_in_4bit: true}` (QLoRA)")
    if size.squares and has_adapter:
        found.append("fewer `target_modules` of the adapter, each of which brings the directions of its inputs")
    elif not has_adapter:
        found.append("an adapter")
    if size.squares:
        found.append("`directions: null` (each weight by its own importance, which protects less)")
    if settings.strategy == "fsdp":
        found.append("more devices")
    else:
        found.append("several devices under ModelParallelStrategy" + (", with it" if size.squares else ""))
    return found


def model_size(config: Any, built: Any = None) -> ModelSize:
    """Count the weights of a configuration's model on the meta device.

    Args:
        config: Of ``agcl fit``.
        built: The model, with its adapter if it has one, where it is there already.

    Raises:
        AgclError: If the configuration cannot be loaded, or no model built from it.
    """
    built, callback = model_of(config) if built is None else built, attribution_options(config)
    if callback is None:
        found = size_of(built, {})
    else:
        gated = gated_sizes(built, callback.get("parameters", ""))
        found = size_of(built, gated, by_direction=_gates_by_direction(config, callback))
    quantisation = config.model.quantization_config or getattr(built.config, "quantization_config", None)
    if quantisation is None or config.model.gguf_file is not None:
        return found
    num_weights = _num_quantised(built)
    return replace(found, quantised=num_weights, quantised_bytes=int(num_weights * _bits_of(quantisation) / 8))


def _num_quantised(model: Any) -> int:
    """Weights of the linear maps that libraries quantise: those of an adapter and of the head are left as they are."""
    head = model.get_output_embeddings()
    left = set() if head is None else {id(module) for module in head.modules()}  # it may be wrapped
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in left}
    frozen = {f"{name}.weight": m.weight for name, m in linear.items() if not m.weight.requires_grad}
    return sum(weight.numel() for name, weight in frozen.items() if not is_of_pair(name))


def _bits_of(quantisation: Any) -> float:
    """Of a weight; a scale in float32 for each block of 64 included, as bitsandbytes has it at 4 bits."""
    given = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    return 4.5 if given.get("load_in_4bit") else float(given.get("bits", 8))


def _gates_by_direction(config: Any, callback: Any) -> bool:
    """Whether ``AttributionCallback`` with these arguments gates by direction; as it chooses, if that is auto."""
    directions = callback.get("directions", "auto")
    if directions != "auto":
        return directions is not None
    estimator = callback.get("estimator")
    kind = LRP if estimator is None else _class_of(estimator["class_path"])
    source, reestimate = callback.get("source", "running"), callback.get("reestimate", 0)
    problem = directions_problem(kind, source, reestimate, callback.get("strength", 1.0))
    return not _is_sharded(config) and (problem or pairs_problem(config.model.adapter)) is None


def size_of(built: Any, gated: dict[str, int], *, by_direction: bool = False) -> ModelSize:
    """What of a model decides memory and time.

    Args:
        built: The model, with its adapter if it has one.
        gated: Name -> number of entries of the parameters that get importance.
        by_direction: Whether matrices are gated by the directions of their inputs.
    """
    text = built.config.get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    inner = inner or getattr(text, "n_inner", None) or 4 * text.hidden_size
    matrices = list(matrices_of(built, gated).values()) if by_direction else []
    return ModelSize(
        weights=sum(parameter.numel() for parameter in built.parameters()),
        trained=sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad),
        gated=sum(gated.values()),
        largest=max(gated.values(), default=0),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=inner * (getattr(text, "num_experts_per_tok", None) or 1),
        vocabulary=text.vocab_size,
        matrices=sum(inputs * outputs for inputs, outputs in matrices),
        squares=sum(inputs**2 for inputs, _ in matrices),
        products=sum(inputs**2 * outputs for inputs, outputs in matrices),
    )


def matrices_of(model: nn.Module, gated: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map whose weights are gated and not those of the embedding, too, by name.

    Of a LoRA pair it is the first one that is gated by direction, by the inputs of the weights beside it.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found, wanted = {}, set(gated)
    for module_name, module in model.named_modules():
        is_second = ".lora_B." in f"{module_name}."
        if not is_second and (name := f"{module_name}.weight") in wanted and id(module.weight) not in embeddings:
            if isinstance(module, nn.Linear):
                found[name] = module.in_features, module.out_features
            elif isinstance(module, Conv1D):
                found[name] = module.weight.shape[0], module.weight.shape[1]
    return found


def budgets_of(config: Any, model: nn.Module) -> dict[str, float]:
    """The mean plasticity of what a configuration does not gate by entry, by name.

    Args:
        config: Of ``agcl fit``.
        model: Its model, with its adapter if it has one.
    """
    callback = attribution_options(config)
    if callback is None or not _gates_by_direction(config, callback):
        return {}
    gated = gated_sizes(model, callback.get("parameters", ""))
    free = {name: 1.0 for name in gated if is_of_pair(name)}  # the second of a pair; the first is a matrix
    return free | dict.fromkeys(matrices_of(model, gated), _directions(callback).plasticity)


def _directions(callback: Any) -> Directions:
    """The options of a gate by direction, those that are left out included; after an earlier run no text is written."""
    given = callback.get("directions", "auto")
    options = Directions() if given in ("auto", None) else Directions(**given)
    return replace(options, own_text=0) if callback.get("earlier") else options


def model_of(config: Any) -> Any:
    """The model of a run on the meta device: shapes alone; with the pairs of all tasks, if each gets its own.

    Args:
        config: Of ``agcl fit``.

    Raises:
        AgclError: If the configuration cannot be loaded, or no model built from it.
    """
    built, callback = weightless_model(config.model), attribution_options(config)
    if callback is not None and config.model.adapter is not None and _gates_by_direction(config, callback):
        names = list(gated_sizes(built, callback.get("parameters", "")))
        if unfit_pairs(built, names) is None:
            with torch.device("meta"):
                add_pairs(built, len(config.data.tasks))
    return built


def weightless_model(model: Any) -> Any:
    """The model of a configuration, adapter included, on the meta device: shapes alone.

    Args:
        model: The arguments of ``ContinualLM``.

    Raises:
        AgclError: If the configuration cannot be loaded, no model built from it, or its weights not be trained.
    """
    config = load_config(model.model_name_or_path, gguf_file=model.gguf_file, trust_remote_code=model.trust_remote_code)
    if model.adapter is None and model.gguf_file is None:
        check_not_quantised(model.model_name_or_path, config, model.quantization_config)
    try:
        with torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers and PEFT raise many types
        reason = one_line(error)
        raise AgclError(
            f"No model can be built from the configuration of `{model.model_name_or_path}`: {reason}"
        ) from error
    if model.adapter is not None:
        with torch.device("meta"):
            built = put_adapter_on(built, model.adapter)
    return built


def gated_sizes(model: nn.Module, pattern: str) -> dict[str, int]:
    """Name -> number of entries of the parameters that get importance."""
    named = model.named_parameters()
    return {name: p.numel() for name, p in named if p.requires_grad and re.search(pattern, name)}


def read_settings(config: Any, machine: Machine) -> Settings:
    """Precision, strategy, devices, optimizer and gate of a configuration.

    Args:
        config: Of ``agcl fit``.
        machine: On which ``precision`` is chosen where the configuration leaves it out.
    """
    trainer, callback = config.trainer, attribution_options(config)
    default: Precision = "32" if machine is MACHINES["cpu"] else "bf16-mixed"
    precision: Precision = (
        default if trainer.precision is None else _PRECISIONS.get(str(trainer.precision), "bf16-mixed")
    )
    settings = Settings(
        precision=precision,
        strategy="fsdp" if _is_sharded(config) else "ddp",
        devices=_num_devices(trainer.devices) * trainer.num_nodes,
        state_bytes=_state_bytes(config.model.optimizer, torch.bfloat16 if precision == "bf16" else torch.float32),
        gate=callback is not None,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    if callback is None:
        return settings
    each = callback.get("importance_bits", 8) // 8
    merged = each if callback.get("merge", "maximum") == "maximum" else 3 * each
    importance = callback.get("importance") or {}
    top_k = importance.get("top_k")
    return replace(
        settings,
        importance_bytes=merged + (each if callback.get("control", "none") == "shuffled" else 0),
        file_bytes=each,
        importance_on_host=callback.get("importance_on", "device") == "host",
        aggregation="mean" if top_k is None else importance.get("top_k_method", "blocks"),
        top_k=top_k or 1,
        directions_every=_directions(callback).every,
        own_text=_directions(callback).own_text,
        own_tokens=_directions(callback).own_tokens,
    )


def read_work(config: Any, devices: int) -> Work:
    """Tasks, steps and rows of a configuration, of whose data nothing is known but what it assumes."""
    data, accumulate = config.data, config.trainer.accumulate_grad_batches
    epochs = [getattr(task, "init_args", task).epochs for task in data.tasks]
    batches = math.ceil(math.ceil(config.rows / devices) / data.batch_size)
    return _work(
        config,
        steps=math.ceil(batches / accumulate) * sum(epochs),
        rows=min(data.batch_size, math.ceil(config.rows / devices)),
        tokens=config.tokens,
        answer_tokens=config.answer_tokens,
    )


def _read_work(cli: FitConfiguration) -> Work:
    """Tasks, steps and rows as the data module will serve them."""
    datamodule = cli.parser.instantiate(cli.config).data
    datamodule.setup()
    config, world = cli.config, _num_devices(cli.config.trainer.devices) * cli.config.trainer.num_nodes
    accumulate = config.trainer.accumulate_grad_batches
    lengths: list[int] = []
    answers: list[int] = []
    steps = 0
    for epoch in range(datamodule.tasks.total_epochs):
        rows = datamodule.rows_at(epoch)
        lengths += [len(ids) for ids in rows["input_ids"]]
        answers += [sum(label >= 0 for label in labels) for labels in rows["labels"]]
        steps += math.ceil(math.ceil(math.ceil(len(rows) / world) / config.data.batch_size) / accumulate)
    return _work(
        config,
        steps=steps,
        rows=min(config.data.batch_size, len(lengths)),
        tokens=sum(lengths) / len(lengths),
        longest=max(lengths),
        answer_tokens=max(answers),
    )


def _work(config: Any, **found: Any) -> Work:
    callback = attribution_options(config)
    given = {} if callback is None else callback
    regime: Regime = config.data.regime
    return Work(
        num_tasks=1 if regime == "joint" else len(config.data.tasks),
        micro_batches=config.trainer.accumulate_grad_batches,
        samples=given.get("num_samples", 32),
        attributed_rows=given.get("batch_size") or config.data.batch_size,
        **found,
    )


def attribution_options(config: Any) -> Any:
    """The arguments of the configuration's AttributionCallback, None if there is none."""
    for callback in all_callbacks(config):
        if issubclass(_class_of(callback.class_path), AttributionCallback):
            return callback.get("init_args") or {}
    return None


def _class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _is_sharded(config: Any) -> bool:
    strategy = config.trainer.strategy
    name = strategy if isinstance(strategy, str) else str(strategy.class_path)
    return re.search("ModelParallel|fsdp|deepspeed", name, re.I) is not None


def _num_devices(devices: Any) -> int:
    """Of one node; ``auto`` counts what is here."""
    if devices in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return len(devices.split(",")) if isinstance(devices, str) and "," in devices else int(devices)


def machine_of(config: Any) -> Machine:
    """The machine that a command's ``machine`` option names, or what is likely to be there."""
    if config.machine is not None:
        return MACHINES[config.machine]
    is_cpu = config.trainer.accelerator == "cpu" or (
        config.trainer.accelerator == "auto" and not torch.cuda.is_available()
    )
    return MACHINES["cpu" if is_cpu else "h100"]


def _state_bytes(optimizer: Any, dtype: torch.dtype) -> float:
    """Bytes of state per weight, counted after a step on a small matrix; AdamW's where the class is not named."""
    parameter = nn.Parameter(torch.ones(_PROBE_ENTRIES, _PROBE_ENTRIES, dtype=dtype))
    named: Any = {"class_path": "torch.optim.AdamW"} if optimizer is None else optimizer
    options = dict(named.get("init_args") or {})
    made: Any = _class_of(named["class_path"])([parameter], **options)

    def closure() -> torch.Tensor:
        made.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    made.step(closure)
    tensors = [value for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held = sum(value.numel() * value.element_size() for value in tensors if value.numel() > 1)
    return float(held) / parameter.numel()


# --------------------------------------------------------------------- printing


def _summary(size: ModelSize, settings: Settings, work: Work, machine: Machine, is_read: bool) -> str:
    speeds = "measured" if machine.is_measured else "assumed from its data sheet; nothing was measured on a GPU"
    source = "as read" if is_read else "assumed (--rows, --tokens, --answer_tokens; --read_data true reads them)"
    return (
        f"{size.weights:,} weights, {size.trained:,} trained, {size.gated:,} gated; {settings.precision}, "
        f"{settings.strategy} on {settings.devices} x {machine.name}; speeds {speeds}.\n"
        f"{work.num_tasks} tasks, {work.steps:,} steps of {work.micro_batches} x {work.rows} rows on each device; "
        f"{work.tokens:.0f} tokens a row, {source}."
    )


def _tables(found: Forecast, machine: Machine) -> list[Table]:
    memory = _table("Memory on each device", "GB")
    for label, part in (("", found.kept), ("training step: ", found.training), ("task boundary: ", found.boundary)):
        for name, size in part.items():
            memory.add_row(label + name, f"{size / 1e9:.2f}")
    limit = "" if machine.memory is None else f" of {machine.memory / 1e9:.0f}"
    memory.add_row("largest at once", f"{found.peak_bytes / 1e9:.2f}{limit}")
    for name, size in found.host.items():
        memory.add_row(f"host memory: {name}", f"{size / 1e9:.2f}")
    for name, size in found.files.items():
        memory.add_row(f"on disk: {name}", f"{size / 1e9:.2f}")
    seconds = _table("Time, without scoring", "seconds")
    for name, value in found.seconds.items():
        seconds.add_row(name, f"{value:,.0f}")
    seconds.add_row("all", f"{found.total_seconds:,.0f}")
    return [memory, seconds]


def _table(title: str, unit: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column(unit, justify="right")
    return table
