"""Where each parameter is used in a forward pass, so that one batched pass yields the gradient of every sample.

An ordinary backward pass sums a parameter's gradient over the batch. For an operation that is linear in the parameter,
the gradient of one sample needs only what entered the operation and the gradient that came back, both of which one
batched pass has for all samples. `ParameterUses`, a ``TorchFunctionMode``, takes the parameters out of the graph and
remembers the inputs of each operation that used them. It follows a parameter through casts and ``1 + w``, which has
the gradient of ``w``, and, where one sample runs alone, through the choice of experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from agcl.attribution.operations import OPERATIONS
from agcl.attribution.pieces import Part
from agcl.attribution.roles import CASTS, FLIPS, GROUPED, ROLES, SUMS, Kind
from agcl.attribution.support import operation_name

_FORM = "_agcl_form"  # attribute of stand-ins and what is made of them, none of which outlives the pass


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
        experts: For a parameter that holds each expert's weights along its first dimension, the expert that each row of
            ``x`` met, shape (rows,) or (); None for other parameters.
    """

    kind: Kind
    inputs: Callable[[], Tensor]
    num_samples: int
    experts: Tensor | None = None

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

    def parts(self, indices: Sequence[int], upstream: Tensor) -> list[Part]:
        """The gradients of some samples by a matrix, in factors.

        Tokens before the first and after the last that anything came back to, padding among them, are left out.

        Args:
            indices: Of the samples.
            upstream: Gradient at the operation's output, whole batch.
        """
        arrived = self._by_sample(upstream)
        spans = [_span(flags) for flags in arrived.any(-1).tolist()]
        if self.kind == "lookup":
            ids = self.inputs().reshape(self.num_samples, -1)
            return [Part(ids[index, spans[index]], arrived[index, spans[index]]) for index in indices]
        entered = self._by_sample(self.inputs().to(upstream.dtype))
        left, right = (arrived, entered) if self.kind == "linear" else (entered, arrived)
        return [Part(left[index, spans[index]], right[index, spans[index]]) for index in indices]

    def _by_sample(self, tensor: Tensor) -> Tensor:
        """Of shape (batch, tokens, features)."""
        return tensor.reshape(self.num_samples, -1, tensor.shape[-1])

    def input_squares(self, like: Tensor) -> Tensor:
        """Sum over samples and tokens of the squared input that each weight entry meets, broadcastable to its shape.

        A bias meets 1; a row of an embedding meets 1 at each occurrence of its token (an embedding is a linear map of
        one-hot vectors). An expert's weights meet the tokens that are sent to it.
        """
        entered = self.inputs()
        if self.experts is not None:
            return self._squares_by_expert(entered.reshape(-1, entered.shape[-1]), self.experts, len(like))
        if self.kind == "lookup":
            return torch.bincount(entered.reshape(-1), minlength=len(like)).to(torch.float32)[:, None]
        if self.kind == "bias":
            return torch.tensor(float(entered.numel() // entered.shape[-1]), device=like.device)
        squares = entered.float().square()
        if self.kind == "scale":
            return squares.sum_to_size(like.shape)
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        return squares if self.kind == "linear" else squares[:, None]

    def _squares_by_expert(self, rows: Tensor, experts: Tensor, num_experts: int) -> Tensor:
        experts = experts.to(rows.device).expand(len(rows))
        if self.kind == "bias":
            return torch.bincount(experts, minlength=num_experts).to(torch.float32)[:, None]
        squares = rows.new_zeros((num_experts, rows.shape[-1]), dtype=torch.float32)
        squares.index_add_(0, experts, rows.float().square())
        return squares[:, None, :] if self.kind == "linear" else squares[:, :, None]


@dataclass(frozen=True)
class _Form:
    """How a tensor came from a parameter.

    Attributes:
        name: The parameter's.
        experts: Which entries of the parameter's first dimension the tensor holds, shape (rows,) or (); None: it is all
            there.
        is_flipped: Whether the last two dimensions have changed places.
    """

    name: str
    experts: Tensor | None = None
    is_flipped: bool = False


class ParameterUses(TorchFunctionMode):
    """Reports each use of the given parameters, which enter the operations as constants.

    Args:
        parameters: Name -> stand-in of a parameter during the forward pass; it gets an attribute.
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
        for name, parameter in parameters.items():
            setattr(parameter, _FORM, _Form(name))
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
        if not any(hasattr(value, _FORM) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if OPERATIONS.get(func) == "pass":
            return func(*args, **kwargs)
        if (form := self._made(func, args)) is not None:
            made = func(*map(_outside, args), **kwargs)
            setattr(made, _FORM, form)
            return made
        roles = ROLES.get(func)
        if roles is None:
            raise UnseenUseError(operation_name(func))
        given = dict(zip(roles.names, args, strict=False)) | kwargs
        used = {key: form for key, value in given.items() if (form := _form_of(value)) is not None}
        if given.keys() - set(roles.names) or used.keys() - roles.uses.keys():
            raise UnseenUseError(operation_name(func))
        output = func(*map(_outside, args), **{key: _outside(value) for key, value in kwargs.items()})
        for key, form in used.items():
            kind, entered = roles.uses[key](func, given)
            experts = _experts(func, form, given)
            if form.is_flipped:
                kind = "linear" if kind == "transposed" else "transposed"
            self._add(func, form, Use(kind, entered, self._num_samples, experts), given[key], output)
        return output

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...]) -> _Form | None:
        """What comes of a parameter, if a gradient of the result is one of the parameter."""
        form = _form_of(args[0]) if args else None
        if form is None:
            return None
        if func in CASTS or (func in SUMS and isinstance(args[-1], (int, float))):
            return form
        if self._num_samples > 1 or form.experts is not None:
            return None  # nobody knows which sample a row comes from that an expert gets
        if func is Tensor.__getitem__ and args[0].dim() > 1 and not form.is_flipped and _is_index(args[1]):
            return replace(form, experts=torch.as_tensor(args[1]))
        if func in FLIPS and args[0].dim() == 3 and args[1:] in ((-2, -1), (-1, -2), (1, 2)):
            return replace(form, is_flipped=not form.is_flipped)
        return None

    def _embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        ids, weight = given.pop("input"), given.pop("weight")
        if self._num_samples > 1 and len(ids) == 1:
            ids = ids.expand(self._num_samples, *ids.shape[1:])  # positions, the same for all samples
        output = functional.embedding(ids, _outside(weight), *args[2:], **given)
        if output.is_floating_point():
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            self.roots.append(output)
        if (form := _form_of(weight)) is not None:
            self._add(functional.embedding, form, Use("lookup", lambda: ids, self._num_samples), weight, output)
        return output

    def _add(self, func: Callable[..., Any], form: _Form, use: Use, parameter: Tensor, output: Tensor) -> None:
        num_rows = self._num_samples if output.dim() > 2 else self._num_samples * self._num_tokens
        if use.experts is not None:
            is_known = self._num_samples == 1 and _fits_experts(func, use, parameter)
        else:
            is_known = self._num_samples == 1 or len(output) == num_rows
            # A vector's gradient is summed over one sample's part of the output.
            is_known &= parameter.dim() < output.dim() if use.kind in ("scale", "bias") else parameter.dim() == 2
        if not is_known:
            raise UnseenUseError(f"{operation_name(func)} of shape {tuple(output.shape)}")
        self._report(form.name, use, output)


def _span(flags: list[bool]) -> slice:
    """From the first to the last that is set."""
    return slice(flags.index(True), len(flags) - flags[::-1].index(True)) if any(flags) else slice(0)


def _form_of(value: Any) -> _Form | None:
    return getattr(value, _FORM, None)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Tensor) and value.dtype == torch.int64)


def _outside(value: Any) -> Any:
    """The value; a parameter, or what was made of one, out of the graph."""
    return value.detach() if hasattr(value, _FORM) else value


def _experts(func: Callable[..., Any], form: _Form, given: Mapping[str, Any]) -> Tensor | None:
    """The expert that each row met."""
    if func is torch.bmm:  # one matrix product after the other, of an equal number of rows
        is_first = _form_of(given["input"]) is not None
        num_rows = given["mat2"].shape[2] if is_first else given["input"].shape[1]
        experts = torch.arange(len(given["input"])) if form.experts is None else form.experts
        return experts.repeat_interleave(num_rows)
    if func in GROUPED:
        ends = given["offs"]
        return torch.searchsorted(ends, torch.arange(len(given["mat_a"]), device=ends.device), right=True)
    return form.experts


def _fits_experts(func: Callable[..., Any], use: Use, parameter: Tensor) -> bool:
    """Whether the tensor holds a matrix or a bias for one expert, or for each row its own."""
    experts: Any = use.experts
    if experts.dim() and func is not torch.bmm and func not in (*GROUPED, *SUMS, Tensor.add_):
        return False
    dims = {"linear": 2, "transposed": 2, "bias": 1}.get(use.kind)
    return dims is not None and parameter.dim() == dims + experts.dim()
