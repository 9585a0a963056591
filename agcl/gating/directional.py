"""The gate on the directions in which weight matrices move."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import AgclError
from .gate import parameters_of

Map = tuple[Tensor, bool]


class DirectionalGate:
    """Lets a weight matrix move less in the directions that matter: ``W <- W_old + (W_new - W_old) P``.

    ``P = I - V V^T``, with eigenvalues in [0, 1]: how far weights may move in each direction of their inputs, as
    ``(1 - importance)`` says of single weights in :class:`UpdateGate`. The columns of ``V`` are the directions that are
    held back, each as long as the root of the share that it is held back by. The whole step is mapped, momentum,
    preconditioning and weight decay included, for any optimizer, by a hook after its step. The optimizer's own state
    is not gated.

    A product with ``P`` costs ``2 held / in`` of a forward pass of as many tokens as the matrix has inputs. Where
    batches have fewer tokens than that, let several steps pass between two products: ``every``. Between them weights
    move freely; call `close` before they are read for good. Between steps, a copy of the gated matrices is held, in
    float32 at least.

    Args:
        named_parameters: Pairs as from ``model.named_parameters()``. The model is not kept alive.
        maps: Parameter name to ``V``, shape (in, held), and whether the weights have shape (in, out) instead of
            (out, in). Parameters without a map are not gated. Products have the dtype of ``V``: with bfloat16, where
            the device is fast at it, at most a few thousandths of a step pass in a direction that is closed.
        every: Steps of the optimizer from one product to the next.
        num_steps: Steps since the last product, and
        before: the matrices as they were then, by name: those of a gate that `state_dict` was asked of.

    Raises:
        AgclError: If a map has an unknown name or does not fit its parameter, or ``every`` is below 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        >>> second = torch.tensor([[0.0], [1.0]])  # nothing may change for inputs along the second axis
        >>> with DirectionalGate(model.named_parameters(), {"weight": (second, False)}).attach(optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        maps: Mapping[str, Map],
        every: int = 1,
        num_steps: int = 0,
        before: Mapping[str, Tensor] | None = None,
    ) -> None:
        if every < 1:
            raise AgclError(f"`every` is {every}; choose 1 or more steps.")
        known = {name: parameter for name, parameter in named_parameters if name in maps}
        for name, (held, is_transposed) in maps.items():
            if name not in known:
                raise AgclError(f"`{name}`: no parameter of that name; use the names of named_parameters().")
            width = known[name].shape[0 if is_transposed else -1]
            if known[name].dim() != 2 or held.dim() != 2 or len(held) != width:
                raise AgclError(
                    f"The map of `{name}` has shape {tuple(held.shape)}, but the parameter {tuple(known[name].shape)}."
                )
        self.every = every
        self._maps = dict(maps)
        self._references = {name: weakref.ref(parameter) for name, parameter in known.items()}
        self._num_steps = num_steps
        self._before = dict(before or {})
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer) -> Self:
        """Start gating the matrices that ``optimizer`` holds.

        Returns:
            The gate, so that ``with gate.attach(optimizer):`` gates for the duration of the block.

        Raises:
            AgclError: If the gate is attached already, or the optimizer holds none of the gated matrices.
        """
        if self._handles:
            raise AgclError("This DirectionalGate is attached already; call detach() first.")
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        gated = {name: parameter for name, parameter in self._matrices() if id(parameter) in held}
        if not gated:
            raise AgclError("The optimizer holds none of the gated matrices; build the gate from the model it trains.")
        self._before = {
            name: (self._before[name] if name in self._before else p.detach()).to(p.device, _wide(p), copy=True)
            for name, p in gated.items()
        }
        self._handles = [optimizer.register_step_post_hook(self._after_step)]
        return self

    def detach(self, *, closes: bool = True) -> None:
        """Stop gating; harmless if not attached.

        Args:
            closes: Whether what has moved since the last product is mapped first; not, if other weights were loaded
                since.
        """
        if self._handles and closes:
            self.close()
        self._num_steps = 0
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    @torch.no_grad()
    def close(self) -> None:
        """Map what has moved since the last product."""
        for name, parameter in self._matrices():
            if self._num_steps and (before := self._before.get(name)) is not None:
                held, is_transposed = self._maps[name]
                moved = (parameter - before).to(torch.promote_types(held.dtype, torch.float32))
                narrow = moved.to(held.dtype)
                moved -= held @ (held.T @ narrow) if is_transposed else (narrow @ held) @ held.T
                before += moved.to(before.dtype)
                parameter.copy_(before)
        self._num_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What goes into the constructor, ``maps`` aside, to go on from here."""
        # Narrow weights are rounded; what they were rounded from is gone on from, lest errors add up.
        parameters = dict(self._matrices())
        before = {n: b for n, b in self._before.items() if self._num_steps or b.dtype != parameters[n].dtype}
        return {"num_steps": self._num_steps, "before": before}

    def plasticity(self) -> dict[str, float]:
        """Mean eigenvalue of each gated matrix's ``P``, in [0, 1]; 0: frozen, 1: free."""
        return {name: 1 - float(held.float().square().sum() / len(held)) for name, (held, _) in self._maps.items()}

    def held(self) -> list[Tensor]:
        """The tensors held between steps, for counting memory."""
        return [held for held, _ in self._maps.values()] + list(self._before.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _matrices(self) -> list[tuple[str, nn.Parameter]]:
        pairs = [(name, reference()) for name, reference in self._references.items()]
        return [(name, parameter) for name, parameter in pairs if parameter is not None]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_steps += 1
        if self._num_steps >= self.every:
            self.close()


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
