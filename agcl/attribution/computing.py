"""Importance of what a model has learned, from its training rows, for any PyTorch training loop."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import AgclError
from ..results import shown_name
from .artefact import save_importance
from .directions import InputMoments, MomentSums, find_matrices, input_moments, is_of_pair
from .estimators import LRP, Estimator, Evidence, PerSampleGradient
from .fingerprints import fingerprint
from .importance import ImportanceConfig, normalise
from .levels import DTYPES, Bits
from .naming import check_pattern, matching_parameters
from .passes import Sample
from .rows import samples_of

_NO_ANSWER = "No row for attribution has a label other than -100 (if there are rows at all), so none has an answer."
_NOT_LEARNED = (
    "No row is answered correctly, token by token, so there is nothing to protect: train longer, give the rows that "
    "were learned, or set `only_correct` to False for plain text."
)


def compute_importance(
    model: nn.Module,
    rows: Iterable[Any],
    *,
    num_samples: int = 16,
    batch_size: int = 1,
    estimator: Estimator | None = None,
    config: ImportanceConfig = ImportanceConfig(),  # noqa: B008 (immutable)
    only_correct: bool = True,
    parameters: str = "",
    bits: Bits = 8,
    seed: int = 0,
    save_to: str | Path | None = None,
    task: str | None = None,
) -> dict[str, Tensor]:
    """Importance of each weight for a task that the model has learned (arXiv 2605.05285, Eqs. 10-12).

    Runs the model in evaluation mode; its weights, gradients and mode are left as they are. Where several processes
    train copies of a model, give all of them the same rows, since all must gate alike.

    Args:
        model: A causal language model, of transformers or PEFT.
        rows: The task's training rows, or batches of them, with ``input_ids`` and ``labels``, as `samples_of` takes
            them: a data set, a ``DataLoader``, a list. Read in their order until enough are used, so shuffle what is
            sorted.
        num_samples: Rows to use.
        batch_size: Rows that are run together, however they come.
        estimator: What scores the weights; ``LRP()``, the paper's, if left out.
        config: How scores over samples become importance.
        only_correct: Leave out rows of which the model does not predict every answer token. Set it to False for plain
            text, of which no model knows every token.
        parameters: Regular expression; only parameters that require a gradient and whose name it is found in are
            scored.
        bits: 8 for uint8, ``importance = value / 255``; 16 for uint16, ``value / 65535``.
        seed: For estimators that draw random numbers.
        save_to: Write the importance to this ``.safetensors`` file, too.
        task: The task's name, for the file.

    Returns:
        Parameter name to uint8 or uint16 tensor of its shape, on its device.

    Raises:
        AgclError: For options or rows that cannot be used, and if no row is answered correctly.
        UnsupportedModelError: If the estimator cannot see into the model.
    """
    check_options(num_samples, batch_size, bits, parameters)
    estimator = LRP() if estimator is None else estimator
    names = matching_parameters(model, parameters)
    evidence = Evidence(
        model,
        names,
        _read(model, rows)[1] if estimator.uses_samples else (),
        num_samples,
        batch_size=batch_size,
        config=config,
        seed=seed,
        only_correct=only_correct,
    )
    scores = estimator.scores(evidence)
    if not scores:
        raise AgclError(_NOT_LEARNED)
    importance = normalise(scores, config, bits)
    if save_to is not None:
        settings = importance_metadata(model, task or Path(save_to).stem, evidence.num_used, estimator, config)
        save_importance(save_to, importance, {**settings, "source": "running"})
    return importance


def compute_input_moments(
    model: nn.Module,
    rows: Iterable[Any],
    *,
    num_samples: int = 16,
    batch_size: int = 1,
    estimator: PerSampleGradient | None = None,
    only_correct: bool = True,
    parameters: str = "",
) -> InputMoments:
    """What a task that the model has learned asks of the directions of each weight matrix's inputs.

    For :class:`agcl.gating.DirectionalGate`, by way of :meth:`InputMoments.maps`; those of several tasks are added.

    Args:
        model: See `compute_importance`.
        rows: See `compute_importance`.
        num_samples: Rows to use.
        batch_size: Rows that are run together.
        estimator: Whose objective's gradient weights the inputs; ``LRP()`` if left out.
        only_correct: See `compute_importance`.
        parameters: Regular expression; only matrices whose name it is found in are looked at.

    Returns:
        The moments of all parameters that are weight matrices of linear maps; embeddings and what is tied to them are
        not among them. Where LoRA pairs are trained, of the weights that they are beside, by the names that these have
        in the model without an adapter (:func:`agcl.maps_for_adapter`).

    Raises:
        AgclError: For options or rows that cannot be used, and if no row is answered correctly.
        UnsupportedModelError: If the estimator cannot see into the model.
    """
    check_options(num_samples, batch_size, 8, parameters)
    estimator = LRP() if estimator is None else estimator
    names = matching_parameters(model, parameters)
    first, samples = _read(model, rows)
    sums = _fresh_sums(model, names, first, estimator)
    evidence = Evidence(model, names, samples, num_samples, batch_size=batch_size, only_correct=only_correct)
    moments = input_moments(evidence, estimator, sums)
    if not evidence.num_used:
        raise AgclError(_NOT_LEARNED)
    return moments.by_base_name()


def _read(model: nn.Module, rows: Iterable[Any]) -> tuple[Sample, Iterator[Sample]]:
    """The first sample, and all of them, of which no more rows are read than are needed."""
    samples = samples_of(rows, next(model.parameters()).device)
    first = next(samples, None)
    if first is None:
        raise AgclError(_NO_ANSWER)
    return first, itertools.chain([first], samples)


def _fresh_sums(model: nn.Module, names: list[str], sample: Sample, estimator: PerSampleGradient) -> MomentSums:
    pairs: dict[str, str] = {}
    if any(map(is_of_pair, names)):
        from ..task_pairs import pairs_of  # PEFT takes a while to import

        pairs = pairs_of(model, names)
    matrices = find_matrices(model, names, sample, estimator.rule, pairs)
    if not matrices:
        raise AgclError(
            "None of the selected parameters is known to be a weight matrix of a linear map, or the first of a LoRA "
            "pair beside one, so there are no directions of its inputs; gate by importance instead."
        )
    return MomentSums(matrices, pairs)


def check_computable(
    model: nn.Module,
    rows: Iterable[Any],
    *,
    estimator: Estimator | None = None,
    parameters: str = "",
    by_direction: bool = False,
) -> None:
    """Check before training that `compute_importance` will be able to use the rows and see into the model.

    Args:
        model: See `compute_importance`.
        rows: Of which the first one with an answer is run, whether it is answered correctly or not.
        estimator: See `compute_importance`.
        parameters: See `compute_importance`.
        by_direction: Whether it is `compute_input_moments` that is to be called, with a `PerSampleGradient`.

    Raises:
        AgclError: See `compute_importance`; also if no row has an answer, or there is no weight matrix.
        UnsupportedModelError: See `compute_importance`.
    """
    names = matching_parameters(model, parameters)
    first, _ = _read(model, rows)
    estimator = LRP() if estimator is None else estimator
    estimator.check(model, names, first)
    if by_direction:
        _fresh_sums(model, names, first, cast(PerSampleGradient, estimator))


def importance_metadata(
    model: nn.Module, task: str, num_samples: int, estimator: Estimator, config: ImportanceConfig
) -> dict[str, Any]:
    """What an importance file says of where it comes from."""
    return {
        "task": task,
        "model": name_of(model),
        "fingerprint": fingerprint(model.named_parameters()),
        "num_samples": num_samples,
        **estimator.describe(),
        **vars(config),
    }


def name_of(model: nn.Module) -> str:
    """What a model is called in files: its name or the last part of its path, else its class."""
    return shown_name(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)


def check_options(num_samples: int, batch_size: int, bits: int, parameters: str) -> None:
    """Raise if an option of `compute_importance` cannot be used.

    Raises:
        AgclError: Naming the option and what is allowed.
    """
    for option, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise AgclError(f"`{option}` is {value}; choose 1 or more.")
    if bits not in DTYPES:
        raise AgclError(f"`bits` is {bits}; choose 8 or 16.")
    check_pattern(parameters)
