"""What a run knows of the directions that its tasks need, and the gate made from it."""

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agcl.attribution.directions import find_matrices, input_moments, shares_kept
from agcl.attribution.estimators import Evidence, PerSampleGradient
from agcl.attribution.passes import Sample
from agcl.errors import AgclError
from agcl.gating import DirectionalGate

Control = Literal["none", "shuffled", "flattened"]


@dataclass(frozen=True)
class Directions:
    """Options of the gate on directions; see ``AttributionCallback``.

    Attributes:
        plasticity: Mean share of its way that a matrix may go, over all directions of its inputs, in (0, 1). The
            budget is the same for each task, so that nothing saturates; a smaller one wants a higher learning rate.
        every: Optimizer steps from one product with the map to the next; more are cheaper where batches are small.
        weighted: Whether inputs count by how much the answers rest on them; if not, all alike, to compare with.
        weighted: Whether inputs count by how much the answers rest on them; if not, all alike, to compare with.

    Raises:
        AgclError: For other values.
    """

    plasticity: float = 0.8
    every: int = 1
    weighted: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.plasticity < 1:
            raise AgclError(f"`directions.plasticity` is {self.plasticity}; choose a number between 0 and 1.")
        if self.every < 1:
            raise AgclError(f"`directions.every` is {self.every}; choose 1 or more steps.")


class DirectionsSoFar:
    """Second moments of the inputs of each weight matrix, summed over the tasks learned, and their gate.

    Args:
        options: See :class:`Directions`.
        estimator: Whose rules and objective weight the inputs.
        strength: Exponent of the share that is kept in each direction.
        control: ``shuffled``: the same shares in random directions; ``flattened``: their mean in all directions.
    """

    def __init__(self, options: Directions, estimator: PerSampleGradient, strength: float, control: Control) -> None:
        self.moments: dict[str, Tensor] = {}
        """Name -> float32, shape (in, in)."""
        self._options, self._estimator, self._strength, self._control = options, estimator, strength, control
        self._transposed: dict[str, bool] = {}
        self._gate: DirectionalGate | None = None
        self._interrupted: dict[str, Any] = {}  # of the gate that a checkpoint was written under

    def find(self, model: nn.Module, parameters: list[str], sample: Sample) -> None:
        """Look which parameters are weight matrices.

        Raises:
            AgclError: If none is.
            UnsupportedModelError: If the rules do not see into the model.
        """
        self._transposed = find_matrices(model, parameters, sample, self._estimator.rule)
        if not self._transposed:
            raise AgclError(
                "`directions` gates weight matrices of linear maps, but none of the selected parameters is one; "
                "leave it out."
            )

    def names(self) -> set[str]:
        """The matrices that are gated by direction, once a task is learned."""
        return set(self.moments)

    def learn(self, evidence: Evidence) -> None:
        """Take in the task just learned; the model is the one that learned it."""
        evidence.parameters = [name for name in evidence.parameters if name in self._transposed]
        moments = input_moments(evidence, self._estimator, weighted=self._options.weighted)
        for name, moment in moments.items():
            if moment.any():  # else the answers do not rest on it
                self.moments[name] = self.moments[name] + moment if name in self.moments else moment

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
        """Gate what is learned from now on."""
        self.detach()
        if self.moments:
            maps = {name: (self._map(name, seed), self._transposed[name]) for name in self.moments}
            gate = DirectionalGate(model.named_parameters(), maps, self._options.every, **self._interrupted)
            self._gate = gate.attach(optimizer)
        self._interrupted = {}

    def _map(self, name: str, seed: int) -> Tensor:
        moment = self.moments[name]
        shares, directions = shares_kept(moment, self._options.plasticity)
        shares = shares**self._strength
        if self._control == "flattened":
            return torch.eye(len(shares), device=moment.device) * shares.mean()
        if self._control == "shuffled":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            random = torch.randn(moment.shape, generator=generator).to(moment.device)
            directions = torch.linalg.qr(random).Q
        return (directions * shares) @ directions.T

    def close(self) -> None:
        """Before weights are read for good."""
        if self._gate is not None:
            self._gate.close()

    def detach(self) -> None:
        """Stop gating."""
        if self._gate is not None:
            self._gate.detach()
            self._gate = None

    def plasticity(self) -> dict[str, float]:
        """Of each gated matrix."""
        return {} if self._gate is None else self._gate.plasticity()

    def held(self) -> list[Tensor]:
        """Tensors held between steps."""
        return [*self.moments.values(), *([] if self._gate is None else self._gate.held())]

    def to(self, device: torch.device) -> None:
        """Have the moments beside the weights."""
        self.moments = {name: moment.to(device) for name, moment in self.moments.items()}

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        gate = self._interrupted if self._gate is None else self._gate.state_dict()
        return {"moments": dict(self.moments), "gate": gate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.moments, self._interrupted = dict(state_dict["moments"]), dict(state_dict["gate"])
