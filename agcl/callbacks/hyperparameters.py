"""What a run was made with, as one flat row, so that runs stand side by side in a logger's table."""

import inspect
import os
from dataclasses import is_dataclass
from typing import Any

from lightning.pytorch import Trainer

from agcl.callbacks.attribution import AttributionCallback

Value = bool | int | float | str


def run_hyperparameters(trainer: Trainer, pl_module: Any) -> dict[str, Value]:
    """The run's hyper-parameters: the same keys for every run, whatever its method.

    TensorBoard takes the columns of its table from one run alone. So what only some methods have is text in
    ``method_settings``; only ``strength`` (0: no gate) and ``replay_share`` (0: no replay) are numbers of their own.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    optimizer: Any = trainer.optimizers[0]
    methods = [callback for callback in trainer.callbacks if hasattr(callback, "extra_bytes")]  # type: ignore[attr-defined]
    gate = next((callback for callback in methods if isinstance(callback, AttributionCallback)), None)
    seed = seed_given()
    return {
        "method": " + ".join(type(method).__name__ for method in methods) or "fine-tuning",
        "method_settings": ", ".join(_settings(method) for method in methods) or "none",
        "strength": 0.0 if gate is None else float(gate.strength),
        "estimator": "none" if gate is None else type(gate.estimator).__name__,
        "regime": data.tasks.regime,
        "replay_share": 0.0 if data.replay is None else float(data.replay.share),
        "model": str(pl_module.model_name_or_path),
        "adapter": "none" if pl_module.adapter is None else str(pl_module.adapter.get("peft_type", "unnamed")),
        "optimizer": type(optimizer).__name__,
        "learning_rate": float(optimizer.defaults["lr"]),
        "weight_decay": float(optimizer.defaults.get("weight_decay", 0.0)),
        "batch_size": data.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "num_devices": trainer.world_size,
        "precision": str(trainer.precision),
        "tasks": ", ".join(task.name for task in data.tasks),
        "num_tasks": len(data.tasks),
        "total_epochs": data.tasks.total_epochs,
        "seed": data.seed if seed is None else seed,
    }


def seed_given() -> int | None:
    """What Lightning's ``seed_everything`` was last given, from the variable in which it keeps it."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def _settings(method: Any) -> str:
    """The method's arguments, as far as it keeps them under their names, plain values or options with such."""
    kept = {name: getattr(method, name, None) for name in inspect.signature(type(method)).parameters}
    kept = {name: f"({_settings(value)})" if is_dataclass(value) else value for name, value in kept.items()}
    return " ".join(f"{name}={value}" for name, value in kept.items() if isinstance(value, Value))
