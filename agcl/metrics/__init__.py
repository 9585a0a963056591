"""Continual-learning metrics: pure functions in ``functional``, torchmetrics classes here."""

from agcl.metrics.figure import plot_score_matrix
from agcl.metrics.transfer import (
    AveragePerformance,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    ScoreMatrix,
)

__all__ = [
    "AveragePerformance",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "LearningAccuracy",
    "ScoreMatrix",
    "plot_score_matrix",
]
