"""Choosing each method's settings from its trials."""

import math
from collections.abc import Mapping, Sequence

from agcl.compare.settings import Method, Values


def choose(trials: Sequence[tuple[Values, float | None]]) -> Values | None:
    """The values of the trial with the largest score; of equal ones, the smallest learning rate, then the first.

    Args:
        trials: Values and validation score; ``None`` for a trial that failed.

    Returns:
        The chosen values, or ``None`` if all trials failed.

    Example:
        >>> choose([({"model.lr": 3.0}, 0.5), ({"model.lr": 2.0}, 0.5), ({"model.lr": 1.0}, None)])
        {'model.lr': 2.0}
    """
    scored = [(score, values) for values, score in trials if score is not None and not math.isnan(score)]
    if not scored:
        return None
    best = max(score for score, _ in scored)
    return min((values for score, values in scored if score == best), key=_learning_rate)


def at_edge(method: Method, chosen: Mapping[str, object]) -> list[str]:
    """Keys whose chosen number is the smallest or the largest of those tried: a better one may lie beyond.

    Example:
        >>> method = Method(grid={"lr": [1, 2, 3], "share": [0.1, 0.5], "kind": ["a", "b"], "strength": [1]})
        >>> at_edge(method, {"lr": 2, "share": 0.5, "kind": "a", "strength": 1})
        ['share']
    """
    edges = []
    for key, value in chosen.items():
        tried = {trial[key] for trial in method.all_trials() if _is_number(trial.get(key))}
        if _is_number(value) and len(tried) > 1 and value in (min(tried), max(tried)):
            edges.append(key)
    return edges


def _learning_rate(values: Mapping[str, object]) -> float:
    for key, value in values.items():
        if key.rpartition(".")[2] in ("lr", "learning_rate") and isinstance(value, (int, float)):
            return float(value)
    return math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
