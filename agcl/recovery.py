"""What a run measured of its old tasks, in a few numbers; apart from the callback, since tables need no Lightning."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any


def recovery_means(results: Mapping[str, Any]) -> dict[str, float]:
    """Mean over the old tasks of each measurement in a run's ``recovery``; what was not measured is left out.

    Args:
        results: A run's, as in ``scores.json``.

    Returns:
        ``divergence`` (nats per answer token), ``score`` and ``recovered_score`` (both in [0, 1]).
    """
    lists = (results.get("recovery") or {}).items()
    values = {name: [value for value in found if value is not None] for name, found in lists}
    return {name: fmean(found) for name, found in values.items() if found}
