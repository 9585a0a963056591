"""Which argument of which operation may be a parameter, and what it meets there: data for ``uses.py``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from agcl.attribution.operations import OPERATIONS

Kind = Literal["linear", "transposed", "scale", "bias", "lookup"]
Met = tuple[Kind, Callable[[], Tensor]]

# Their results hold the parameter's entries, cast, plus a number, or with two dimensions exchanged.
CASTS: set[Any] = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type_as}
SUMS: set[Any] = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
FLIPS: set[Any] = {torch.transpose, Tensor.transpose}
# One matrix for each of several groups of rows.
GROUPED: set[Any] = {op for op in OPERATIONS if getattr(op, "__name__", "") in ("grouped_mm", "_grouped_mm")}


@dataclass(frozen=True)
class Roles:
    """An operation's arguments, and what a parameter in one of them meets."""

    names: tuple[str, ...]
    uses: Mapping[str, Callable[[Any, Mapping[str, Any]], Met]]


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    detached = tensor.detach()
    return lambda: detached


def _normalised(func: Callable[..., Tensor], given: Mapping[str, Any]) -> Callable[[], Tensor]:
    """What the weight of a normalisation multiplies."""
    inputs, rest = given["input"].detach(), {key: given[key] for key in ("normalized_shape", "eps") if key in given}
    return lambda: func(inputs, **rest)


def _plain(kind: Kind, other: str) -> Callable[[Any, Mapping[str, Any]], Met]:
    return lambda func, given: (kind, _held(given[other]))


_LINEAR = Roles(("input", "weight", "bias"), {"weight": _plain("linear", "input"), "bias": _plain("bias", "input")})
_ADDMM = Roles(("input", "mat1", "mat2"), {"input": _plain("bias", "mat1"), "mat2": _plain("transposed", "mat1")})
_BMM = Roles(
    ("input", "mat2"),
    {
        "input": lambda func, given: ("linear", _held(given["mat2"].transpose(1, 2))),
        "mat2": _plain("transposed", "input"),
    },
)
_GROUPED_MM = Roles(("mat_a", "mat_b", "offs", "bias", "out_dtype"), {"mat_b": _plain("transposed", "mat_a")})
_MATMUL = Roles(("input", "other"), {"other": _plain("transposed", "input")})
_ADD = Roles(("input", "other"), {"other": _plain("bias", "input")})
_MUL = Roles(("input", "other"), {"input": _plain("scale", "other"), "other": _plain("scale", "input")})
_NORM: dict[str, Any] = {"weight": lambda func, given: ("scale", _normalised(func, given))}
ROLES: dict[Callable[..., Any], Roles] = {
    functional.linear: _LINEAR,
    torch.addmm: _ADDMM,
    torch.bmm: _BMM,
    **dict.fromkeys(GROUPED, _GROUPED_MM),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _MATMUL),
    **dict.fromkeys((*SUMS, Tensor.add_), _ADD),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _MUL),
    functional.layer_norm: Roles(
        ("input", "normalized_shape", "weight", "bias", "eps"), _NORM | {"bias": _plain("bias", "input")}
    ),
    functional.rms_norm: Roles(("input", "normalized_shape", "weight", "eps"), _NORM),
}
