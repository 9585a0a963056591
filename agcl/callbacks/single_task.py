"""A model that learns one task alone, for importance in which the other tasks have no part."""

import gc
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from agcl.attribution.fingerprints import fingerprint
from agcl.callbacks.gathering import Gathered, Gatherer
from agcl.data.samples import resolve_seed
from agcl.errors import AgclError


@dataclass(frozen=True)
class InitialModel:
    """What it takes to build the run's model again as it was before any task.

    Pretrained weights are read from where they came from. An adapter's are partly random and in no file.

    Attributes:
        fingerprint: Of all weights (see :mod:`agcl.attribution.fingerprints`).
        adapter: Name to weights of the adapter, on the CPU; empty without one.
    """

    fingerprint: str
    adapter: dict[str, Tensor]

    @classmethod
    def of(cls, pl_module: Any) -> "InitialModel":
        """Note the weights of a ``ContinualLM`` that has learned nothing yet."""
        named = list(pl_module.model.named_parameters())
        adapter = named if pl_module.adapter is not None else []
        weights = {name: p.detach().to("cpu", copy=True) for name, p in adapter if p.requires_grad}
        return cls(fingerprint(named), weights)

    @torch.no_grad()
    def restore(self, pl_module: Any) -> None:
        """Give another, untrained ``ContinualLM`` these weights.

        Raises:
            AgclError: If its pretrained weights are not those that the run began with.
        """
        named = dict(pl_module.model.named_parameters())
        for name, weights in self.adapter.items():
            named[name].copy_(weights)
        if fingerprint(named.items()) != self.fingerprint:
            raise AgclError(
                f"`{pl_module.model_name_or_path}` no longer gives the weights that this run began with, from which "
                "`source: single_task` trains a model for each task; restore its files."
            )


class _AtTaskEnd(Callback):
    """Begins the single task's run from the initial model, and gathers the importance at its end."""

    def __init__(self, gatherer: Gatherer, initial: InitialModel) -> None:
        self.found: Gathered | None = None
        self._gatherer = gatherer
        self._initial = initial

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._initial.restore(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._gatherer.begin_task(pl_module.model)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.ends_task:
            self.found = self._gatherer.gather(trainer, pl_module, 0)


def check_single_task(trainer: Trainer) -> None:
    """Refuse, before anything is trained, what a model of a task's own cannot be trained under.

    Raises:
        AgclError: If the run has more than one process.
    """
    if trainer.world_size > 1:
        raise AgclError(
            f"`source: single_task` trains a model for each task in one process, but this run has "
            f"{trainer.world_size}; set the Trainer's `devices` and `num_nodes` to 1, or take `source: running`."
        )


def gather_from_single_task(
    trainer: Trainer, pl_module: Any, task_index: int, gatherer: Gatherer, initial: InitialModel
) -> Gathered | None:
    """Train a new model on one task alone and take the task's importance from it.

    It is trained as the sequence would train the task if it stood alone: from the initial model, with the same
    optimizer, schedule, batches, epochs, precision, accumulation and clipping, from the run's seed, on the same device.
    Nothing is scored or logged on the way. Meanwhile, memory holds a second model with gradients and optimizer. The
    run's own model and random state are left as they are, and nothing of the other model is kept.

    Returns:
        As :meth:`Gatherer.gather`, which describes the model trained here.
    """
    own_gatherer = replace(gatherer, estimator=deepcopy(gatherer.estimator))
    with isolate_rng(), _quiet():
        # The seed that Lightning's seed_everything was last called with, if it was.
        own_seed = resolve_seed(gatherer.seed, trainer.datamodule)  # type: ignore[attr-defined]
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", own_seed)))
        found = _train_alone(trainer, pl_module, task_index, own_gatherer, initial)
    gc.collect()  # module, data, callback and Trainer refer to each other, but nothing here to any of them
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _train_alone(
    trainer: Trainer, pl_module: Any, task_index: int, gatherer: Gatherer, initial: InitialModel
) -> Gathered | None:
    at_end = _AtTaskEnd(gatherer, initial)
    data = trainer.datamodule.single_task(task_index)  # type: ignore[attr-defined]
    _trainer_like(trainer, pl_module.device, data, at_end).fit(_untrained(pl_module), datamodule=data)
    return at_end.found


def _untrained(pl_module: Any) -> Any:
    """A new module made with the same arguments, which it keeps under their names."""
    arguments = inspect.signature(type(pl_module)).parameters
    return type(pl_module)(**{name: getattr(pl_module, name) for name in arguments})


def _trainer_like(trainer: Trainer, device: torch.device, data: Any, callback: Callback) -> Trainer:
    return Trainer(
        **data.trainer_arguments(),
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=trainer.precision,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        limit_train_batches=trainer.limit_train_batches,
        fast_dev_run=trainer.fast_dev_run,  # type: ignore[attr-defined]
        default_root_dir=trainer.default_root_dir,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a second run's announcements to itself, and of its warnings the one that nothing is scored."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            yield
    finally:
        logger.setLevel(level)
