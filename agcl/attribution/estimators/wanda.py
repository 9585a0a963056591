"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): weight times the length of its input, forward passes only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agcl.attribution.estimators.interface import Estimator, Evidence
from agcl.attribution.lrp import evaluation_mode
from agcl.attribution.passes import (
    Sample,
    answer_logits,
    innermost,
    is_correct,
    make_stand_ins,
    selected_parameters,
)
from agcl.attribution.uses import ParameterUses, UnseenUseError, Use
from agcl.errors import UnsupportedModelError


class Wanda(Estimator):
    """``|W| * ||x||``, the norm over all tokens of the samples.

    Extended to what Wanda leaves out: an embedding is a linear map of one-hot vectors, the weight of a normalisation
    multiplies the normalised input, a bias meets 1, an expert the tokens that are sent to it. The
    squares of a parameter's several uses (tied embeddings) add up.
    """

    def check(self, model: nn.Module, parameters: Sequence[str], sample: Sample) -> None:
        """See :meth:`Estimator.check`."""
        _input_squares(model, selected_parameters(model, parameters), sample, only_correct=False)

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        selected = evidence.selected()
        squares: dict[str, Tensor] = {}
        for sample in evidence.samples:
            found = _input_squares(evidence.model, selected, sample, only_correct=evidence.only_correct)
            if found is not None:
                for name, part in found.items():
                    squares[name] = squares[name] + part if name in squares else part
                evidence.num_used += 1
                evidence.on_progress(1)
            if evidence.num_used == evidence.num_samples:
                break
        return {
            name: (squares[name].sqrt() * parameter.detach().abs().float()).contiguous()
            for name, parameter in selected.items()
            if name in squares
        }


@torch.no_grad()
def _input_squares(
    model: nn.Module, selected: dict[str, nn.Parameter], sample: Sample, *, only_correct: bool
) -> dict[str, Tensor] | None:
    """What each parameter met, uses added up; None if the answer is wrong and only right ones count."""
    found: dict[str, Tensor] = {}
    stand_ins = make_stand_ins(model, selected)

    def on_use(name: str, use: Use, output: Tensor) -> None:
        part = use.input_squares(selected[name])
        found[name] = found[name] + part if name in found else part

    uses = ParameterUses({name: stand_ins[name] for name in selected}, 1, len(sample.input_ids), on_use)
    try:
        with evaluation_mode(model), innermost(model, uses):
            (logits,) = answer_logits(model, stand_ins, [sample])
    except UnseenUseError as error:
        raise UnsupportedModelError(
            f"Wanda cannot see what a parameter of `{type(model).__name__}` multiplies ({error}); "
            "choose another estimator, or leave such parameters out with `parameters`."
        ) from error
    return found if not only_correct or is_correct(logits, sample.targets) else None
