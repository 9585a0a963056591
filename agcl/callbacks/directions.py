"""What a run knows of the directions that its tasks need, and the gate made from it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agcl.attribution.directions import (
    Control,
    InputMoments,
    MomentSums,
    base_name,
    find_matrices,
    input_moments,
    is_of_pair,
    is_seen,
)
from agcl.attribution.estimators import Estimator, Evidence, PerSampleGradient
from agcl.attribution.passes import Sample
from agcl.errors import AgclError
from agcl.gating import DirectionalGate
from agcl.ranks import Ranks
from agcl.task_pairs import pairs_of, turn_pairs


@dataclass(frozen=True)
class Directions:
    """Options of the gate on directions; see ``AttributionCallback``.

    Attributes:
        plasticity: Mean share of its way that a matrix may go, over all directions of its inputs, in (0, 1). The
            budget is the same for each task, so that nothing saturates; a smaller one wants a higher learning rate.
        sharpness: How sharply the shares part important directions from others, above 0; see
            :func:`agcl.attribution.directions.shares_kept`.
        every: Optimizer steps from one product with the map to the next: few are slow where batches are small, with
            many, less of a new task is learned.
        weighted: Whether inputs count by how much the answers rest on them; if not, all alike, to compare with.
        own_text: Pieces of text that the model writes before the first task, drawn from its own distribution. They
            count as much as a task, so that what the model could do before is kept as well: already the first task is
            learned under the gate. 0: none.
        own_tokens: Tokens of each piece.

    Raises:
        AgclError: For other values.
    """

    plasticity: float = 0.8
    sharpness: float = 4.0
    every: int = 4
    weighted: bool = True
    own_text: int = 16
    own_tokens: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.plasticity < 1:
            raise AgclError(f"`directions.plasticity` is {self.plasticity}; choose a number between 0 and 1.")
        if not 0 < self.sharpness < math.inf:
            raise AgclError(f"`directions.sharpness` is {self.sharpness}; choose a finite number above 0.")
        if self.every < 1:
            raise AgclError(f"`directions.every` is {self.every}; choose 1 or more steps.")
        if self.own_text < 0:
            raise AgclError(f"`directions.own_text` is {self.own_text}; choose a number of pieces, or 0 for none.")
        if self.own_tokens < 2:
            raise AgclError(f"`directions.own_tokens` is {self.own_tokens}; choose 2 or more.")


def directions_problem(estimator: type[Estimator], source: str, reestimate: int, strength: float) -> str | None:
    """Why there can be no gate by direction under these options of ``AttributionCallback``, if so."""
    if not issubclass(estimator, PerSampleGradient):
        return (
            f"`directions` weights inputs by gradients, which the estimator {estimator.__name__} does not take; "
            "choose LRP, GradientWeight, Fisher, EmpiricalFisher or MAS, or give `directions: null`."
        )
    if not strength:
        return "`strength: 0` is no gate; give `directions: null` with it, or a number above 0."
    for option, is_given in (("source: single_task", source == "single_task"), ("reestimate", reestimate > 0)):
        if is_given:
            return f"`directions` and `{option}` do not work together; give `directions: null`, or leave it out."
    return None


class DirectionsSoFar:
    """Second moments of the inputs of each weight matrix, summed over the tasks learned, and their gate.

    Args:
        options: See :class:`Directions`.
        estimator: Whose rules and objective weight the inputs.
        control: See :meth:`InputMoments.maps`.
        on_host: Whether the moments are held in host memory instead of beside the weights.

    Attributes:
        moments: Of the tasks learned.
        options: As given.
        dtype: Of the products with the gate's maps; to be set before `attach`.
    """

    def __init__(self, options: Directions, estimator: PerSampleGradient, control: Control, *, on_host: bool) -> None:
        self.moments = InputMoments()
        self.options = options
        self.dtype = torch.float32
        self._estimator, self._control = estimator, control
        self._home = torch.device("cpu") if on_host else None
        self._device = torch.device("cpu")
        self._transposed: dict[str, bool] = {}
        self._pairs: dict[str, str] = {}
        self._is_seen = False
        self._gate: DirectionalGate | None = None
        self._plasticity: dict[str, float] = {}
        self._interrupted: dict[str, Any] = {}  # of the gate that a checkpoint was written under

    def find(self, model: nn.Module, parameters: list[str], sample: Sample) -> bool:
        """Look which parameters are weight matrices, and whether any is.

        Raises:
            UnsupportedModelError: If the rules do not see into the model.
        """
        self._pairs = pairs_of(model, parameters)
        self._transposed = find_matrices(model, parameters, sample, self._estimator.rule, self._pairs)
        self._is_seen = set(self._sums().parameters()) <= set(parameters) and is_seen(
            model, parameters, sample, self._estimator
        )
        return bool(self._transposed)

    def _sums(self) -> MomentSums:
        return MomentSums(self._transposed, self._pairs, weighted=self.options.weighted, home=self._home)

    def names(self) -> set[str]:
        """The matrices that are gated by direction, once a task is learned."""
        return {self._pairs.get(name, name) for name in self.moments.sums}

    def leaves_out(self, name: str) -> bool:
        """Whether a parameter is not to be gated by entry: it is by direction, or belongs to a pair of this task."""
        return name in self.names() or (bool(self._pairs) and is_of_pair(name))

    def observer(self) -> MomentSums | None:
        """For `learn`, to see the backward passes in which the parameters are scored; None if it cannot."""
        return self._sums() if self._is_seen else None

    def learn(self, evidence: Evidence, observed: MomentSums | None = None) -> None:
        """Take in what the model has just learned, which counts as much as anything before.

        Args:
            evidence: To pass again, if it has not been observed.
            observed: From `observer`, if it was there when the rows were passed.
        """
        found = InputMoments() if observed is None else observed.moments()
        if not found.sums:  # several processes took turns, or rows were summed
            found = input_moments(evidence, self._estimator, self._sums())
        ranks, sums = Ranks.of_this_run(), self.moments.sums
        self.moments.transposed.update(found.transposed)
        for name in list(found.sums):  # one at a time: of large models there is no room for all of them again
            moment = found.sums.pop(name)
            if ranks.size > 1:  # rounding must not let the processes' weights part
                there = moment.to(self._device)
                ranks.agree_on(there)
                moment.copy_(there)
            moment /= moment.trace()  # each task counts alike
            sums[name] = sums[name] + moment if name in sums else moment

    def attach(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, seed: int, *, is_last: bool, begins: bool = False
    ) -> None:
        """Gate what is learned from now on, which is nothing if the last task is learned: maps take a while to make.

        Args:
            optimizer: Of the model.
            model: The model.
            seed: Of random directions.
            is_last: Whether the last task is learned.
            begins: Whether nothing of the task was learned: its pairs are then turned to what is free.
        """
        self.detach()
        self._plasticity = dict.fromkeys(self.names(), self.options.plasticity)
        if self.moments.sums and not is_last:
            budget = self.options.plasticity, self.options.sharpness
            found = self.moments.maps(*budget, self._control, seed, self._device)
            if begins:
                turn_pairs(model, {self._pairs[name]: v for name, (v, _) in found.items() if name in self._pairs})
            # A pair's first matrix meets the inputs that the weights beside it do, and is never transposed.
            maps = {
                self._pairs.get(name, name): (held.to(self.dtype), is_transposed and name not in self._pairs)
                for name, (held, is_transposed) in found.items()
            }
            gate = DirectionalGate(model.named_parameters(), maps, self.options.every, **self._interrupted)
            self._gate = gate.attach(optimizer)
            self._plasticity = gate.plasticity()  # more than the budget, where more directions than that are not used
        self._interrupted = {}

    def make_up(self, optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
        """Before anything new is learned: map what had moved since the last product when a checkpoint was written."""
        if self._interrupted.get("num_steps"):
            self.attach(optimizer, model, seed, is_last=False)
            self.detach()
        self._interrupted = {}

    def close(self) -> None:
        """Before weights are read for good."""
        if self._gate is not None:
            self._gate.close()

    def detach(self) -> None:
        """Stop gating."""
        if self._gate is not None:
            self._gate.detach()
            self._gate = None
        self._plasticity = {}

    def plasticity(self) -> dict[str, float]:
        """Mean share of its way that each matrix may go, from `attach` to `detach`."""
        return self._plasticity

    def held(self) -> list[Tensor]:
        """Tensors held between steps."""
        return [*self.moments.sums.values(), *([] if self._gate is None else self._gate.held())]

    def to(self, device: torch.device) -> None:
        """Have the moments beside the weights, which are on this device, unless they are held in host memory."""
        self._device = device
        self.moments = self.moments.to(self._home or device)

    def begin_with(self, earlier: dict[str, Any]) -> None:
        """Hold what an earlier run has held, the text that its model wrote included, with an adapter or without.

        Args:
            earlier: As its :meth:`state_dict` gave it. What it holds of weights that are not gated here is left out.
        """
        ours = {base_name(name): name for name in self._transposed}
        moments = InputMoments(earlier["sums"], earlier["transposed"]).by_base_name()
        sums = {ours[n]: moment.clone() for n, moment in moments.sums.items() if n in ours}  # not to depend on its file
        self.moments = InputMoments(sums, {name: self._transposed[name] for name in sums})

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        gate = self._interrupted if self._gate is None else self._gate.state_dict()
        return {**vars(self.moments), "gate": gate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.moments = InputMoments(dict(state_dict["sums"]), dict(state_dict["transposed"]))
        self._interrupted = dict(state_dict["gate"])
