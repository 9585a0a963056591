"""Merging the importance of several tasks into one, parameter by parameter, in fixed point.

With ``s_i`` in [0, 1] the importance that task ``i`` of ``T`` gives a weight:

- ``maximum``: ``max_i s_i`` (arXiv 2605.05285, Eq. 12; clipping at zero has happened before);
- ``mean``: ``sum_i s_i / T``;
- ``probabilistic_or``: ``1 - prod_i (1 - s_i)``, that some task needs the weight, were they independent.

A parameter that only some tasks have counts as 0 in the others; a mean still divides by all of them.

What is kept while merging is small: the levels themselves for the maximum; the sum of the levels for the mean, exact in
uint16 for up to 257 tasks of 8 bits and in int32 for up to 32768 of 16; the product of the complements, rounded to
uint16, for the third. The result is
rounded to nearest, so that against exact arithmetic it is off by at most

- ``maximum``: 0;
- ``mean``: half a step of the result (1/510 in 8 bits, 1/131070 in 16);
- ``probabilistic_or``: ``T / 131070`` (each product is rounded once), in 8 bits and 1/510 more. Another order of the
  tasks may change the result within that; for the other two it changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..errors import AgclError, check_choice
from .artefact import LazyImportance, Shape, common_bits, shapes_of
from .levels import DTYPES, MAX_LEVEL, WIDENING, Bits, bits_of, chunks

How = Literal["maximum", "mean", "probabilistic_or"]

_LARGEST_SUM = {torch.uint16: 2**16 - 1, torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
MAX_MEAN_TASKS: dict[Bits, int] = {  # of a running mean: as many levels as two bytes can sum, or four
    8: _LARGEST_SUM[torch.uint16] // MAX_LEVEL[8],
    16: _LARGEST_SUM[torch.int32] // MAX_LEVEL[16],
}


def merge(importances: Sequence[Mapping[str, Tensor]], how: How = "maximum", bits: Bits | None = None) -> "Merged":
    """Merge the importance of several tasks lazily: each tensor is merged when it is asked for.

    Args:
        importances: Of each task, name to uint8 or uint16 tensor; open files (`ImportanceFile`) are read a tensor at a
            time. Results are on the device of the first that has the parameter.
        how: See the module's docstring.
        bits: Of the result, 8 or 16; None for those of the inputs, 16 if they differ.

    Returns:
        A mapping; iterate over its ``items()``, or hand it to ``save_importance``. While a tensor is merged, its levels
        of one task and the sum or product so far exist, and no more.

    Raises:
        AgclError: If there is nothing to merge, ``how`` is unknown, or two shapes differ.

    Example:
        >>> tasks = [{"weight": torch.tensor(levels, dtype=torch.uint8)} for levels in ([0, 51, 255], [0, 204, 51])]
        >>> {how: merge(tasks, how)["weight"].tolist() for how in ("maximum", "mean", "probabilistic_or")}
        {'maximum': [0, 204, 255], 'mean': [0, 128, 153], 'probabilistic_or': [0, 214, 255]}
    """
    return Merged(importances, how, bits)


class Merged(LazyImportance):
    """What :func:`merge` returns.

    Attributes:
        partial: Names of the parameters that only some of the tasks have.
    """

    def __init__(self, importances: Sequence[Mapping[str, Tensor]], how: How, bits: Bits | None) -> None:
        check_choice("how", how, How)
        if not importances:
            raise AgclError("There is nothing to merge; give the importance of at least one task.")
        self.how = how
        self._sources = list(importances)
        self._input_bits: Bits = max(common_bits(source) for source in self._sources)
        self.bits = bits or self._input_bits
        found: dict[str, Shape] = {}
        for source in self._sources:
            for name, shape in shapes_of(source).items():
                _check_shape(name, found.setdefault(name, shape), shape)
        self.shapes = dict(sorted(found.items()))
        self.partial = [name for name in self.shapes if not all(name in source for source in self._sources)]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        state = None
        for source in self._sources:
            if name in source:
                levels = source[name]
                if state is None:
                    state = _new_state(self.how, levels, self._input_bits, len(self._sources))
                _take_in(self.how, state, levels.to(state.device), self._input_bits)
        assert state is not None
        return _result(self.how, state, len(self._sources), self._input_bits, self.bits)


class RunningMerge:
    """The merge over the tasks so far, for a training loop: one task's importance after another.

    Bytes held per weight: for the maximum one, of 16 bits two; for the mean two, of 16 bits four; for the third two.

    Args:
        how: See the module's docstring.
        bits: Of the importance taken in and given out, 8 or 16.

    Example:
        >>> running = RunningMerge("mean")
        >>> for levels in ([0, 100], [0, 200]):
        ...     running.update({"weight": torch.tensor(levels, dtype=torch.uint8)})
        >>> running.importance()
        {'weight': tensor([  0, 150], dtype=torch.uint8)}
    """

    def __init__(self, how: How = "maximum", bits: Bits = 8) -> None:
        check_choice("how", how, How)
        self.how: How = how
        self.bits: Bits = bits
        self.num_tasks = 0
        self._state: dict[str, Tensor] = {}

    def update(self, importance: Mapping[str, Tensor]) -> None:
        """Take in the importance of one more task; neither changed nor kept.

        Args:
            importance: Name to uint8 or uint16 tensor, shapes as before; names may be new or missing. An open file is
                read a tensor at a time. What is held of a new name is on its tensor's device.

        Raises:
            AgclError: If a shape or dtype does not fit, or a mean has had 257 tasks (of 16 bits: 32768); nothing is
                changed then.
        """
        max_tasks = MAX_MEAN_TASKS[self.bits]
        if self.how == "mean" and self.num_tasks == max_tasks:
            raise AgclError(f"A running mean is over at most {max_tasks} tasks; use `maximum`.")
        shapes = shapes_of(importance)
        if shapes and (bits := common_bits(importance)) != self.bits:
            raise AgclError(f"This running merge takes importance of {self.bits} bits, not of {bits} bits.")
        for name, shape in shapes.items():
            if name in self._state:
                _check_shape(name, tuple(self._state[name].shape), shape)
        for name in shapes:
            levels = importance[name]
            if name not in self._state:
                self._state[name] = _new_state(self.how, levels, self.bits, max_tasks)
            state = self._state[name]
            _take_in(self.how, state, levels.to(state.device), self.bits)
        self.num_tasks += 1

    def importance(self) -> dict[str, Tensor]:
        """Merged importance so far: name to uint8 or uint16 tensor; empty before the first task.

        Under ``maximum`` these are the tensors held, which the next update changes; under the others they are new.
        """
        bits = self.bits
        return {name: _result(self.how, state, self.num_tasks, bits, bits) for name, state in self._state.items()}

    def to(self, device: torch.device | str) -> Self:
        """Move what is held to a device; a checkpoint brings it to the CPU."""
        self._state = {name: state.to(device) for name, state in self._state.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; the tensors are not copied."""
        return {"how": self.how, "bits": self.bits, "num_tasks": self.num_tasks, "state": dict(self._state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            AgclError: If it is the state of another way to merge, or of other bits.
        """
        if state_dict["bits"] != self.bits:
            raise AgclError(
                f"The importance so far was merged in {state_dict['bits']} bits, not in {self.bits}; keep to it."
            )
        if state_dict["how"] != self.how:
            raise AgclError(
                f"The importance so far was merged by `{state_dict['how']}`, not by `{self.how}`; keep to it."
            )
        self.num_tasks = state_dict["num_tasks"]
        self._state = {name: state.clone() for name, state in state_dict["state"].items()}


def _check_shape(name: str, before: Shape, now: Shape) -> None:
    if before != now:
        raise AgclError(
            f"Importance of `{name}` has shape {now}, in an earlier task {before}; merge tasks of one model."
        )


# What is kept of a parameter while tasks are taken in: levels (maximum), the sum of levels (mean), or the product of
# the complements, 65535 standing for 1 (probabilistic_or). ``bits`` are those in which levels are counted.


def _new_state(how: How, levels: Tensor, bits: Bits, max_tasks: int) -> Tensor:
    """The state before the first task."""
    if how == "probabilistic_or":
        return torch.full(levels.shape, MAX_LEVEL[16], dtype=torch.uint16, device=levels.device)
    dtype = DTYPES[bits]
    if how == "mean":
        dtype = next(dtype for dtype, largest in _LARGEST_SUM.items() if max_tasks * MAX_LEVEL[bits] <= largest)
    return torch.zeros(levels.shape, dtype=dtype, device=levels.device)


def _take_in(how: How, state: Tensor, levels: Tensor, bits: Bits) -> None:
    """Take in one task's levels, in place in ``state``; both are counted in ``bits`` or the levels in fewer."""
    if how == "maximum" and levels.dtype == state.dtype == torch.uint8:
        torch.maximum(state, levels, out=state)
        return
    own_bits = bits_of(levels)
    widening = WIDENING if own_bits < bits else 1
    for held, piece in chunks(state, levels):
        if how == "maximum":
            held.copy_(torch.maximum(held.to(torch.int32), piece.to(torch.int32).mul_(widening)))
        elif how == "mean":
            held.copy_(held.to(torch.int64).add_(piece.to(torch.int64), alpha=widening))
        else:
            largest = MAX_LEVEL[own_bits]
            held.copy_(held.double().mul_(largest - piece.double()).div_(largest).round_())


def _result(how: How, state: Tensor, num_tasks: int, bits: Bits, result_bits: Bits) -> Tensor:
    """Levels in ``result_bits`` of what has been taken in."""
    if how == "maximum" and bits == result_bits:
        return state
    result = torch.empty(state.shape, dtype=DTYPES[result_bits], device=state.device)
    kept_bits = 16 if how == "probabilistic_or" else bits
    divisor = MAX_LEVEL[kept_bits] * (num_tasks if how == "mean" else 1)
    for held, out in chunks(state, result):
        value = held.double()
        if how == "probabilistic_or":
            value.neg_().add_(MAX_LEVEL[16])
        # An exact half is decided by integers being exact in float64, hence the same in any order of the tasks.
        out.copy_(value.mul_(MAX_LEVEL[result_bits]).div_(divisor).round_())
    return result
