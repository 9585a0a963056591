"""Memory Aware Synapses (Aljundi et al., ECCV 2018, arXiv 1711.09601)."""

from torch import Tensor

from agcl.attribution.estimators.per_sample import PerSampleGradient, by_entry


class MAS(PerSampleGradient):
    """Magnitude of the gradient of the squared length of the logits at the answer's positions; needs no labels."""

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``|logits| ** 2``."""
        return logits.float().square().sum()

    @by_entry()
    def score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """``|g|``."""
        return gradient.abs_()
