"""Does attribution understand this model? One short sample, both rule sets, and an account of what was met."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from agcl.attribution.checkreport import LayerBalance, ModelCheck, Uncovered
from agcl.attribution.lrp import Rule, check_free, evaluation_mode, in_force
from agcl.attribution.observing import Flow, ObservingContext, find_blocks
from agcl.attribution.passes import accepted_arguments, make_stand_ins, ordinary, recording
from agcl.attribution.relevance import single_sample
from agcl.attribution.support import refusals
from agcl.errors import AgclError, UnsupportedModelError, check_choice, one_line

_PROMPT_TOKENS = 16
_ANSWER_TOKENS = 4
_SEED = 0
_RULES: tuple[Rule, ...] = ("attnlrp", "cplrp")


def check_model(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    targets: Tensor | None = None,
    rule: Rule = "attnlrp",
) -> ModelCheck:
    """Check on one sample whether attribution understands a model.

    Runs the model without rules, under AttnLRP and under CP-LRP, in the model's own dtype and on its device. Under
    CP-LRP relevance is conserved: ``f``, the sum of the target logits, equals the relevance of the embeddings plus that
    of everything added to activations on the way (biases, position parameters, constants), for the whole model and for
    each block. An operation treated wrongly shows as relevance lost in its block. Operations without a rule do not end
    the check; all are listed, while ``lrp_rules`` goes on refusing the first. The model is left as it was.

    Args:
        model: A causal language model; its forward pass takes ``input_ids`` and returns ``logits``.
        input_ids: Token ids, shape ``(1, seq)``, integer. None draws 16 tokens from the vocabulary, the same each time.
        attention_mask: 1 for tokens and 0 for padding, shape ``(1, seq)``, or None.
        positions: Indices of the logits that predict the answer, shape ``(k,)``, integer; None means the last 4.
        targets: Token ids whose logits are attributed, shape ``(k,)``; None means those that the model predicts.
        rule: Rules under which to look for parameters that the answer does not reach.

    Returns:
        The findings; ``print`` shows them as text, ``verdict`` sums them up.

    Raises:
        AgclError: If ``rule`` is unknown, ``model`` is no module or has no token embeddings to draw a prompt for, the
            sample does not fit it, rules are on already, or the output has no ``logits``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> check_model(LlamaForCausalLM(config)).verdict
        'supported'
    """
    check_choice("rule", rule, Rule)
    parameters = dict(getattr(model, "named_parameters", dict)())
    floating = {name: parameter for name, parameter in parameters.items() if parameter.is_floating_point()}
    check = ModelCheck(
        model_class=type(model).__name__,
        dtype=_coarsest_dtype(floating.values()),
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        rule=rule,
        refusals=tuple(refusals(model)),
    )
    if check.refusals:
        return check
    check_free(model)
    with recording():
        try:
            return _checked(check, model, floating, input_ids, attention_mask, positions, targets)
        except UnsupportedModelError as refusal:
            return replace(check, refusals=(str(refusal),))


def conservation_error(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: Tensor,
    targets: Tensor,
) -> float:
    """How far CP-LRP is from conserving relevance on this model; :func:`check_model` says where it is not.

    Expect 1e-6 in float32 and less in float64; a value near 1 says that an operation is treated wrongly.

    Args:
        model: See :func:`check_model`.
        input_ids: See :func:`check_model`.
        attention_mask: See :func:`check_model`.
        positions: See :func:`check_model`.
        targets: See :func:`check_model`.

    Returns:
        ``|sum R(sources) - f| / |f|``, dimensionless; sources are the embeddings and all that is added on the way.

    Raises:
        AgclError: See :func:`check_model`.
        UnsupportedModelError: If the rules do not cover the model.
    """
    check = check_model(model, input_ids, attention_mask, positions=positions, targets=targets)
    if check.conservation_error is None or check.uncovered or check.refusals:
        raise UnsupportedModelError(check.reasons[0])
    return check.conservation_error


def _checked(
    check: ModelCheck,
    model: nn.Module,
    floating: dict[str, nn.Parameter],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    targets: Tensor | None,
) -> ModelCheck:
    input_ids = _random_prompt(model) if input_ids is None else ordinary(input_ids)
    positions = _answer_positions(input_ids, attention_mask, positions, targets)
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = ordinary(attention_mask)
    outputs: list[Tensor] = []
    with evaluation_mode(model):
        # The parameters require a gradient here too: kernels may be chosen by that.
        stand_ins = make_stand_ins(model, floating)
        name, blocks = find_blocks(model, lambda: outputs.append(_logits(model, stand_ins, inputs).detach()))
    plain = outputs[0]
    sample = (inputs, positions, _targets(plain[0, positions], targets))
    passes = [_observe(model, rule, blocks, floating if rule == check.rule else {}, sample) for rule in _RULES]
    main, conserving = passes[_RULES.index(check.rule)], passes[_RULES.index("cplrp")]
    inside = [found.logits for found in passes if found.logits is not None]
    check = replace(
        check,
        target=conserving.target,
        num_attributed=sum(floating[name].numel() for name in main.reached),
        unreached=tuple(name for name in floating if name not in main.reached) if not main.failures else (),
        forward_difference=max((float((logits - plain).abs().max()) for logits in inside), default=None),
        forward_identical=len(inside) == len(passes) and all(torch.equal(logits, plain) for logits in inside),
        logit_range=float(plain.max() - plain.min()),
        firings={found.context.rule: found.context.report() for found in passes},
        uncovered=_uncovered(passes),
        refusals=tuple(dict.fromkeys(text for found in passes for text in found.context.refusals)),
        failures=tuple(dict.fromkeys(text for found in passes for text in found.failures)),
    )
    if conserving.failures or conserving.target is None:
        return check
    flows = conserving.context.mode.flows
    return replace(
        check,
        conservation_error=abs(_ending(flows) - conserving.target) / (abs(conserving.target) or math.inf),
        cancellation=_ending(flows, gross=True) / (abs(conserving.target) or math.inf),
        layers=tuple(_balances(flows, name, len(blocks), conserving.target)) if blocks else (),
    )


def _uncovered(passes: list["_Pass"]) -> tuple[Uncovered, ...]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for found in passes:
        counts |= found.context.mode.uncovered  # the larger count: both passes meet the same operations
    return tuple(Uncovered(*key, count) for key, count in counts.items())


@dataclass
class _Pass:
    """What one forward and backward pass under a rule set found."""

    context: ObservingContext
    logits: Tensor | None = None
    target: float | None = None
    reached: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


def _observe(
    model: nn.Module,
    rule: Rule,
    blocks: list[nn.Module],
    attributed: dict[str, nn.Parameter],
    sample: tuple[dict[str, Tensor], Tensor, Tensor],
) -> _Pass:
    found = _Pass(ObservingContext(model, rule, blocks))
    stand_ins = make_stand_ins(model, attributed)
    inputs, positions, targets = sample
    try:
        with in_force(found.context) as context:
            logits = _logits(model, stand_ins, inputs)
            sources = context.inputs
        found.logits = logits.detach()
        target = logits[0, positions, targets].sum()
        found.target = float(target.detach())
        leaves = [source for source in sources if source.is_leaf]
        for name in attributed:
            stand_ins[name].register_post_accumulate_grad_hook(partial(_take_note, found, name))
            leaves.append(stand_ins[name])
        torch.autograd.backward(target, inputs=leaves)
    except RuntimeError as error:  # e.g. a custom function without a backward pass, a value overwritten
        reason = one_line(error)
        found.failures.append(f"A pass under {rule} failed: {reason}")
    return found


def _take_note(found: _Pass, name: str, leaf: Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    if gradient is None:
        return
    if not gradient.isfinite().all():
        found.failures.append(f"The relevance of `{name}` is not finite.")
    if gradient.any():
        found.reached.add(name)


def _logits(model: nn.Module, stand_ins: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    options = {"use_cache": False} if "use_cache" in accepted_arguments(model) else {}
    output = functional_call(model, stand_ins, (), {**inputs, **options})
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise AgclError(f"The output of `{type(model).__name__}` has no `logits`; give a causal language model.")
    return logits


def _random_prompt(model: Any) -> Tensor:
    """16 token ids, shape (1, 16), without those of special meaning; fewer if the model takes fewer."""
    try:
        embeddings = model.get_input_embeddings()
        num_tokens, device = embeddings.weight.shape[0], embeddings.weight.device
    except (AttributeError, NotImplementedError):
        raise AgclError(
            f"`{type(model).__name__}` has no token embeddings to draw a prompt for; give `input_ids`."
        ) from None
    config = getattr(model, "config", None)
    special: set[Any] = set()
    for key, value in vars(config).items() if config else ():
        if key.endswith("_token_id"):
            special.update(value if isinstance(value, (list, tuple)) else [value])
    usual = [token for token in range(num_tokens) if token not in special] or [0]
    length = min(_PROMPT_TOKENS, getattr(config, "max_position_embeddings", None) or _PROMPT_TOKENS)
    drawn = torch.randint(len(usual), (1, length), generator=torch.Generator().manual_seed(_SEED))
    return torch.tensor(usual)[drawn].to(device)


def _answer_positions(
    input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, targets: Tensor | None
) -> Tensor:
    if positions is None and targets is not None:
        raise AgclError("`targets` is given without `positions`; give the indices of the logits that predict them.")
    if positions is None:
        length = input_ids.shape[-1]
        positions = torch.arange(max(length - _ANSWER_TOKENS, 0), length)
    single_sample(input_ids, attention_mask, positions, torch.zeros_like(positions) if targets is None else targets)
    return ordinary(positions).to(input_ids.device)


def _targets(logits: Tensor, targets: Tensor | None) -> Tensor:
    if targets is None:
        return logits.argmax(-1)
    if int(targets.max()) >= logits.shape[-1]:
        raise AgclError(f"`targets` holds {int(targets.max())}, but the vocabulary has {logits.shape[-1]} tokens.")
    return ordinary(targets).to(logits.device)


def _coarsest_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    return max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _ending(flows: list[Flow], *, gross: bool = False) -> float:
    """Relevance of all sources: what enters the model and what is added on the way."""
    return sum(flow.gross if gross else flow.relevance for flow in flows if flow.role in ("input", "additive"))


def _balances(flows: list[Flow], name: str, num_blocks: int, target: float) -> list[LayerBalance]:
    """One balance per layer, from the embeddings to the head."""
    head, embeddings = 2 * num_blocks, 0

    def row(place: int) -> int:
        return place if place % 2 or place == head else embeddings  # what lies between blocks counts as the latter

    at_output, at_input, additive = (defaultdict[int, float](float) for _ in range(3))
    at_output[head] = target
    for flow in flows:
        place, origin = row(flow.place), row(flow.origin)
        if flow.role == "crossing" and place != origin:
            at_output[origin] += flow.relevance
            at_input[place] += flow.relevance
        elif flow.role == "input":
            at_input[place] += flow.relevance
        elif flow.role == "additive":
            additive[place] += flow.relevance
    blocks = {2 * index + 1: f"{name}.{index}" for index in range(num_blocks)}
    names = {head: "head", embeddings: "embeddings", **blocks}
    scale = abs(target) or math.inf
    balances: list[LayerBalance] = []
    lost_so_far = 0.0
    for place in sorted(names, reverse=True):
        lost = (at_output[place] - at_input[place] - additive[place]) / scale
        lost_so_far += lost
        ends = at_output[place], at_input[place], additive[place]
        balances.append(LayerBalance(names[place], *ends, lost, abs(lost_so_far)))
    return balances[::-1]
