"""Trying attribution on one layer of a model's architecture, with random weights."""

from collections.abc import Mapping
from typing import Any

import torch

from agcl.attribution.rows import samples_of
from agcl.callbacks import AttributionCallback
from agcl.commands.check_model import random_model
from agcl.errors import AgclError, one_line
from agcl.forecast import ModelSize
from agcl.models import put_adapter_on

_MAX_WEIGHTS = 3 * 10**8  # that are made for the trial


def try_estimator(model: Any, callback: AttributionCallback, size: ModelSize, row: Mapping[str, Any]) -> list[str]:
    """Let the callback check a model of one layer, as it checks the whole one before training.

    Args:
        model: The arguments of ``ContinualLM``.
        callback: With the estimator.
        size: Of the whole model.
        row: An encoded row.

    Returns:
        Why it was not tried, if it was not.

    Raises:
        AgclError: If the callback refuses the model.
    """
    if 2 * size.vocabulary * size.width + size.weights // size.layers > _MAX_WEIGHTS:
        return [
            f"Whether attribution sees into the model was not tried: `agcl check-model {model.model_name_or_path}`."
        ]
    options = {"gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code}
    try:
        small = random_model(model.model_name_or_path, torch.float32, 1, options)
        if model.attn_implementation is not None:
            small.set_attn_implementation(model.attn_implementation)
        if model.adapter is not None:
            with torch.random.fork_rng(devices=[]):
                small = put_adapter_on(small, model.adapter)
    except Exception as error:  # not every architecture can do with one layer, nor every adapter
        reason = one_line(error, 200)
        return [f"Whether attribution sees into the model could not be tried on one layer of it ({reason})."]
    try:
        callback.check_model(small, next(samples_of([row], torch.device("cpu"))))
    except AgclError:
        raise
    except Exception as error:
        raise AgclError(f"Attribution fails on one layer of the model: {one_line(error)}") from error
    return []
