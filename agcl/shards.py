"""Gradients of weights that are split over processes (FSDP2), each consumed whole for a moment.

FSDP2 gathers a layer's weights for its forward and its backward pass and lets go of them after. Autograd leaves a
gradient at the gathered weight; there it is taken away before FSDP2 would average it over the processes, whose samples
are different ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agcl.errors import UnsupportedModelError
from agcl.ranks import Ranks


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, told without importing torch.distributed.tensor."""
    return hasattr(parameter, "device_mesh")


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of a model is split over processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; another tensor as it is."""
    whole: Any = tensor
    return whole.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, detached and whole; all processes gather a DTensor together."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if is_sharded(tensor) else whole


def check_layout(model: nn.Module) -> None:
    """Check that every process holds its rows of every parameter, as :class:`Ranks` counts them.

    Raises:
        UnsupportedModelError: If a parameter is split otherwise, or whole beside split ones.
    """
    from torch.distributed.tensor import Shard

    size = Ranks.of_this_run().size
    for name, parameter in model.named_parameters():
        sharded: Any = parameter
        if not is_sharded(parameter) or sharded.device_mesh.size() != size or sharded.placements != (Shard(0),):
            raise UnsupportedModelError(
                f"Parameter {name!r} is not split by rows over all {size} processes; attribution understands FSDP2 "
                "over a mesh of one dimension (`tensor_parallel_size: 1`), applied to the whole model."
            )


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on the processes, without the parameter."""

    mesh: Any
    placements: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of_part(self, part: Tensor) -> Tensor:
        """The DTensor of which ``part`` is this process's rows."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=self.stride,
        )


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Of the parameters that are split over processes, by name."""
    sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    return {name: Layout(p.device_mesh, p.placements, tuple(p.shape), p.stride()) for name, p in sharded.items()}


@contextmanager
def consuming(model: nn.Module, consume: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand over each parameter's gradient as soon as autograd has accumulated it; none is left behind.

    Args:
        model: Under FSDP2; forward and backward pass run inside.
        consume: Name, as in ``named_parameters``, to what is called with the whole parameter's gradient. The gradients
            of other parameters are dropped.

    Yields:
        None.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        own = {key: names[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in names}
        if own:
            owners[module] = own
    watched: dict[str, Any] = {}  # handles, by name; a tied parameter is gathered once

    def before_forward(module: nn.Module, args: Any) -> None:
        for key, name in owners[module].items():
            gathered = getattr(module, key)  # FSDP2 keeps one object, whatever its memory
            if name not in watched and gathered.requires_grad:
                watched[name] = gathered.register_post_accumulate_grad_hook(partial(_take, consume.get(name)))

    handles = [module.register_forward_pre_hook(before_forward) for module in owners]
    try:
        yield
    finally:
        for handle in (*handles, *watched.values()):
            handle.remove()


def _take(consume: Callable[[Tensor], None] | None, gathered: Tensor) -> None:
    gradient, gathered.grad = gathered.grad, None
    if gradient is not None and consume is not None:
        consume(gradient)
