"""Layer-wise relevance propagation: the paper's estimator."""

from typing import Literal

from torch import Tensor

from agcl.attribution.estimators.per_sample import PerSampleGradient, by_entry
from agcl.attribution.passes import GradientRule
from agcl.errors import check_choice

Score = Literal["relevance", "sensitivity"]


class LRP(PerSampleGradient):
    """Relevance of each weight for the answer's logits (arXiv 2605.05285, Sec. 4.1).

    Args:
        rule: ``"attnlrp"``, ``"cplrp"``, or ``"none"``: the plain gradient without LRP rules.
        score: ``"relevance"``: weight times gradient, as in the paper. ``"sensitivity"``: the squared gradient, that is
            the squared relevance per unit of weight; it suits optimizers like Adam, whose step hardly depends on the
            weight's size.

    Raises:
        AgclError: For other values.
    """

    def __init__(self, rule: GradientRule = "attnlrp", score: Score = "relevance") -> None:
        check_choice("rule", rule, GradientRule)
        check_choice("score", score, Score)
        self.rule = rule
        self._is_relevance = score == "relevance"

    @by_entry(lambda self: not self._is_relevance)
    def score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """``W * g`` or ``g ** 2``."""
        return gradient.mul_(parameter) if self._is_relevance else gradient.square_()

    def describe(self) -> dict[str, str]:
        """See :meth:`Estimator.describe`."""
        return super().describe() | {"score": "relevance" if self._is_relevance else "sensitivity"}
