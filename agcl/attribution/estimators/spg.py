"""Soft-masking of parameter-level gradient flow (Konishi et al., ICML 2023, arXiv 2306.14775)."""

import torch
from torch import Tensor

from agcl.attribution.estimators.interface import Evidence
from agcl.attribution.estimators.per_sample import PerSampleGradient, log_probability
from agcl.ranks import Ranks


class SPG(PerSampleGradient):
    """``|tanh(z)|`` of the task's mean gradient, standardised within each tensor.

    SPG's term over the heads of other tasks does not exist in a language model with one head. Scores are in [0, 1)
    already: use it with ``normalisation: none``.
    """

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of the answer: the negative training loss."""
        return log_probability(logits, targets)

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        sums: dict[str, Tensor] = {}

        def consume(name: str, parameter: Tensor, gradient: Tensor) -> None:
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.float()

        self.visit(evidence, consume)
        return {name: _standardised(sums.pop(name), evidence.ranks) for name in list(sums)}


def _standardised(gradient: Tensor, ranks: Ranks) -> Tensor:
    """Of the processes' parts together."""
    count = ranks.total(torch.tensor(gradient.numel(), device=gradient.device))
    mean = ranks.total(gradient.sum()) / count
    deviation = (ranks.total((gradient - mean).square().sum()) / count).sqrt()
    return ((gradient - mean) / deviation.clamp_min(torch.finfo(gradient.dtype).tiny)).tanh_().abs_()
