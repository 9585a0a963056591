"""What a check of a model found, the verdict, and both as plain text."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Verdict = Literal["supported", "supported with losses", "not supported"]

_WIDTH = 100
_NAME_WIDTH = 40
_NO_RULES = ", or an estimator that needs no rules, such as `GradientWeight`, `Fisher` or `MAS`."

ROUNDING = 4.0
"""Expected error, in machine epsilons of the dtype times the cancellation; 0.6 was the most over 20 families."""
MAX_EXPECTED_ERROR = 0.1
"""No larger error passes as rounding, however coarse the dtype."""
MAX_LOSS = 0.5
"""With a larger error, most of the answer is not accounted for."""


@dataclass(frozen=True)
class LayerBalance:
    """Relevance that comes into one layer and leaves it under CP-LRP, in the units of the logits.

    Attributes:
        name: Of the module; "embeddings" stands for what lies before the first block and between blocks, "head" for
            what follows the last.
        at_output: Relevance arriving at all that the layer computed for others; for the head, ``f`` itself.
        at_input: Relevance sent on to all that the layer took from others (hidden state, keys and values of another
            layer, embeddings); embeddings looked up within the layer count too, such as positions.
        additive: Relevance that ends in the layer: at biases, other parameters and constants that are added.
        lost: ``(at_output - at_input - additive) / |f|``; 0 if the layer conserves relevance.
        error: Absolute sum of ``lost`` from the head down to this layer.
    """

    name: str
    at_output: float
    at_input: float
    additive: float
    lost: float
    error: float


@dataclass(frozen=True)
class Uncovered:
    """An operation on activations without a rule.

    Attributes:
        operation: Name of the torch operation; for a value computed out of sight, of its ``grad_fn``.
        module: Name of the innermost module around it; empty for the model itself.
        module_class: Class of that module.
        count: How often it was met in one forward pass.
    """

    operation: str
    module: str
    module_class: str
    count: int


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`agcl.attribution.selfcheck.check_model` found; ``str()`` is a report of at most 100 columns.

    Attributes:
        model_class: Name of the model's class.
        dtype: The coarsest floating dtype among the parameters; it decides which errors are expected.
        num_parameters: Number of parameter entries, tied ones once.
        rule: Rules under which ``num_attributed`` and ``unreached`` were found.
        num_attributed: Entries of the parameters that the answer reaches.
        unreached: Names of floating-point parameters whose gradient under the rules, and hence relevance, is zero
            throughout, such as experts that no token was sent to.
        target: ``f``, the sum of the target logits; None if nothing was run.
        forward_difference: Largest absolute difference between logits inside and outside the rules; None if not run.
        forward_identical: Whether they are equal bit for bit, under both rule sets.
        logit_range: Largest minus smallest logit, to compare the difference with.
        conservation_error: ``|sum R(sources) - f| / |f|`` under CP-LRP; None if the passes could not be run.
        cancellation: ``sum |R(sources)| / |f|``, entry by entry: how much larger than ``f`` the summands are whose
            rounding errors make up most of the error.
        layers: Where relevance went, from the embeddings to the head; empty if no blocks were found.
        firings: Rule set -> rule -> how often it fired.
        uncovered: Operations on activations that no rule covers, all of them.
        refusals: Why ``lrp_rules`` refuses the model as a whole, with the remedy.
        failures: What went wrong while the rules were on, such as values that are not finite.
    """

    model_class: str
    dtype: torch.dtype
    num_parameters: int
    rule: str
    num_attributed: int = 0
    unreached: tuple[str, ...] = ()
    target: float | None = None
    forward_difference: float | None = None
    forward_identical: bool = False
    logit_range: float | None = None
    conservation_error: float | None = None
    cancellation: float | None = None
    layers: tuple[LayerBalance, ...] = ()
    firings: dict[str, dict[str, int]] = field(default_factory=dict)
    uncovered: tuple[Uncovered, ...] = ()
    refusals: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def expected_error(self) -> float:
        """Conservation error that rounding may cause: 4 machine epsilons times the cancellation, at most 0.1.

        float64 counts as float32, since the normalisation layers of many models compute in float32. For a prompt of 16
        tokens and the tokens that the model predicts, errors of 1e-9 to 5e-8 in float64 (1e-15 where nothing is cast),
        1e-8 to 4e-7 in float32 and 1e-3 to 1e-2 in bfloat16 were measured; more if ``f`` is small.
        """
        epsilon = max(torch.finfo(self.dtype).eps, torch.finfo(torch.float32).eps)
        return min(ROUNDING * epsilon * max(self.cancellation or 1.0, 1.0), MAX_EXPECTED_ERROR)

    @property
    def verdict(self) -> Verdict:
        """The findings in three words or less.

        ``"not supported"``: ``lrp_rules`` refuses the model or one of its operations, something failed, the logits
        inside and outside the rules differ by more than 4 machine epsilons of their range, or the conservation error
        is above 0.5. ``"supported with losses"``: the conservation error, or what one layer loses, is above
        ``expected_error``. ``"supported"``: neither.
        """
        if self._obstacles():
            return "not supported"
        return "supported with losses" if self._losses() else "supported"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is not ``"supported"``; empty if it is."""
        return (*self._obstacles(), *self._losses())

    def _obstacles(self) -> list[str]:
        found = [*self.refusals, *self.failures]
        if self.uncovered:
            found.append(
                f"No rule covers {self._places()}. Declare operations that are linear with "
                '`agcl.attribution.OPERATIONS[operation] = "linear"`; otherwise use a layer implementation in plain '
                f"torch operations{_NO_RULES}"
            )
        if self.forward_difference is not None and self.logit_range is not None:
            allowed = ROUNDING * torch.finfo(self.dtype).eps * self.logit_range
            if not self.forward_difference <= allowed:
                found.append(f"The rules change the logits by {self.forward_difference:.1e}, which they must not.")
        error = self.conservation_error
        if error is None and not found:
            found.append("The model could not be run under the rules, so that nothing more is known.")
        if error is not None and not error <= MAX_LOSS:
            loss = f"CP-LRP loses {error:.1e} of the relevance: an operation is treated wrongly.{self._worst()}"
            found.append(f"{loss} Use another layer implementation there{_NO_RULES}")
        return found

    def _losses(self) -> list[str]:
        error = self.conservation_error
        if error is None or error > MAX_LOSS:
            return []
        largest = max(error, *(abs(layer.lost) for layer in self.layers), 0.0)
        if largest <= self.expected_error:
            return []
        is_coarse = torch.finfo(self.dtype).bits < 32
        remedy = " Check it in float32 to tell rounding from a wrong rule." if is_coarse else ""
        return [f"CP-LRP loses {largest:.1e} of the relevance, more than rounding explains.{self._worst()}{remedy}"]

    def _places(self) -> str:
        found = (f"`{op.operation}` in `{_pattern(op.module) or 'model'}` ({op.module_class})" for op in self.uncovered)
        return ", ".join(dict.fromkeys(found))

    def _worst(self) -> str:
        if not self.layers:
            return ""
        layer = max(self.layers, key=lambda layer: abs(layer.lost))
        return f" Most of it is lost in `{layer.name}`."

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(check: ModelCheck) -> Iterator[str]:
    dtype = str(check.dtype).removeprefix("torch.")
    yield from _wrapped(f"{check.model_class} ({dtype}): {check.verdict}")
    share = f", of which the answer reaches {check.num_attributed:,} ({check.rule})" if check.firings else ""
    yield from _entry("Parameters", f"{check.num_parameters:,}{share}")
    if check.forward_difference is not None and check.logit_range is not None:
        same = "logits equal outside and inside the rules, bit for bit"
        other = (
            f"logits inside the rules differ by {check.forward_difference:.1e}, "
            f"{check.forward_difference / (check.logit_range or 1):.1e} of their range"
        )
        yield from _entry("Forward", same if check.forward_identical else other)
    if check.conservation_error is not None:
        yield from _entry(
            "Conservation",
            f"error {check.conservation_error:.1e} of f = {check.target:.4g} under CP-LRP; up to "
            f"{check.expected_error:.1e} is expected in {dtype}",
        )
    for rule, firings in check.firings.items():
        fired = ", ".join(f"{name} {count}" for name, count in sorted(firings.items()))
        yield from _entry(f"Rules, {rule}", fired or "none fired")
    if check.conservation_error is not None:
        yield from _layer_lines(check)
    if check.firings:
        yield from _list("Operations without a rule", _grouped_operations(check.uncovered))
        yield from _list("Parameters that the answer does not reach", _grouped_names(check.unreached))
    if check.reasons:
        yield from _list(f"Why {check.verdict}", list(check.reasons))


def _layer_lines(check: ModelCheck) -> Iterator[str]:
    if not check.layers:
        yield from _wrapped("No list of blocks that run one after the other was found: no account of the layers.")
        return
    width = min(max(len(layer.name) for layer in check.layers), _NAME_WIDTH)
    yield ""
    yield f"{'Relevance (CP-LRP)':{width}}  at output   at input   additive  lost here  lost so far"
    for layer in reversed(check.layers):
        name = layer.name if len(layer.name) <= width else "..." + layer.name[3 - width :]
        yield (
            f"{name:{width}} {layer.at_output:10.4g} {layer.at_input:10.4g} {layer.additive:10.4g} "
            f"{layer.lost:10.1e}  {layer.error:11.1e}"
        )


def _grouped_operations(operations: tuple[Uncovered, ...]) -> list[str]:
    """One line for the same operation in the same place of all layers."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for found in operations:
        counts[found.operation, _pattern(found.module) or "the model", found.module_class] += found.count
    return [f"{operation}: {count} x in {where} ({kind})" for (operation, where, kind), count in counts.items()]


def _grouped_names(names: tuple[str, ...]) -> list[str]:
    counts = Counter(map(_pattern, names))
    return [pattern if count == 1 else f"{pattern} ({count} tensors)" for pattern, count in counts.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _list(title: str, items: list[str]) -> Iterator[str]:
    yield ""
    yield f"{title}: {'none' if not items else ''}".rstrip()
    for item in items:
        yield from _wrapped(item, indent="  ")


def _entry(name: str, text: str) -> list[str]:
    return _wrapped(f"{name:15} {text}", hanging=" " * 16)


def _wrapped(text: str, indent: str = "", hanging: str = "    ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent or hanging)
