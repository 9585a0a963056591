"""Estimators that aggregate something made of each sample's gradient."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agcl.attribution.estimators.interface import Estimator, Evidence
from agcl.attribution.importance import SampleAggregator
from agcl.attribution.passes import GradientRule, Sample, target_logit
from agcl.attribution.pieces import PieceConsumer, SampleGradients, scored_in
from agcl.attribution.relevance import Consumer, attribute_batch
from agcl.attribution.turns import Turn

_Score = TypeVar("_Score", bound=Callable[..., Tensor])


def by_entry(is_square: Callable[[Any], bool] = lambda estimator: False) -> Callable[[_Score], _Score]:
    """Mark a `PerSampleGradient.score` that treats every entry on its own and gives zero where the gradient is zero.

    It may then be given some rows of a matrix at a time, which is faster. A method that overrides it must be marked
    anew.

    Args:
        is_square: Given the estimator, whether its score is the square of the gradient, which is faster still.
    """

    def mark(score: _Score) -> _Score:
        score.is_square = is_square  # type: ignore[attr-defined]
        return score

    return mark


class PerSampleGradient(Estimator):
    """Aggregates `score` of each sample's gradient of `objective`; a subclass overrides one or both."""

    shares_samples = True
    scores_shards = True
    rule: GradientRule = "none"

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Scalar whose gradient is taken.

        Args:
            logits: At the answer's positions, shape ``(k, vocabulary)``.
            targets: The answer's token ids, shape ``(k,)``.
        """
        return target_logit(logits, targets)

    def score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Score of one parameter for one sample.

        Args:
            parameter: Detached.
            gradient: Same shape; may be overwritten.

        Where it is marked with `by_entry`, both may be rows of a matrix.
        """
        raise NotImplementedError

    def check(self, model: nn.Module, parameters: Sequence[str], sample: Sample) -> None:
        """See :meth:`Estimator.check`."""
        attribute_batch(
            model, [sample], consume=lambda *_: None, rule=self.rule, parameters=parameters, only_correct=False
        )

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """See :meth:`Estimator.scores`."""
        aggregator = SampleAggregator(evidence.config, evidence.num_draws, evidence.ranks)

        def consume(name: str, parameter: Tensor, gradient: Tensor) -> None:
            aggregator.update(name, self.score(parameter.detach(), gradient.to(scored_in(gradient))))

        is_square = getattr(self.score, "is_square", None)

        def consume_pieces(name: str, gradients: SampleGradients) -> None:
            aggregator.update_batch(name, gradients, self.score, is_square is not None and is_square(self))

        in_pieces = aggregator.takes_pieces and is_square is not None
        self.visit(evidence, consume, consume_pieces if in_pieces else None)
        return aggregator.aggregate()

    def visit(self, evidence: Evidence, consume: Consumer, consume_pieces: PieceConsumer | None = None) -> None:
        """Run samples until enough were used; several processes take turns with them.

        The samples used are the same for any number of processes, and so is the order in which they are consumed.

        Args:
            evidence: Where ``num_used`` is set.
            consume: As for :func:`attribute_batch`; of several processes, called with this one's part of parameter and
                gradient for the samples of all.
            consume_pieces: As for :func:`attribute_batch`; not called where there are several processes.
        """
        ranks = evidence.ranks
        for batch in evidence.batches():
            device = batch[0].input_ids.device
            turn = Turn(ranks, consume, len(batch), device, per_sample=evidence.per_sample)
            # To make the shares equal, the last sample is run again where need be, and not counted.
            padded = batch + [batch[-1]] * (-len(batch) % ranks.size)
            attribute_batch(
                evidence.model,
                padded[ranks.rank :: ranks.size],
                consume=turn.consume,
                rule=self.rule,
                parameters=evidence.parameters,
                only_correct=evidence.only_correct,
                per_sample=evidence.per_sample,
                objective=self.objective,
                choose=turn.choose,
                consume_pieces=consume_pieces if ranks.size == 1 else None,
                observe=evidence.observe if ranks.size == 1 else None,
            )
            turn.finish()
            evidence.num_used += turn.num_used
            evidence.on_progress(turn.num_used)


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the targets' log-probabilities.

    Args:
        logits: Shape ``(k, vocabulary)``.
        targets: Token ids, shape ``(k,)``.

    Returns:
        Scalar, float32 at least.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return target_logit(wide.log_softmax(-1), targets)
