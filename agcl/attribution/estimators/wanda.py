"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): weight times the length of its input, forward passes only."""

import itertools

import torch
from torch import Tensor

from agcl.attribution.estimators.interface import Estimator, Evidence
from agcl.attribution.lrp import evaluation_mode
from agcl.attribution.passes import Sample, answer_logits, innermost, is_correct, make_stand_ins
from agcl.attribution.uses import ParameterUses, UnseenUseError, Use
from agcl.errors import UnsupportedModelError


class Wanda(Estimator):
    """``|W| * ||x||``, the norm over all tokens of the samples.

    Extended to what Wanda leaves out: an embedding is a linear map of one-hot vectors, the weight of a normalisation
    multiplies the normalised input, a bias meets 1. The squares of a parameter's several uses (tied embeddings) add up.
    """

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        selected = evidence.selected()
        squares: dict[str, Tensor] = {}
        samples = iter(evidence.samples)
        while evidence.num_used < evidence.num_samples and (batch := list(itertools.islice(samples, 1))):
            found = self._input_squares(evidence, batch[0])
            if found is None:
                continue
            evidence.num_used += 1
            evidence.on_progress(1)
            for name, parts in found.items():
                for part in parts:
                    squares[name] = squares[name] + part if name in squares else part
        return {
            name: (squares[name].sqrt() * parameter.detach().abs().float()).contiguous()
            for name, parameter in selected.items()
            if name in squares
        }

    @torch.no_grad()
    def _input_squares(self, evidence: Evidence, sample: Sample) -> dict[str, list[Tensor]] | None:
        found: dict[str, list[Tensor]] = {}
        selected = evidence.selected()
        stand_ins = make_stand_ins(evidence.model, selected)

        def on_use(name: str, use: Use, output: Tensor) -> None:
            found.setdefault(name, []).append(use.input_squares(selected[name]))

        uses = ParameterUses({name: stand_ins[name] for name in selected}, 1, len(sample.input_ids), on_use)
        try:
            with evaluation_mode(evidence.model), innermost(evidence.model, uses):
                (logits,) = answer_logits(evidence.model, stand_ins, [sample])
        except UnseenUseError as error:
            raise UnsupportedModelError(
                f"Wanda cannot see what a parameter of `{type(evidence.model).__name__}` multiplies ({error}); "
                "choose another estimator, or leave such parameters out with `parameters`."
            ) from error
        return found if is_correct(logits, sample.targets) else None
