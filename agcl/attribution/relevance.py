"""Relevance of parameters and tokens for the answers to samples.

The target is ``f = sum_k logits[0, positions[k], targets[k]]``; relevance is value times gradient under the rules of
``lrp.py`` (arXiv 2605.05285, Sec. 4.1).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agcl.attribution.lrp import Rule
from agcl.attribution.passes import (
    GradientRule,
    Sample,
    answer_logits,
    innermost,
    is_correct,
    make_stand_ins,
    recording,
    rules_of,
    selected_parameters,
    target_logit,
)
from agcl.attribution.pieces import PieceConsumer, SampleGradients
from agcl.attribution.uses import ParameterUses, UnseenUseError, Use
from agcl.errors import AgclError, UnsupportedModelError, check_choice
from agcl.shards import consuming, has_shards

Consumer = Callable[[str, Tensor, Tensor], None]
Choice = Callable[[list[bool]], list[bool]]
Objective = Callable[[Tensor, Tensor], Tensor]
Observer = Callable[[str, Use, Tensor], None]


def attribute_batch(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    consume: Consumer,
    rule: GradientRule = "attnlrp",
    parameters: Iterable[str] | None = None,
    only_correct: bool = True,
    per_sample: bool = True,
    objective: Objective = target_logit,
    choose: Choice | None = None,
    consume_pieces: PieceConsumer | None = None,
    observe: Observer | None = None,
) -> list[bool]:
    """Run samples forward and backward together and hand over each parameter's gradients as soon as they exist.

    A full set of gradients never exists: each is dropped when ``consume`` returns. Works under ``torch.no_grad``,
    ``torch.inference_mode`` and autocast, with adapters, with gradient checkpointing enabled and with gradient hooks on
    the parameters (which do not fire). The relevance of a parameter is ``parameter.detach() * gradient``.

    The gradient of each sample comes out of the one batched pass, from what each linear map, normalisation and
    embedding received and sent back. Where a model uses parameters in another way (experts), the samples are run one by
    one.

    Args:
        model: A causal language model; its forward pass takes ``input_ids`` and returns ``logits``.
        samples: At least one; padded on the right to one length, so choose samples of similar length. One that comes
            padded, on whichever side, has an attention mask.
        consume: Called with ``(name, parameter, gradient)``: name as in ``model.named_parameters()``, the model's own
            parameter and the gradient, same shape and dtype, which the callee may keep or change. Parameters that the
            objective does not reach are not reported. Order is that of the backward pass, for one parameter that of
            the samples.
        rule: ``"attnlrp"``, ``"cplrp"``, or ``"none"`` for the ordinary gradient.
        parameters: Names to attribute, whether they require a gradient or not; None means all that require one.
        only_correct: Attribute only samples whose every target the model predicts (largest logit).
        per_sample: Hand over a gradient per sample, or, if False, one of all samples' summed objectives, which is
            cheaper and no longer tells samples apart.
        objective: ``(logits (k, vocabulary), targets (k,)) -> scalar`` of one sample, whose gradient is taken.
        choose: Called after the forward pass with what would be attributed (a flag for each sample, in their order, all
            or some at a time); gives what is attributed in its place.
        consume_pieces: Called with ``(name, gradients)`` in the place of ``consume`` for each matrix of which the
            gradients of all attributed samples can be made a few rows at a time, see
            :class:`agcl.attribution.pieces.SampleGradients`.
        observe: Called, besides, with ``(name, use, upstream)`` for each use of an attributed parameter: what entered
            it, and the gradient that came back to its output, of the whole batch, zero for samples that are not
            attributed. Not called without ``per_sample``, and not where weights are split over processes.

    Returns:
        For each sample whether it was attributed; False if it was skipped as answered wrongly.

    Raises:
        AgclError: For malformed samples, targets outside the vocabulary, unknown rules or parameters.
        UnsupportedModelError: As raised by :func:`lrp_rules`; also for parameters that are split over processes
            (DTensor) in another way than FSDP2 does by rows; with ``observe``, for parameters that are used in a way in
            which samples cannot be told apart.
    """
    check_choice("rule", rule, GradientRule)
    if not samples:
        raise AgclError("`samples` is empty; give at least one.")
    attribution = _Attribution(
        model,
        selected_parameters(model, parameters),
        consume,
        rule,
        only_correct,
        objective,
        choose,
        consume_pieces,
        observe,
    )
    if has_shards(model):
        passes = [[sample] for sample in samples] if per_sample else [list(samples)]
        return [flag for part in passes for flag in attribution.of_shards(part)]
    if not per_sample or (len(samples) == 1 and observe is None):
        return attribution.of_sum(samples)
    try:
        return attribution.of_each(samples)
    except UnseenUseError as error:
        if observe is not None:
            raise UnsupportedModelError(
                f"`observe` cannot see what a parameter of `{type(model).__name__}` meets ({error}); leave it out, or "
                "leave such parameters out with `parameters`."
            ) from error
        return [flag for sample in samples for flag in attribution.of_sum([sample])]


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
    """:func:`attribute_batch` for one sample, given as a batch of one.

    Args:
        model: See :func:`attribute_batch`.
        input_ids: Token ids, shape ``(1, seq)``, integer.
        attention_mask: 1 for tokens and 0 for padding, shape ``(1, seq)``, or None.
        positions: Indices of the logits that predict the answer, shape ``(k,)``, integer, in [0, seq).
        targets: Token ids to attribute there, shape ``(k,)``, integer, in [0, vocabulary).
        consume: See :func:`attribute_batch`.
        rule: See :func:`attribute_batch`.
        parameters: See :func:`attribute_batch`.
        only_correct: See :func:`attribute_batch`.

    Returns:
        True if the sample was attributed, False if it was skipped as answered wrongly.

    Raises:
        AgclError: See :func:`attribute_batch`; also for a batch larger than one.
        UnsupportedModelError: See :func:`attribute_batch`.
    """
    sample = single_sample(input_ids, attention_mask, positions, targets)
    return attribute_batch(
        model, [sample], consume=consume, rule=rule, parameters=parameters, only_correct=only_correct
    )[0]


def single_sample(input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, targets: Tensor) -> Sample:
    """The sample in a batch of one.

    Args:
        input_ids: Token ids, shape ``(1, seq)``.
        attention_mask: Shape ``(1, seq)``, or None.
        positions: See :class:`Sample`.
        targets: See :class:`Sample`.

    Returns:
        The sample.

    Raises:
        AgclError: For other shapes.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise AgclError(f"`input_ids` has shape {tuple(input_ids.shape)}; give one sample, shape (1, seq).")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise AgclError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}; "
            "give one value per token."
        )
    sample = Sample(input_ids[0], positions, targets, None if attention_mask is None else attention_mask[0])
    sample.check()
    return sample


@dataclass(frozen=True)
class _Attribution:
    """What is attributed and how; see :func:`attribute_batch`."""

    model: nn.Module
    selected: dict[str, nn.Parameter]
    consume: Consumer
    rule: GradientRule
    only_correct: bool
    objective: Objective = target_logit
    choose: Choice | None = None
    consume_pieces: PieceConsumer | None = None
    observe: Observer | None = None

    def of_sum(self, samples: Sequence[Sample]) -> list[bool]:
        """Gradients of the samples' summed objectives."""
        with recording():
            stand_ins = make_stand_ins(self.model, self.selected)
            with rules_of(self.model, self.rule):
                logits = answer_logits(self.model, stand_ins, samples)
            flags, total = self._total(logits, samples)
            if total is None or not total.requires_grad:
                return flags  # none of the parameters is used in this forward pass
            leaves = [stand_ins[name] for name in self.selected]
            for leaf, (name, parameter) in zip(leaves, self.selected.items(), strict=True):
                leaf.register_post_accumulate_grad_hook(_consuming(name, parameter, self.consume))
            torch.autograd.backward(total, inputs=leaves)
        return flags

    def of_shards(self, samples: Sequence[Sample]) -> list[bool]:
        """:meth:`of_sum` where the weights are split over processes, all of which run this together.

        A selected parameter is shown to ``consume`` as it is, split; its gradient is whole.
        """
        consumers = {name: partial(self.consume, name, parameter) for name, parameter in self.selected.items()}
        with recording(), consuming(self.model, consumers):
            with rules_of(self.model, self.rule):
                logits = answer_logits(self.model, {}, samples)
            flags, total = self._total(logits, samples)
            if total is not None:
                torch.autograd.backward(total)
        return flags

    def of_each(self, samples: Sequence[Sample]) -> list[bool]:
        """Each sample's gradients, from one batched pass; raises UnseenUseError before anything is handed over."""
        kept: list[int] = []
        num_uses = dict.fromkeys(self.selected, 0)
        arrived: dict[str, list[tuple[Use, Tensor]]] = {name: [] for name in self.selected}

        def on_use(name: str, use: Use, output: Tensor) -> None:
            if output.requires_grad:
                num_uses[name] += 1
                output.register_hook(lambda upstream: on_gradient(name, use, upstream))

        def on_gradient(name: str, use: Use, upstream: Tensor) -> None:
            if self.observe is not None:
                self.observe(name, use, upstream)
            arrived[name].append((use, upstream))
            if len(arrived[name]) == num_uses[name]:
                hand_over(name)

        def hand_over(name: str) -> None:
            self._hand_over(name, arrived.pop(name), kept)

        with recording():
            stand_ins = make_stand_ins(self.model, self.selected)
            leaves = {name: stand_ins[name] for name in self.selected}
            length = max(len(sample.input_ids) for sample in samples)
            uses = ParameterUses(leaves, len(samples), length, on_use)
            with rules_of(self.model, self.rule), innermost(self.model, uses):
                logits = answer_logits(self.model, stand_ins, samples)
            flags, total = self._total(logits, samples)
            kept += [index for index, flag in enumerate(flags) if flag]
            if total is None or not total.requires_grad:
                return flags
            for name, leaf in leaves.items():
                leaf.register_hook(_refuse_unseen(name))
            with torch.no_grad():
                torch.autograd.backward(total, inputs=[*uses.roots, *leaves.values()])
                for name in [name for name, parts in arrived.items() if parts]:
                    hand_over(name)  # one of its uses was not reached
        return flags

    def _hand_over(self, name: str, parts: list[tuple[Use, Tensor]], kept: Sequence[int]) -> None:
        """Let one parameter's gradients be consumed, given its uses and what came back to them."""
        parameter = self.selected[name]
        is_matrix = parameter.dim() == 2 and all(use.kind in ("linear", "transposed", "lookup") for use, _ in parts)
        if self.consume_pieces is not None and is_matrix:
            by_use = [use.parts(kept, upstream) for use, upstream in parts]
            self.consume_pieces(name, SampleGradients(parameter.detach(), list(zip(*by_use, strict=True))))
            return
        for index in kept:
            gradient: Tensor | None = None
            for use, upstream in parts:
                gradient = use.add_gradient(gradient, parameter.detach(), index, upstream)
            if gradient is not None:
                self.consume(name, parameter, gradient)

    def _total(self, logits: list[Tensor], samples: Sequence[Sample]) -> tuple[list[bool], Tensor | None]:
        """Which samples are attributed, and the sum of their objectives."""
        pairs = [(row, sample.targets) for row, sample in zip(logits, samples, strict=True)]
        flags = [not self.only_correct or is_correct(*pair) for pair in pairs]
        if self.choose is not None:
            flags = self.choose(flags)
        terms = [self.objective(*pair) for pair, flag in zip(pairs, flags, strict=True) if flag]
        return flags, torch.stack(terms).sum() if terms else None


def _refuse_unseen(name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        raise UnsupportedModelError(
            f"Parameter {name!r} is used by an operation out of sight, so that samples cannot be told apart in a "
            "batch; attribute one sample at a time (batch size 1)."
        )

    return hook


def _consuming(name: str, parameter: nn.Parameter, consume: Consumer) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            consume(name, parameter, gradient)

    return hook


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
    selected = selected_parameters(model, parameters)
    found: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor, gradient: Tensor) -> None:
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

    sample = single_sample(input_ids, attention_mask, positions, targets)
    with recording():
        embedding_layer: nn.Module = find_embeddings()
        handle = embedding_layer.register_forward_hook(keep)
        try:
            with rules_of(model, rule):
                (logits,) = answer_logits(model, make_stand_ins(model, ()), [sample])
        finally:
            handle.remove()
        gradients = torch.autograd.grad(target_logit(logits, targets), embeddings[:1])
    return (embeddings[0].detach() * gradients[0]).sum(-1)[0]
