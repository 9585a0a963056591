"""Scores that look at no data: rivals that cost nothing, and a control."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agcl.attribution.estimators.interface import Estimator, Evidence
from agcl.attribution.passes import selected_parameters
from agcl.errors import AgclError
from agcl.ranks import Ranks
from agcl.shards import is_sharded, local_part


class Magnitude(Estimator):
    """``|W|``."""

    uses_samples = False
    scores_shards = True

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        return {name: local_part(parameter.detach()).float().abs() for name, parameter in evidence.selected().items()}


class Change(Estimator):
    """``|W - W_start|``, how far the weight moved while the task was learned; keeps a copy of the weights."""

    uses_samples = False

    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, parameters: Sequence[str]) -> None:
        """Copy the weights."""
        self._start = {name: p.detach().clone() for name, p in selected_parameters(model, parameters).items()}

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        if missing := evidence.selected().keys() - self._start.keys():
            raise AgclError(f"Change does not know where {min(missing)!r} started; call begin_task() before training.")
        return {
            name: (parameter.detach().float() - self._start[name].to(parameter.device).float()).abs_()
            for name, parameter in evidence.selected().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The weights at the beginning of the task."""
        return {"start": dict(self._start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`Estimator.load_state_dict`."""
        self._start = dict(state_dict["start"])


class Random(Estimator):
    """Uniform random scores, the same for one seed and name."""

    uses_samples = False
    scores_shards = True

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        scores = {}
        for name, parameter in evidence.selected().items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{evidence.seed}/{name}".encode()))
            whole = torch.rand(parameter.shape, generator=generator)
            scores[name] = (Ranks.of_this_run().part(whole) if is_sharded(parameter) else whole).to(parameter.device)
        return scores
