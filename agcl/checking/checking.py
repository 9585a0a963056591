"""All that can be known of a run before it: its rows, size, time and plasticity, and what stands in its way."""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from agcl import planning
from agcl.attribution.artefact import ImportanceFile
from agcl.callbacks import AttributionCallback
from agcl.checking.configuration import LenientConfiguration, build
from agcl.checking.earlier import Earlier, find_earlier, plasticity_left
from agcl.checking.rows import SplitCheck, check_splits, notes_on
from agcl.checking.trial import try_estimator
from agcl.configurations import all_callbacks
from agcl.data.datamodule import ContinualDataModule
from agcl.data.sequence import order_problems
from agcl.data.tasks import Task
from agcl.errors import AgclError, one_line
from agcl.files import check_writable
from agcl.forecast import Forecast, Machine, ModelSize, Settings, Work, forecast
from agcl.models import adapter_config
from agcl.module import ContinualLM
from agcl.resuming import run_folders

DESCRIPTION = "Show what `agcl fit` with this configuration would see and need, and every problem; nothing is trained."


@dataclass(frozen=True)
class CheckOptions:
    """What `agcl check` takes beside the options of `agcl fit`.

    Args:
        rows: Rows of each task to show.
        importance: Importance files of tasks learned earlier; left out, those of the checkpoint to resume from, or
            of the newest run in the logger's folder.
        machine: What to forecast for; left out, cpu where the Trainer's accelerator is, or no GPU is found, else h100.
    """

    rows: int = 3
    importance: list[str] | None = None
    machine: Literal["cpu", "a100", "h100"] | None = None


@dataclass
class TaskCheck:
    """What there is to say of one task.

    Attributes:
        task: The task.
        splits: Its training split, then what it is scored on.
        notes: What is allowed, but seldom meant.
        steps: Optimizer steps.
        forecast: Of this task alone; None where rows or model could not be read.
        earlier: Names of the tasks before it whose importance was found.
        plasticity: Layer -> mean plasticity left by them, and number of gated weights.
    """

    task: Task
    splits: list[SplitCheck]
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    forecast: Forecast | None = None
    earlier: list[str] = field(default_factory=list)
    plasticity: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass
class Check:
    """What there is to say of a configuration.

    Attributes:
        problems: A sentence on everything that would stop the run.
        notes: What is allowed, but seldom meant, and what could not be looked at.
        tasks: Of each task, in the order of learning.
        model: Name of the model.
        size: Its size, if it could be built.
        settings: How the run is set up.
        machine: What the forecast is for.
        max_length: Longest row in tokens.
        origin: Where the importance of earlier tasks was found; None where there is no gate.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tasks: list[TaskCheck] = field(default_factory=list)
    model: str = ""
    size: ModelSize | None = None
    settings: Settings | None = None
    machine: Machine | None = None
    max_length: int | None = None
    origin: str | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take down an error in place of stopping at it."""
        try:
            yield
        except AgclError as error:
            self.add(error.problems)

    def add(self, problems: Iterable[str]) -> None:
        """Take down what is new of some problems."""
        self.problems = list(dict.fromkeys([*self.problems, *problems]))


def check(cli: LenientConfiguration) -> Check:
    """Look at everything but the weights."""
    found = Check(problems=list(cli.problems))
    if not cli.is_usable:
        found.notes.append("Because of that, nothing else could be looked at.")
        return found
    config = cli.config
    found.model = config.model.model_name_or_path
    data = _datamodule(found, config)
    callbacks = _callbacks(found, config)
    _trainer(found, config, data)
    optimizer = _optimizer(found, config)
    model = _weightless(found, config)
    if data is not None:
        _rows(found, config, data, model)
    if model is not None:
        _forecast(found, config, model)
        _plasticity(found, config, model)
    for callback in callbacks:
        if isinstance(callback, AttributionCallback):
            _attribution(found, config, callback, optimizer)
    return found


# ------------------------------------------------------------------------ parts


def _datamodule(found: Check, config: Any) -> ContinualDataModule | None:
    """The data module of the tasks that are in order, with its tokenizer if that can be loaded."""
    usable = []
    for options in config.data.tasks:
        with found.collecting():
            build(Task, options)
            usable.append(options)
    values = {**config.data.as_dict(), "tasks": [options.as_dict() for options in usable]}
    if not usable:
        return None
    if len(usable) < len(config.data.tasks) and config.data.order is not None:
        names = [getattr(options, "init_args", options).name for options in config.data.tasks]
        found.add(order_problems(names, config.data.order))
        values["order"] = None  # it names the others too
    data = None
    with found.collecting():
        data = build(ContinualDataModule, values)
    if data is None:  # its tasks may be looked at all the same
        try:
            has_chats = any(task.get("init_args", task).get("messages") for task in values["tasks"])
            values |= {"order": None, "replay": None, "evaluate_on": "test", "truncation": "error"}
            values["chat_template"] = values["chat_template"] or has_chats
            data = build(ContinualDataModule, values)
        except AgclError:
            return None
    with found.collecting():
        try:
            data.load_encoder()
        except AgclError:
            if data.max_length is not None:
                data.max_length = None
                data.load_encoder()
            raise
    return data


def _callbacks(found: Check, config: Any) -> list[Any]:
    built = []
    for options in all_callbacks(config):
        with found.collecting():
            built.append(build(Callback, options))
    return built


def _trainer(found: Check, config: Any, data: ContinualDataModule | None) -> None:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)  # what hardware is there is not the question
    try:
        with found.collecting():
            values = {**config.trainer.as_dict(), "callbacks": None, "logger": False}
            if data is not None and len(data.tasks) < len(config.data.tasks):
                values["max_epochs"] = data.tasks.total_epochs  # it counts the others' too
            trainer = build(Trainer, values)
            if data is not None:
                data.check_trainer(trainer)
        with found.collecting():
            check_writable(run_folders(config.trainer)[0] / "version")
    finally:
        log.setLevel(level)


def _optimizer(found: Check, config: Any) -> torch.optim.Optimizer | None:
    """The optimizer, of a stand-in parameter."""
    if config.model.adapter is not None:
        with found.collecting():
            adapter_config(config.model.adapter)
    with found.collecting():
        module = build(ContinualLM, config.model)
        try:
            optimizer = module.optimizer([nn.Parameter(torch.zeros(2, 2))])
            module.lr_scheduler(optimizer)
        except Exception as error:  # each class checks its own arguments
            raise AgclError(f"Optimizer or schedule refuse their arguments: {one_line(error, None)}") from error
        return optimizer
    return None


def _weightless(found: Check, config: Any) -> Any:
    """The model on the meta device; None if it cannot be built."""
    with found.collecting():
        model = planning.model_of(config)
        folder = Path(found.model)
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else [folder]
        if not weights and config.model.gguf_file is None:
            found.problems.append(f"`{found.model}` holds no weights (*.safetensors, *.bin).")
        return model
    return None


def _rows(found: Check, config: Any, data: ContinualDataModule, model: Any) -> None:
    encoder = getattr(data, "encoder", None)
    found.max_length = None if encoder is None else encoder.max_length
    for task in data.tasks:
        splits = check_splits(task, encoder, data.evaluate_on, config.rows)
        found.add(problem for split in splits for problem in split.problems)
        found.tasks.append(TaskCheck(task, splits, list(notes_on(task, splits, data.chat_template))))
    largest = max((split.largest_id for each in found.tasks for split in each.splits), default=-1)
    if model is not None and largest >= model.get_input_embeddings().num_embeddings:
        found.problems.append(
            f"The tokenizer gives token {largest}, but `{found.model}` has embeddings for "
            f"{model.get_input_embeddings().num_embeddings} tokens: they do not belong together."
        )


def _forecast(found: Check, config: Any, model: Any) -> None:
    options = planning.attribution_options(config)
    found.machine = planning.machine_of(config)
    found.settings = planning.read_settings(config, found.machine)
    found.size = planning.model_size(config, model)
    accumulate, batch_size = config.trainer.accumulate_grad_batches, config.data.batch_size
    for number, each in enumerate(found.tasks):
        lengths = each.splits[0].lengths
        if not lengths:
            continue
        num_rows = len(lengths) * (1 + (config.data.replay.share if config.data.replay and number else 0))
        batches = math.ceil(math.ceil(num_rows / found.settings.devices) / batch_size)
        each.steps = each.task.epochs * math.ceil(batches / accumulate)
        work = Work(
            num_tasks=1,
            steps=each.steps,
            micro_batches=min(accumulate, batches),
            rows=min(batch_size, len(lengths)),
            tokens=sum(lengths) / len(lengths),
            longest=max(lengths),
            answer_tokens=max(each.splits[0].answer_lengths),
            samples=(options or {}).get("num_samples", 32),
            attributed_rows=(options or {}).get("batch_size") or batch_size,
        )
        settings = replace(found.settings, own_text=0) if number else found.settings  # written before the first alone
        each.forecast = forecast(found.size, settings, work, found.machine)


def _plasticity(found: Check, config: Any, model: Any) -> None:
    options = planning.attribution_options(config)
    if options is None:
        return
    with found.collecting():
        earlier = find_earlier(config)
        found.origin = earlier.origin
        try:
            _leave_plasticity(found, earlier, config, model)
        except AgclError as error:
            if earlier.is_named:
                raise
            found.notes.append(f"{earlier.origin} was of another model: {error}")


def _leave_plasticity(found: Check, earlier: Earlier, config: Any, model: Any) -> None:
    options, budgets = planning.attribution_options(config), planning.budgets_of(config, model)
    before: list[ImportanceFile] = list(earlier.files.values()) if earlier.precede else []
    for each in found.tasks:
        if before:
            each.plasticity = plasticity_left(before, options, model.named_parameters(), budgets)
            each.earlier = [file.metadata["task"] for file in before]
        if each.task.name in earlier.files and not earlier.precede:
            before.append(earlier.files[each.task.name])
    unknown = [name for name in earlier.files if name not in {each.task.name for each in found.tasks}]
    if unknown and not earlier.precede:
        found.notes.append(f"Importance of {', '.join(unknown)} ({earlier.origin}) is of no task here.")


def _attribution(found: Check, config: Any, callback: AttributionCallback, optimizer: Any) -> None:
    with found.collecting():
        callback.check_regime(config.data.regime)
        callback.check_adapter(config.model.adapter)
    if optimizer is not None and (warning := callback.gate_warning(optimizer)):
        found.notes.append(warning)
    row = next((each.splits[0].sample for each in found.tasks if each.splits[0].sample), None)
    if found.size is not None and row is not None:
        with found.collecting():
            found.notes += try_estimator(config.model, callback, found.size, row)
