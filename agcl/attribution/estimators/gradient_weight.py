"""Gradient times weight, the first-order estimate of what removing a weight does to the answer's logits."""

from torch import Tensor

from agcl.attribution.estimators.per_sample import PerSampleGradient, by_entry


class GradientWeight(PerSampleGradient):
    """``W * df/dW`` of the answer's logits by the ordinary gradient: relevance without LRP's rules."""

    @by_entry()
    def score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """``W * g``."""
        return gradient.mul_(parameter)
