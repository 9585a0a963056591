"""What an estimator looks at at a task boundary, for methods that score weights."""

import re
from typing import Any

from lightning.pytorch import Trainer

from agcl.attribution.estimators import Evidence
from agcl.data.samples import resolve_seed, training_samples
from agcl.errors import AgclError


def task_evidence(
    trainer: Trainer, pl_module: Any, task_index: int, parameters: str, num_samples: int, seed: int | None
) -> Evidence:
    """A task's training rows, all of them alike whether answered correctly or not, run in batches as in training.

    Args:
        trainer: The trainer, with a ``ContinualDataModule``.
        pl_module: The ``ContinualLM``.
        task_index: 0-based.
        parameters: Regular expression; the trainable parameters whose name it is found in are to be scored.
        num_samples: Rows, at most.
        seed: Choice of the rows, and of what the estimator draws; the data module's if None.

    Raises:
        AgclError: If the expression is none, or matches no trainable parameter.
    """
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise AgclError(f"`parameters` is not a regular expression: {parameters!r} ({error}).") from error
    named = pl_module.model.named_parameters()
    names = [name for name, p in named if p.requires_grad and pattern.search(name)]
    if not names:
        raise AgclError(f"`parameters` {parameters!r} matches no trainable parameter of the model.")
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    samples = training_samples(datamodule, task_index, seed=seed, device=pl_module.device)
    return Evidence(
        pl_module.model,
        names,
        samples,
        num_samples,
        batch_size=datamodule.batch_size,
        seed=resolve_seed(seed, datamodule),
        only_correct=False,
    )
