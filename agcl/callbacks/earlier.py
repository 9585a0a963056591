"""What an earlier run has learned, out of a checkpoint of it, for a run that goes on with other tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from agcl.attribution.directions import base_name, is_of_pair
from agcl.checkpoints import SUFFIX, attribution_state, last_whole, look_into, model_weights
from agcl.errors import AgclError

_ROUNDING = 2.0**-8
"""Relative distance that bfloat16 leaves between the same weights, and training does not."""


@dataclass(frozen=True)
class EarlierRun:
    """A run that has ended.

    Attributes:
        path: Its checkpoint.
        tasks: Names of the tasks that it has learned.
        state: Of its ``AttributionCallback``, tensors mapped from the file.
        weights: Of its model, by name, also mapped.
    """

    path: Path
    tasks: list[str]
    state: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def is_adapted(self) -> bool:
        """Whether it has trained an adapter."""
        return any(map(is_of_pair, self.weights))

    def check_model(self, weights: Mapping[str, Tensor]) -> None:
        """Raise unless a model holds what the run has learned.

        Weights are compared by the names that they have without adapters. Of a run that has trained one, those beside
        its pairs must have changed, since it is merged into them; quantised weights cannot be compared.

        Args:
            weights: Of the model, by name.

        Raises:
            AgclError: Otherwise.
        """
        ours = {base_name(name): weight for name, weight in weights.items() if not is_of_pair(name)}
        learned = {base_name(n): w for n, w in self.weights.items() if not self.is_adapted or ".base_layer." in n}
        apart = whole = 0.0
        for name in learned.keys() & ours.keys():
            if not ours[name].is_floating_point():
                continue
            before = learned[name].to(ours[name].device).float()
            if before.shape != ours[name].shape:
                raise AgclError(f"{self._named()} is of another model: `{name}` has the shape {tuple(before.shape)}.")
            apart += float((ours[name].detach().float() - before).square().sum())
            whole += float(before.square().sum())
        if self.is_adapted and whole and not apart:
            raise AgclError(
                f"{self._named()} has learned an adapter, which this model is without: merge it into the weights "
                "(PEFT's `merge_and_unload`), save them, and begin with those."
            )
        if not self.is_adapted and (apart > _ROUNDING**2 * whole or not learned.keys() <= ours.keys()):
            raise AgclError(
                f"{self._named()} has ended with other weights than this model has: set `model_name_or_path` to the "
                "folder `model` that it has left, or to what `agcl export` makes of it."
            )

    def _named(self) -> str:
        return f"The earlier run ({self.path})"


def read_earlier(path: str | Path) -> EarlierRun:
    """What a run has left.

    Args:
        path: Its folder, of which the last whole checkpoint is taken, or a checkpoint.

    Raises:
        AgclError: If there is no whole checkpoint, or none of a run with an ``AttributionCallback`` that has just
            learned a task.
    """
    file = Path(path)
    if file.is_dir() and file.suffix != SUFFIX:
        found = last_whole([file, file / "checkpoints"])
        if found is None:
            raise AgclError(
                f"`earlier`: there is no whole checkpoint in {path}; a run leaves one with a ModelCheckpoint among its "
                "callbacks."
            )
        file = found
    checkpoint = look_into(file, "cpu")
    state = attribution_state(checkpoint)
    if state is None:
        raise AgclError(f"`earlier`: {file} is of a run without an AttributionCallback, which has nothing to protect.")
    num_learned = state["num_boundaries"]
    if not num_learned:
        raise AgclError(f"`earlier`: {file} is of a run that had not learned a task yet; take a later checkpoint.")
    tasks = [name for name, _ in checkpoint["agcl"]["tasks"]]
    if state["task_begun"] == num_learned:  # so that its weights hold more than is known of
        raise AgclError(
            f"`earlier`: {file} has begun to learn `{tasks[num_learned]}`, of which it has no importance yet; take a "
            "checkpoint from the end of a task, or of the run."
        )
    weights = model_weights(checkpoint)
    if not weights:
        raise AgclError(f"`earlier`: {file} has its weights in shards, in which no weight is whole; use another.")
    return EarlierRun(file, tasks[:num_learned], state, weights)
