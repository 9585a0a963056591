"""Diagonal Fisher information, as EWC uses it (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796).

Its definition is the expectation of the *squared gradient of one sample's log-probability*. Squaring the mean gradient
of a batch instead, as is often done, gives another quantity: gradients of different samples cancel before the square,
the more the larger the batch. Here every sample is squared on its own.
"""

import torch
from torch import Tensor

from agcl.attribution.estimators.interface import Evidence
from agcl.attribution.estimators.per_sample import PerSampleGradient, by_entry, log_probability
from agcl.attribution.pieces import PieceConsumer
from agcl.attribution.relevance import Consumer


class EmpiricalFisher(PerSampleGradient):
    """Squared gradient of the log-probability of the true answer, per sample.

    On answers that the model knows by heart the log-probability is near zero and so is its gradient.
    """

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of the answer."""
        return log_probability(logits, targets)

    @by_entry(lambda self: True)
    def score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """``g ** 2``."""
        return gradient.square_()


class Fisher(EmpiricalFisher):
    """The same with labels drawn from the model's own distribution at each answer position, one draw per sample."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def visit(self, evidence: Evidence, consume: Consumer, consume_pieces: PieceConsumer | None = None) -> None:
        """See :meth:`PerSampleGradient.visit`; the same labels are drawn each time."""
        self._generator.manual_seed(evidence.seed)
        super().visit(evidence, consume, consume_pieces)

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of drawn labels."""
        probabilities = logits.detach().float().softmax(-1).cpu()  # one generator for all devices
        drawn = torch.multinomial(probabilities, 1, generator=self._generator).flatten()
        return log_probability(logits, drawn)
