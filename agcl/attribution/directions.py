"""Importance of the directions in which a weight matrix can move, instead of its entries one by one.

A linear map ``z = W x`` answers an input ``x`` as before if its weights move by a ``dW`` with ``dW x = 0``. The entries
of ``dW`` say little about that, since inputs lie along no axis. So this looks at the inputs ``x_t`` of a task's rows,
each weighted by how much the answer's logits ``f`` rest on the map's output there, ``g_t = df/dz_t``:

    A = sum over rows and tokens of |g_t|^2 x_t x_t^T

A move of the weights by ``v u^T`` (``u`` of length 1) changes ``f`` at token ``t`` by ``(g_t v) (x_t u)``; its square,
summed over an orthonormal basis of outputs ``v`` and over the tokens, is ``u^T A u``. Where ``u`` is an axis, it is the
sensitivity of the weights of one input, token by token, summed over their column.

Others who protect inputs instead of single weights: orthogonal weights modification (Zeng et al., Nature Machine
Intelligence 2019, arXiv 1810.01256), gradient projection memory (Saha et al., ICLR 2021, arXiv 2103.09762), Adam-NSCL
(Wang et al., CVPR 2021, arXiv 2103.07113). They count all inputs alike, and the latter two close directions wholly.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from agcl.attribution.estimators import Evidence, PerSampleGradient
from agcl.attribution.passes import (
    GradientRule,
    Sample,
    answer_logits,
    innermost,
    make_stand_ins,
    recording,
    rules_of,
    selected_parameters,
)
from agcl.attribution.relevance import Observer, attribute_batch
from agcl.attribution.uses import ParameterUses, UnseenUseError, Use
from agcl.errors import AgclError, UnsupportedModelError

_ROUNDING = 1e-12  # of a squared gradient
_FREE = 1 / 255  # of a step held back, as little as 8 bits of importance can say of an entry
_PAIR = re.compile(r"\.lora_(embedding_)?[AB]\.")  # PEFT's names
_OF_PEFT = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)")  # PEFT's, too
_LEAST = 2.0**-20  # of the largest eigenvalue: below are rounding errors
Control = Literal["none", "shuffled", "flattened"]


def find_matrices(
    model: nn.Module,
    parameters: Sequence[str],
    sample: Sample,
    rule: GradientRule,
    pairs: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, bool]:
    """Find the parameters that are weight matrices of linear maps.

    Left out are embeddings, also where they are tied to the output's weights, everything that is no matrix, what a
    sample does not pass or that experts share out among tokens, and a LoRA pair: either of its matrices changes what
    the other's inputs do, and of the few inputs of the second none is left free.

    Args:
        model: A causal language model.
        parameters: Names to look among.
        sample: Any.
        rule: Under which the model will be seen.
        pairs: Of weights that are not looked at themselves, name -> that of the first matrix of a LoRA pair beside
            them, as from :func:`agcl.task_pairs.pairs_of`; they are found if the pair is two linear maps.

    Returns:
        Name -> whether it is used as ``x W``, W of shape (in, out), instead of ``x W^T``; none, if the model uses
        parameters in a way that is not known to be linear.

    Raises:
        UnsupportedModelError: As :func:`agcl.attribution.lrp.lrp_rules`.
    """
    kinds: dict[str, set[str]] = {}
    parameters = [name for name in parameters if not is_of_pair(name)]
    looked_at = [*parameters, *pairs.values(), *map(up_of, pairs.values())]
    if not looked_at:
        return {}

    def on_use(name: str, use: Use, output: Tensor) -> None:
        is_whole = use.experts is None and output.requires_grad
        kinds.setdefault(name, set()).add(use.kind if is_whole else "other")

    try:
        _run_forward(model, looked_at, [sample], rule, on_use)
    except UnseenUseError:
        return {}
    single = {name: kinds.get(name) for name in parameters}
    found = {name: kind == {"transposed"} for name, kind in single.items() if kind in ({"linear"}, {"transposed"})}
    for name, down in pairs.items():
        if kinds.get(down) == kinds.get(up_of(down)) == {"linear"}:
            beside = model.get_submodule(name.removesuffix(".base_layer.weight"))
            found[name] = bool(getattr(beside, "fan_in_fan_out", False))  # of the weights; a pair never is
    return found


def is_of_pair(name: str) -> bool:
    """Whether a parameter is one of a LoRA pair, by its name."""
    return bool(_PAIR.search(name))


def base_name(name: str) -> str:
    """What a parameter of a PEFT model, or what its adapter is beside, is called in the model without it."""
    return _OF_PEFT.sub("", name.removeprefix("base_model.model."))


def up_of(down: str) -> str:
    """The second matrix of a LoRA pair, by the first one's name."""
    return down.replace(".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class InputMoments:
    """What tasks ask of the directions of weight matrices' inputs; those of several tasks add up.

    Attributes:
        sums: Name -> ``A``, float32, shape (in, in), symmetric, positive semi-definite, not all zero.
        transposed: Name -> whether the matrix is used as ``x W``, W of shape (in, out), instead of ``x W^T``.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)

    def __add__(self, other: "InputMoments") -> "InputMoments":
        sums = dict(self.sums)
        for name, moment in other.sums.items():
            sums[name] = sums[name] + moment if name in sums else moment
        return InputMoments(sums, self.transposed | other.transposed)

    def normalised(self) -> "InputMoments":
        """Each ``A`` divided by its trace: in a sum, what it comes from then counts as much as any other."""
        return InputMoments({name: moment / moment.trace() for name, moment in self.sums.items()}, self.transposed)

    def by_base_name(self) -> "InputMoments":
        """The moments by the names that weights have in the model without an adapter, see :func:`base_name`."""
        return InputMoments(
            {base_name(name): moment for name, moment in self.sums.items()},
            {base_name(name): is_transposed for name, is_transposed in self.transposed.items()},
        )

    def to(self, device: torch.device | str) -> "InputMoments":
        """The moments on a device."""
        return InputMoments({name: moment.to(device) for name, moment in self.sums.items()}, self.transposed)

    def maps(
        self,
        plasticity: float = 0.8,
        sharpness: float = 4.0,
        control: Control = "none",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> dict[str, tuple[Tensor, bool]]:
        """How far each matrix may move in which direction, for :class:`agcl.gating.DirectionalGate`.

        Args:
            plasticity: See :func:`shares_kept`; the same however many tasks there were.
            sharpness: The same.
            control: ``"shuffled"``: the same shares in random directions; ``"flattened"``: their mean in all of them.
            seed: Of the random directions.
            device: Where the maps are to be, and are made, one after the other; beside the moments, if left out.

        Returns:
            Name -> ``V``, float32, shape (in, held), and whether the matrix is transposed: its step is mapped by
            ``P = I - V V^T``. Directions that may go more than 254/255 of their way are left out.

        Raises:
            AgclError: For another plasticity or sharpness, or moments that are not finite.
        """
        if not 0 < plasticity < 1:
            raise AgclError(f"`plasticity` is {plasticity}; choose a number between 0 and 1.")
        if not 0 < sharpness < math.inf:
            raise AgclError(f"`sharpness` is {sharpness}; choose a finite number above 0.")
        found = {}
        for name, moment in self.sums.items():
            if not moment.isfinite().all():  # nothing would be held
                raise AgclError(f"The moments of the inputs of `{name}` are not finite; compute them anew.")
            there = moment if device is None else moment.to(device)
            shares, directions = shares_kept(there, plasticity, sharpness)
            held = 1 - shares
            if control == "flattened":
                held, directions = held.mean().expand(len(held)), torch.eye(len(held), device=held.device)
            counts = held >= _FREE
            held, directions = held[counts], directions[:, counts]
            if control == "shuffled":
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                directions = torch.linalg.qr(torch.randn(directions.shape, generator=generator)).Q.to(held.device)
            found[name] = directions * held.sqrt(), self.transposed[name]
        return found


class MomentSums:
    """Adds up ``A`` of each matrix while backward passes come by.

    Weights that have a LoRA pair beside them need not be looked at themselves, and may be quantised: the first matrix
    ``A`` of the pair meets the same inputs, and the same gradient arrives at the second, but for the pair's scale.

    Args:
        transposed: The matrices, as from :func:`find_matrices`.
        pairs: As for :func:`find_matrices`: those of ``transposed`` that are seen by their pairs.
        weighted: If not, every input on which the objective rests at all counts alike.
        home: Where the sums are held; beside the inputs, if left out.
    """

    def __init__(
        self,
        transposed: Mapping[str, bool],
        pairs: Mapping[str, str] = MappingProxyType({}),
        *,
        weighted: bool = True,
        home: torch.device | None = None,
    ) -> None:
        self._transposed, self._weighted, self._home = transposed, weighted, home
        self._downs = {down: name for name, down in pairs.items() if name in transposed}
        self._ups = {up_of(down): name for down, name in self._downs.items()}
        self._at_ups: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def parameters(self) -> list[str]:
        """What is to be observed."""
        by_pair = self._ups.values()
        return [*(name for name in self._transposed if name not in by_pair), *self._downs, *self._ups]

    def observe(self, name: str, use: Use, upstream: Tensor) -> None:
        """One use of a parameter, see :func:`agcl.attribution.attribute_batch`."""
        if name in self._ups:
            self._at_ups[self._ups[name]] = _squares(upstream)  # a backward pass comes to the first matrix next
        elif name in self._downs:
            self._add(self._downs[name], use, self._at_ups.pop(self._downs[name]))
        elif name in self._transposed:
            self._add(name, use, _squares(upstream))

    def _add(self, name: str, use: Use, weight: Tensor) -> None:
        # Padding, and rows that are answered wrongly, have none; rounding errors are no reason to count alike.
        counts = (weight > weight.max() * _ROUNDING).nonzero().flatten()
        inputs = use.inputs()
        rows = inputs.reshape(-1, inputs.shape[-1])[counts].float()
        with torch.autocast(rows.device.type, enabled=False):
            moment = (rows * weight[counts, None] if self._weighted else rows).T @ rows
        moment = moment if self._home is None else moment.to(self._home)
        self._sums[name] = self._sums[name].add_(moment) if name in self._sums else moment

    def moments(self) -> InputMoments:
        """The sums, but of matrices that the objective does not rest on; they are given up here."""
        sums = {name: moment for name, moment in self._sums.items() if moment.any()}
        self._sums = {}
        return InputMoments(sums, {name: self._transposed[name] for name in sums})


def _squares(upstream: Tensor) -> Tensor:
    """Of each token, the squared length of its gradient."""
    return upstream.reshape(-1, upstream.shape[-1]).float().square().sum(1)


def input_moments(evidence: Evidence, estimator: PerSampleGradient, sums: MomentSums) -> InputMoments:
    """``A`` of each matrix: second moments of its inputs, weighted by the squared gradient at its outputs.

    Args:
        evidence: Model and rows; ``num_used`` is set.
        estimator: Whose objective's gradient is taken, under its rules.
        sums: Fresh.

    Returns:
        The moments; of no matrix, if no row is used.
    """
    observed = replace(evidence, parameters=sums.parameters(), per_sample=True, observe=sums.observe)
    estimator.visit(observed, consume=lambda *_: None, consume_pieces=lambda *_: None)
    evidence.num_used = observed.num_used
    return sums.moments()


def is_seen(model: nn.Module, parameters: Sequence[str], sample: Sample, estimator: PerSampleGradient) -> bool:
    """Whether :class:`MomentSums` can observe the passes in which an estimator scores all of these parameters.

    Args:
        model: A causal language model.
        parameters: Their names.
        sample: Any.
        estimator: The estimator.
    """
    try:
        attribute_batch(
            model,
            [sample, sample],
            consume=lambda *_: None,
            consume_pieces=lambda *_: None,
            rule=estimator.rule,
            parameters=parameters,
            only_correct=False,
            observe=lambda *_: None,
        )
    except UnsupportedModelError:
        return False
    return True


def _run_forward(
    model: nn.Module, parameters: Sequence[str], samples: list[Sample], rule: GradientRule, on_use: Observer
) -> None:
    """Report each use of the parameters; raises UnseenUseError."""
    selected = selected_parameters(model, parameters)
    stand_ins = make_stand_ins(model, selected)
    length = max(len(sample.input_ids) for sample in samples)
    uses = ParameterUses({name: stand_ins[name] for name in selected}, len(samples), length, on_use)
    with recording(), rules_of(model, rule), innermost(model, uses):
        answer_logits(model, stand_ins, samples)


def shares_kept(moment: Tensor, plasticity: float, sharpness: float = 4.0) -> tuple[Tensor, Tensor]:
    """How far weights may move in each direction: ``p_i = 1 / (1 + (a_i / c) ** sharpness)``, ``a_i`` of ``A``.

    Args:
        moment: ``A``, shape (in, in), symmetric, positive semi-definite, not all zero; ``a_i`` are its eigenvalues.
        plasticity: Mean of ``p``, which decides ``c``; in (0, 1). The mean is larger where more directions than that
            are not used at all.
        sharpness: Above 0: how sharply the shares part directions that matter more than ``c`` from those that matter
            less. At 1 most directions are held back a little, at 4 few lie between free and held: the same budget then
            protects more, and less is to be multiplied with.

    Returns:
        ``p``, shape (in,), float32, in (0, 1], the most important direction last; the directions, columns of a
        tensor of shape (in, in), float32.
    """
    importance, directions = torch.linalg.eigh(moment.float())
    return shares_within(importance, plasticity, sharpness).to(directions), directions


def shares_within(importance: Tensor, plasticity: float, sharpness: float, least: float = _LEAST) -> Tensor:
    """``p_i = 1 / (1 + (a_i / c) ** sharpness)`` of any numbers ``a_i``; see :func:`shares_kept`.

    Args:
        importance: ``a``, of any shape, not all zero; what is below zero is a rounding error.
        plasticity: Mean of ``p``.
        sharpness: Above 0.
        least: Of the largest ``a``: ``c`` is not less.

    Returns:
        ``p``, float64, on the CPU.
    """
    importance = importance.cpu().double().clamp(min=0)  # a few numbers, asked many times: no device to wait for
    importance /= importance.max()

    def shares(log_c: float) -> Tensor:
        return 1 / (1 + (importance / 2.0**log_c) ** sharpness)

    low, high = math.log2(least), 200.0
    for _ in range(64):
        middle = (low + high) / 2
        if float(shares(middle).mean()) < plasticity:
            low = middle
        else:
            high = middle
    return shares(high)
