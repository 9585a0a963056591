"""One forward pass of a causal language model on right-padded samples, recorded on stand-ins of its parameters.

The stand-ins share the parameters' storage, so that the user's ``.grad``, gradient hooks and ``requires_grad`` flags
are never involved.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from agcl.attribution.lrp import LRPContext, evaluation_mode, lrp_rules
from agcl.errors import AgclError, UnsupportedModelError

GradientRule = Literal["attnlrp", "cplrp", "none"]


@dataclass(frozen=True)
class Sample:
    """A prompt with its answer.

    Attributes:
        input_ids: Token ids of prompt and answer, shape ``(seq,)``, integer.
        positions: Indices of the logits that predict the answer, shape ``(k,)``, integer, in [0, seq). The logits at
            position ``p`` predict the token at ``p + 1``.
        targets: Token ids of the answer, shape ``(k,)``, integer, in [0, vocabulary).
        attention_mask: 1 for tokens and 0 for padding, shape ``(seq,)``; None if all are tokens.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None

    def check(self) -> None:
        """Raise if shapes, dtypes or ranges are wrong.

        Raises:
            AgclError: Naming the field.
        """
        for name, index in (("input_ids", self.input_ids), ("positions", self.positions), ("targets", self.targets)):
            if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
                raise AgclError(f"`{name}` is {index.dtype} of shape {tuple(index.shape)}; give a 1-D integer tensor.")
        mask = self.attention_mask
        if mask is not None and mask.shape != self.input_ids.shape:
            raise AgclError(
                f"`attention_mask` has shape {tuple(mask.shape)}, but the sample's `input_ids` "
                f"{tuple(self.input_ids.shape)}; give one value per token."
            )
        positions, targets = self.positions, self.targets
        if len(positions) != len(targets):
            raise AgclError(f"`positions` has {len(positions)} entries and `targets` {len(targets)}; one per target.")
        if not len(positions):
            raise AgclError("`positions` is empty; give at least one answer position.")
        low, high, length = int(positions.min()), int(positions.max()), len(self.input_ids)
        if low < 0 or high >= length:
            raise AgclError(f"`positions` runs from {low} to {high}, but must lie in [0, {length}).")
        if int(targets.min()) < 0:
            raise AgclError(f"`targets` holds {int(targets.min())}; give token ids, not masked labels.")


def selected_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to attribute.

    Args:
        model: The model.
        names: Names from ``model.named_parameters()``, or None for all that require a gradient.

    Returns:
        Name -> parameter, in the model's order.

    Raises:
        AgclError: If a name is unknown, a parameter is not floating point, or nothing is left.
    """
    known = dict(model.named_parameters())
    if names is None:
        selected = {name: parameter for name, parameter in known.items() if parameter.requires_grad}
    else:
        wanted = set(names)
        if unknown := sorted(wanted - known.keys()):
            raise AgclError(
                f"`parameters` names {unknown[0]!r}, which `{type(model).__name__}` does not have; use names from "
                "`model.named_parameters()` (tied weights go by their first name)."
            )
        selected = {name: parameter for name, parameter in known.items() if name in wanted}
    if not selected:
        raise AgclError("There is nothing to attribute: name some `parameters`, or let some require a gradient.")
    for name, parameter in selected.items():
        if not parameter.is_floating_point():
            raise AgclError(f"Parameter {name!r} is {parameter.dtype}; only floating-point parameters have relevance.")
    return selected


def make_stand_ins(model: nn.Module, selected: Iterable[str]) -> dict[str, Tensor]:
    """Parameters on the same storage: those selected require a gradient, the others do not, and none has hooks.

    Args:
        model: The model.
        selected: Names.

    Returns:
        Name -> stand-in, for those selected and those that require a gradient.

    Raises:
        UnsupportedModelError: If a parameter is sharded (DTensor).
    """
    selected = set(selected)
    stand_ins: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in selected or parameter.requires_grad:
            if type(parameter.data).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"Parameter {name!r} is sharded (DTensor); attribute before sharding or gather the model first."
                )
            stand_ins[name] = nn.Parameter(parameter.detach(), requires_grad=name in selected)
    return stand_ins


def answer_logits(model: nn.Module, stand_ins: dict[str, Tensor], samples: Sequence[Sample]) -> list[Tensor]:
    """Logits that predict the answers, from one forward pass with the stand-ins in place.

    Samples of different length are padded on the right, where no token of a causal model sees it: no mask is needed
    but for padding of their own.

    Args:
        model: A causal language model; its forward pass takes ``input_ids`` and returns ``logits``.
        stand_ins: As from :func:`make_stand_ins`.
        samples: At least one.

    Returns:
        For each sample logits at its ``positions``, shape ``(k, vocabulary)``.

    Raises:
        AgclError: If a sample is malformed or a target lies outside the vocabulary.
    """
    for sample in samples:
        sample.check()
    rows = [ordinary(sample.input_ids) for sample in samples]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = torch.cat([ordinary(sample.positions) for sample in samples]).to(input_ids.device).unique()
    accepted = accepted_arguments(model)
    options: dict[str, Any] = {}
    if any(sample.attention_mask is not None for sample in samples):
        masks = [_mask_of(sample) for sample in samples]
        options["attention_mask"] = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = positions
    logits = functional_call(model, stand_ins, (), {"input_ids": input_ids, **options}).logits
    if "logits_to_keep" not in accepted:
        logits = logits[:, positions]
    largest = max(int(sample.targets.max()) for sample in samples)
    if largest >= logits.shape[-1]:
        raise AgclError(f"`targets` holds {largest}, but the vocabulary has {logits.shape[-1]} tokens.")
    return [
        logits[index, torch.searchsorted(positions, ordinary(sample.positions).to(positions.device))]
        for index, sample in enumerate(samples)
    ]


def _mask_of(sample: Sample) -> Tensor:
    mask = torch.ones_like(sample.input_ids) if sample.attention_mask is None else ordinary(sample.attention_mask)
    return mask.long()  # one dtype for all


def target_logit(logits: Tensor, targets: Tensor) -> Tensor:
    """The objective that relevance explains: the sum of the targets' logits.

    Args:
        logits: Shape ``(k, vocabulary)``.
        targets: Token ids, shape ``(k,)``.

    Returns:
        Scalar.
    """
    return logits.gather(1, ordinary(targets).to(logits.device)[:, None]).sum()


def is_correct(logits: Tensor, targets: Tensor) -> bool:
    """Whether each target has the largest logit.

    Args:
        logits: Shape ``(k, vocabulary)``.
        targets: Token ids, shape ``(k,)``.
    """
    return bool((logits.argmax(-1) == targets.to(logits.device)).all())


@contextmanager
def recording() -> Iterator[None]:
    """Gradients on, whatever the caller has switched off; no autocast cache, which would outlive the stand-ins.

    Yields:
        None.
    """
    cache = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)


def rules_of(model: nn.Module, rule: GradientRule) -> AbstractContextManager[LRPContext | None]:
    """The context in which the forward pass runs.

    Args:
        model: The model.
        rule: One of LRP's rules, or ``"none"``: evaluation mode alone.

    Returns:
        A context manager.
    """
    return evaluation_mode(model) if rule == "none" else lrp_rules(model, rule)


@contextmanager
def innermost(model: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Let ``mode`` see the operations of the model's forward pass before the rules do.

    Enter it after the rules: the model's hooks run in the order of registration.

    Args:
        model: The model.
        mode: To be active while the forward pass runs.

    Yields:
        None.
    """
    is_active = False

    def enter(*_: Any) -> None:
        nonlocal is_active
        mode.__enter__()
        is_active = True

    def leave(*_: Any) -> None:
        nonlocal is_active
        if is_active:
            is_active = False
            mode.__exit__(None, None, None)

    first = model.register_forward_pre_hook(enter)
    last = model.register_forward_hook(leave, prepend=True, always_call=True)
    try:
        yield
    finally:
        leave()  # a KeyboardInterrupt passes by the hooks
        first.remove()
        last.remove()


def accepted_arguments(model: Any) -> set[str]:
    """Names that the forward pass takes; an adapter's wrapper passes on what it does not name.

    Args:
        model: A model of transformers or PEFT.

    Returns:
        Argument names.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    if hasattr(model, "get_base_model"):
        accepted |= set(inspect.signature(model.get_base_model().forward).parameters)
    return accepted


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can save: one made under ``torch.inference_mode`` is copied, others are as they are.

    Args:
        tensor: Any; int32 becomes int64.

    Returns:
        The tensor or its copy.
    """
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.long() if tensor.dtype == torch.int32 else tensor
