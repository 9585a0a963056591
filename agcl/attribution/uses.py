"""Where each parameter is used in a forward pass, so that one batched pass yields the gradient of every sample.

An ordinary backward pass sums a parameter's gradient over the batch. For an operation that is linear in the parameter,
the gradient of one sample needs only what entered the operation and the gradient that came back, both of which one
batched pass has for all samples. `ParameterUses`, a ``TorchFunctionMode``, takes the parameters out of the graph and
remembers the inputs of each operation that used them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from agcl.attribution.operations import OPERATIONS

Kind = Literal["linear", "transposed", "scale", "bias", "lookup"]


class UnseenUseError(Exception):
    """A parameter is used by an operation that is not known to be linear in it, sample by sample."""


@dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        kind: ``linear``: ``x W^T``, W of shape (out, in). ``transposed``: ``x W``, W of shape (in, out). ``scale``: ``x
            * w``. ``bias``: ``x + w``. ``lookup``: rows of an embedding.
        inputs: Gives what the parameter met, computed on demand: x, shape (batch, ..., features), or token ids.
        num_samples: Size of the batch.
    """

    kind: Kind
    inputs: Callable[[], Tensor]
    num_samples: int

    def sample(self, tensor: Tensor, index: int) -> Tensor:
        """The part of ``tensor`` that belongs to one sample; batch and tokens may share the first dimension."""
        return tensor[index] if len(tensor) == self.num_samples else tensor.unflatten(0, (self.num_samples, -1))[index]

    def add_gradient(self, total: Tensor | None, like: Tensor, index: int, upstream: Tensor) -> Tensor:
        """Add this use's part of one sample's gradient.

        Args:
            total: Gradient so far, overwritten, or None.
            like: The parameter, detached.
            index: Of the sample.
            upstream: Gradient at the operation's output, whole batch.

        Returns:
            The new total, the parameter's shape and dtype.
        """
        arrived = self.sample(upstream, index)
        if self.kind == "lookup":
            total = torch.zeros_like(like) if total is None else total
            ids = self.sample(self.inputs(), index)
            return total.index_add_(0, ids.reshape(-1), arrived.reshape(-1, like.shape[1]).to(like.dtype))
        if self.kind == "bias":
            part = arrived.sum_to_size(like.shape)
        else:
            entered = self.sample(self.inputs(), index).to(upstream.dtype)
            if self.kind == "scale":
                part = (arrived * entered).sum_to_size(like.shape)
            else:
                arrived, entered = arrived.reshape(-1, arrived.shape[-1]), entered.reshape(-1, entered.shape[-1])
                part = arrived.T @ entered if self.kind == "linear" else entered.T @ arrived
        part = part.to(like.dtype)  # autocast sends back narrower gradients
        return part if total is None else total.add_(part)

    def input_squares(self, like: Tensor) -> Tensor:
        """Sum over samples and tokens of the squared input that each weight entry meets, broadcastable to its shape.

        A bias meets 1; a row of an embedding meets 1 at each occurrence of its token (an embedding is a linear map of
        one-hot vectors).
        """
        entered = self.inputs()
        if self.kind == "lookup":
            return torch.bincount(entered.reshape(-1), minlength=len(like)).to(torch.float32)[:, None]
        if self.kind == "bias":
            return torch.tensor(float(entered.numel() // entered.shape[-1]), device=like.device)
        squares = entered.float().square()
        if self.kind == "scale":
            return squares.sum_to_size(like.shape)
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        return squares if self.kind == "linear" else squares[:, None]


class ParameterUses(TorchFunctionMode):
    """Reports each use of the given parameters, which enter the operations as constants.

    Args:
        parameters: Name -> parameter as it stands in the model during the forward pass.
        num_samples: Size of the batch, the first dimension of all activations (alone, or times the tokens).
        num_tokens: Padded length of the batch.
        report: Called with ``(name, use, output)`` for each use.

    Raises:
        UnseenUseError: In the forward pass, for any other operation on such a parameter, or another layout of the
            batch.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        num_samples: int,
        num_tokens: int,
        report: Callable[[str, Use, Tensor], None],
    ) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._kept = list(parameters.values())  # ids stay theirs
        self._num_samples = num_samples
        self._num_tokens = num_tokens
        self._report = report
        self.roots: list[Tensor] = []
        """Embeddings of the last forward pass: where the graph begins."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            return self._embedding(args, kwargs)
        if not any(id(value) in self._names for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if OPERATIONS.get(func) == "pass":
            return func(*args, **kwargs)
        roles = _ROLES.get(func)
        if roles is None:
            raise UnseenUseError(resolve_name(func) or repr(func))
        given = dict(zip(roles.names, args, strict=False)) | kwargs
        used = {key: self._names[id(value)] for key, value in given.items() if id(value) in self._names}
        if given.keys() - set(roles.names) or set(used) - roles.uses.keys():
            raise UnseenUseError(resolve_name(func) or repr(func))
        positional = [value.detach() if id(value) in self._names else value for value in args]
        named = {key: value.detach() if id(value) in self._names else value for key, value in kwargs.items()}
        output = func(*positional, **named)
        for key, name in used.items():
            kind, entered = roles.uses[key](func, given)
            self._add(name, kind, entered, output)
        return output

    def _embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        ids, weight = given.pop("input"), given.pop("weight")
        name = self._names.get(id(weight))
        if self._num_samples > 1 and len(ids) == 1:
            ids = ids.expand(self._num_samples, *ids.shape[1:])  # positions, the same for all samples
        output = functional.embedding(ids, weight if name is None else weight.detach(), *args[2:], **given)
        if output.is_floating_point():
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            self.roots.append(output)
        if name is not None:
            self._add(name, "lookup", lambda: ids, output)
        return output

    def _add(self, name: str, kind: Kind, entered: Callable[[], Tensor], output: Tensor) -> None:
        if len(output) not in (self._num_samples, self._num_samples * self._num_tokens):
            raise UnseenUseError(f"{kind} over {len(output)} rows")
        self._report(name, Use(kind, entered, self._num_samples), output)


@dataclass(frozen=True)
class _Roles:
    """An operation's arguments, and what a parameter in one of them meets."""

    names: tuple[str, ...]
    uses: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[Kind, Callable[[], Tensor]]]]


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    detached = tensor.detach()
    return lambda: detached


def _normalised(func: Callable[..., Tensor], given: Mapping[str, Any]) -> Callable[[], Tensor]:
    """What the weight of a normalisation multiplies."""
    inputs, rest = given["input"].detach(), {key: given[key] for key in ("normalized_shape", "eps") if key in given}
    return lambda: func(inputs, **rest)


def _plain(kind: Kind, other: str) -> Callable[[Any, Mapping[str, Any]], tuple[Kind, Callable[[], Tensor]]]:
    return lambda func, given: (kind, _held(given[other]))


_LINEAR = _Roles(("input", "weight", "bias"), {"weight": _plain("linear", "input"), "bias": _plain("bias", "input")})
_ADDMM = _Roles(("input", "mat1", "mat2"), {"input": _plain("bias", "mat1"), "mat2": _plain("transposed", "mat1")})
_MUL = _Roles(("input", "other"), {"input": _plain("scale", "other"), "other": _plain("scale", "input")})
_NORM: dict[str, Any] = {"weight": lambda func, given: ("scale", _normalised(func, given))}
_ROLES: dict[Callable[..., Any], _Roles] = {
    functional.linear: _LINEAR,
    torch.addmm: _ADDMM,
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), _MUL),
    functional.layer_norm: _Roles(
        ("input", "normalized_shape", "weight", "bias", "eps"), _NORM | {"bias": _plain("bias", "input")}
    ),
    functional.rms_norm: _Roles(("input", "normalized_shape", "weight", "eps"), _NORM),
}
