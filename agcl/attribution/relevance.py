"""Relevance of parameters and tokens for the answer to one sample.

The target is ``f = sum_k logits[0, positions[k], targets[k]]``; relevance is value times gradient under the rules of
``lrp.py`` (arXiv 2605.05285, Sec. 4.1). The backward pass works on stand-ins that share the parameters' storage, so the
user's ``.grad``, gradient hooks and ``requires_grad`` flags are never involved.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from agcl.attribution.lrp import LRPContext, Rule, evaluation_mode, lrp_rules
from agcl.attribution.support import check_choice
from agcl.errors import AgclError, UnsupportedModelError

GradientRule = Literal["attnlrp", "cplrp", "none"]
Consumer = Callable[[str, nn.Parameter, Tensor], None]


def attribute_sample(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor,
    targets: Tensor,
    consume: Consumer,
    rule: GradientRule = "attnlrp",
    parameters: Iterable[str] | None = None,
    only_correct: bool = True,
) -> bool:
    """Run one sample forward and backward and hand over each parameter's gradient of ``f`` as soon as it exists.

    A full set of gradients never exists: each is dropped when ``consume`` returns. Works under ``torch.no_grad``,
    ``torch.inference_mode`` and autocast, with adapters, with gradient checkpointing enabled and with gradient hooks on
    the parameters (which do not fire). The relevance of a parameter is ``parameter.detach() * gradient``.

    Args:
        model: A causal language model; its forward pass takes ``input_ids`` and ``attention_mask``, returns ``logits``.
        input_ids: Token ids, shape ``(1, seq)``, integer.
        attention_mask: 1 for tokens and 0 for padding, shape ``(1, seq)``, or None.
        positions: Indices of the logits that predict the answer, shape ``(k,)``, integer, in [0, seq). The logits at
            position ``p`` predict the token at ``p + 1``.
        targets: Token ids to attribute there, shape ``(k,)``, integer, in [0, vocabulary).
        consume: Called with ``(name, parameter, gradient)``: name as in ``model.named_parameters()``, the model's own
            parameter and the gradient, same shape and dtype, which the callee may keep or change. Parameters that
            ``f`` does not reach are not reported. Order is that of the backward pass.
        rule: ``"attnlrp"``, ``"cplrp"``, or ``"none"`` for the ordinary gradient.
        parameters: Names to attribute, whether they require a gradient or not; None means all that require one.
        only_correct: Attribute only if the model predicts every target (largest logit); skips the backward pass else.

    Returns:
        True if the sample was attributed, False if it was skipped as answered wrongly.

    Raises:
        AgclError: For a batch larger than one, wrong shapes or dtypes, empty or out-of-range positions, targets outside
            the vocabulary, unknown rules or parameters.
        UnsupportedModelError: As raised by :func:`lrp_rules`; also for sharded (DTensor) parameters.
    """
    check_choice("rule", rule, GradientRule)
    selected = _selected_parameters(model, parameters)
    with _recording():
        stand_ins = _stand_ins(model, selected)
        with _rules(model, rule):
            logits = _answer_logits(model, stand_ins, input_ids, attention_mask, positions, targets)
        if only_correct and not bool((logits.argmax(-1) == targets.to(logits.device)).all()):
            return False
        target_logit = _target_logit(logits, targets)
        if not target_logit.requires_grad:
            return True  # none of the parameters is used in this forward pass
        leaves = []
        for name, parameter in selected.items():
            leaf = stand_ins[name]
            leaf.register_post_accumulate_grad_hook(_consuming(name, parameter, consume))
            leaves.append(leaf)
        torch.autograd.backward(target_logit, inputs=leaves)
    return True


def parameter_relevance(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor,
    targets: Tensor,
    rule: Rule = "attnlrp",
    parameters: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Relevance of each parameter entry for the target logits of one sample: ``R(W) = W * df/dW`` under the rules.

    Implements Props. 4.2-4.3 of arXiv 2605.05285 in gradient-times-input form. Whether the model answers correctly is
    not asked.

    Args:
        model: A causal language model.
        input_ids: Token ids, shape ``(1, seq)``, integer.
        attention_mask: Shape ``(1, seq)``, or None.
        positions: Indices of the predicting logits, shape ``(k,)``, integer, in [0, seq).
        targets: Token ids whose logits are attributed, shape ``(k,)``, integer, in [0, vocabulary).
        rule: ``"attnlrp"`` or ``"cplrp"``.
        parameters: Names, as in ``model.named_parameters()``; None means all that require a gradient.

    Returns:
        Parameter name -> relevance, in the units of the logits, same shape, dtype and device as the parameter; zeros
        where ``f`` does not reach. Tied weights appear once, under their first name.

    Raises:
        AgclError: See :func:`attribute_sample`.
        UnsupportedModelError: See :func:`lrp_rules`.
    """
    check_choice("rule", rule, Rule)
    selected = _selected_parameters(model, parameters)
    found: dict[str, Tensor] = {}

    def keep(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        found[name] = gradient.mul_(parameter.detach())

    attribute_sample(
        model,
        input_ids,
        attention_mask,
        positions=positions,
        targets=targets,
        consume=keep,
        rule=rule,
        parameters=selected,
        only_correct=False,
    )
    return {name: found[name] if name in found else torch.zeros_like(p.detach()) for name, p in selected.items()}


def token_relevance(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor,
    targets: Tensor,
    rule: GradientRule = "attnlrp",
) -> Tensor:
    """Relevance of each input token for the target logits: embedding times gradient, summed over the width.

    Args:
        model: A causal language model with ``get_input_embeddings``.
        input_ids: Token ids, shape ``(1, seq)``, integer.
        attention_mask: Shape ``(1, seq)``, or None.
        positions: Indices of the predicting logits, shape ``(k,)``, integer, in [0, seq).
        targets: Token ids whose logits are attributed, shape ``(k,)``, integer, in [0, vocabulary).
        rule: ``"attnlrp"``, ``"cplrp"``, or ``"none"`` for the ordinary gradient times input.

    Returns:
        Shape ``(seq,)``, floating, in the units of the logits. Learned position embeddings are not counted.

    Raises:
        AgclError: See :func:`attribute_sample`; also if the model has no input embeddings.
        UnsupportedModelError: See :func:`lrp_rules`.
    """
    check_choice("rule", rule, GradientRule)
    find_embeddings: Any = getattr(model, "get_input_embeddings", None)
    if find_embeddings is None:
        raise AgclError(f"`{type(model).__name__}` has no `get_input_embeddings`; give a transformers or PEFT model.")
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        embeddings.append(output if output.requires_grad else output.requires_grad_())

    with _recording():
        embedding_layer: nn.Module = find_embeddings()
        handle = embedding_layer.register_forward_hook(keep)
        try:
            with _rules(model, rule):
                logits = _answer_logits(model, _stand_ins(model, {}), input_ids, attention_mask, positions, targets)
        finally:
            handle.remove()
        gradients = torch.autograd.grad(_target_logit(logits, targets), embeddings[:1])
    return (embeddings[0].detach() * gradients[0]).sum(-1)[0]


def conservation_error(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor,
    targets: Tensor,
) -> float:
    """How far CP-LRP is from conserving relevance on this model: a diagnostic of whether it is understood.

    Relevance enters at ``f`` and must come out at the embeddings (of tokens and of positions) and at the biases. Expect
    1e-6 in float32 and less in float64; a value near 1 says that an operation is treated wrongly.

    Args:
        model: A causal language model.
        input_ids: Token ids, shape ``(1, seq)``, integer.
        attention_mask: Shape ``(1, seq)``, or None.
        positions: Indices of the predicting logits, shape ``(k,)``, integer, in [0, seq).
        targets: Token ids whose logits are attributed, shape ``(k,)``, integer, in [0, vocabulary).

    Returns:
        ``|sum R(embeddings) + sum R(biases) - f| / |f|``, dimensionless. Biases are the parameters whose name ends in
        ``bias``; constants added elsewhere in the model are not accounted for.

    Raises:
        AgclError: See :func:`attribute_sample`.
        UnsupportedModelError: See :func:`lrp_rules`.
    """
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    with _recording():
        stand_ins = _stand_ins(model, biases)
        with lrp_rules(model, "cplrp") as context:
            context.keep_inputs = True
            logits = _answer_logits(model, stand_ins, input_ids, attention_mask, positions, targets)
            sources = [*context.inputs, *(stand_ins[name] for name in biases)]
        target_logit = _target_logit(logits, targets)
        gradients = torch.autograd.grad(target_logit, sources, allow_unused=True)
    total = sum(
        (source.detach().double() * gradient.double()).sum()
        for source, gradient in zip(sources, gradients, strict=True)
        if gradient is not None
    )
    return float(abs(total - target_logit.detach().double()) / target_logit.detach().double().abs())


@contextmanager
def _recording() -> Iterator[None]:
    """Gradients on, whatever the caller has switched off; no autocast cache, which would outlive the stand-ins."""
    cache = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)


def _rules(model: nn.Module, rule: GradientRule) -> AbstractContextManager[LRPContext | None]:
    return evaluation_mode(model) if rule == "none" else lrp_rules(model, rule)


def _consuming(name: str, parameter: nn.Parameter, consume: Consumer) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            consume(name, parameter, gradient)

    return hook


def _selected_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
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


def _stand_ins(model: nn.Module, selected: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters on the same storage: those selected require a gradient, the others do not, and none has hooks."""
    stand_ins: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in selected or parameter.requires_grad:
            if type(parameter.data).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"Parameter {name!r} is sharded (DTensor); attribute before sharding or gather the model first."
                )
            stand_ins[name] = nn.Parameter(parameter.detach(), requires_grad=name in selected)
    return stand_ins


def _answer_logits(
    model: nn.Module,
    stand_ins: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    targets: Tensor,
) -> Tensor:
    """Logits at ``positions``, shape ``(k, vocabulary)``, of one forward pass with the stand-ins in place."""
    _check_sample(input_ids, attention_mask, positions, targets)
    input_ids, positions = _ordinary(input_ids), _ordinary(positions).to(input_ids.device)
    accepted = _accepted_arguments(model)
    options: dict[str, Any] = {}
    if attention_mask is not None:
        options["attention_mask"] = _ordinary(attention_mask)
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = positions
    logits = functional_call(model, stand_ins, (), {"input_ids": input_ids, **options}).logits
    if "logits_to_keep" not in accepted:
        logits = logits[:, positions]
    if int(targets.max()) >= logits.shape[-1]:
        raise AgclError(f"`targets` holds {int(targets.max())}, but the vocabulary has {logits.shape[-1]} tokens.")
    return logits[0]


def _target_logit(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, _ordinary(targets).to(logits.device)[:, None]).sum()


def _check_sample(input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, targets: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise AgclError(f"`input_ids` has shape {tuple(input_ids.shape)}; give one sample, shape (1, seq).")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise AgclError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}; "
            "give one value per token."
        )
    for name, index in (("positions", positions), ("targets", targets)):
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise AgclError(f"`{name}` is {index.dtype} of shape {tuple(index.shape)}; give a 1-D integer tensor.")
    if len(positions) != len(targets):
        raise AgclError(f"`positions` has {len(positions)} entries and `targets` {len(targets)}; give one per target.")
    if not len(positions):
        raise AgclError("`positions` is empty; give at least one answer position.")
    length = input_ids.shape[1]
    if int(positions.min()) < 0 or int(positions.max()) >= length:
        raise AgclError(
            f"`positions` runs from {int(positions.min())} to {int(positions.max())}, but must lie in [0, {length})."
        )
    if int(targets.min()) < 0:
        raise AgclError(f"`targets` holds {int(targets.min())}; give token ids, not masked labels.")


def _accepted_arguments(model: Any) -> set[str]:
    """Names that the forward pass takes; an adapter's wrapper passes on what it does not name."""
    accepted = set(inspect.signature(model.forward).parameters)
    if hasattr(model, "get_base_model"):
        accepted |= set(inspect.signature(model.get_base_model().forward).parameters)
    return accepted


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can save: one made under ``torch.inference_mode`` is copied, others are as they are."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.long() if tensor.dtype == torch.int32 else tensor
