"""What an estimator looks at at a task boundary: which parameters, and which rows of the task."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from agcl.attribution.estimators import Evidence
from agcl.attribution.naming import matching_parameters
from agcl.attribution.rows import samples_of
from agcl.data.samples import resolve_seed, training_samples


def task_evidence(
    trainer: Trainer,
    pl_module: Any,
    task_index: int,
    parameters: str,
    num_samples: int,
    *,
    seed: int | None,
    batch_size: int | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Evidence:
    """A task's rows, and the parameters that are to be scored on them.

    Args:
        trainer: The trainer, with a ``ContinualDataModule``.
        pl_module: The ``ContinualLM``.
        task_index: 0-based, in the trainer's data module.
        parameters: Regular expression; the trainable parameters whose name it is found in are to be scored.
        num_samples: Rows, at most.
        seed: Choice of the rows, and of what the estimator draws; the data module's if None.
        batch_size: Rows that are run together; as many as in training if None.
        rows: Encoded rows to use, in this order; the task's training rows in a random one if None.
        **options: The rest of :class:`Evidence`, such as ``only_correct``, ``per_sample``, ``config``.

    Raises:
        AgclError: If the expression is none, or matches no trainable parameter.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if rows is None:
        samples = training_samples(datamodule, task_index, seed=seed, device=pl_module.device)
    else:
        samples = samples_of(rows, pl_module.device)
    return Evidence(
        pl_module.model,
        matching_parameters(pl_module.model, parameters),
        samples,
        num_samples,
        batch_size=batch_size or datamodule.batch_size,
        seed=resolve_seed(seed, datamodule),
        **options,
    )
