"""From the relevance of single samples to the importance of a task: scale, aggregate, normalise.

The paper (arXiv 2605.05285, Eqs. 10-12) scales each sample's relevance logarithmically, takes for every entry the mean
of its K largest values over the samples, and keeps the running maximum of that over the tasks, clipped at zero. The
steps for one task are here (`ImportanceConfig.paper`), beside the normalisations that carried more signal in this
project's measurements; `agcl.attribution.merging` goes over the tasks, `agcl.attribution.artefact` stores.

Importance is uint8 fixed point, ``value / 255``: one byte per weight, 0 and 1 exact, at most 1/510 off between; on
request uint16, ``value / 65535``.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import AgclError, check_choice
from ..ranks import ALONE, Ranks
from .accumulators import Accumulator, BlockMaximaMean, Mean, MeanOfSeen, TopKMean
from .levels import DTYPES, MAX_LEVEL, Bits
from .pieces import SampleGradients
from .quantiles import rank_steps, row_quantile

Sign = Literal["positive", "absolute"]
Normalisation = Literal["log", "rank", "quantile", "none"]
Scope = Literal["row", "tensor", "layer", "model"]
TopKMethod = Literal["exact", "blocks"]

_MODEL_SAMPLE_ENTRIES = 2**24
_TINY_RELEVANCE = 1e-30  # alpha / _TINY_RELEVANCE is still a finite float32
_CPU_CHUNK, _DEVICE_CHUNK = 2**18, 2**24  # entries: temporaries stay in cache; few kernel launches


@dataclass(frozen=True)
class ImportanceConfig:
    """How the relevance of many samples becomes one importance in [0, 1] per weight entry.

    The defaults are this project's choice; `paper` gives the settings of arXiv 2605.05285.

    Args:
        sign: ``"absolute"``: the magnitude of the relevance. ``"positive"``: signed through the mean, negative means
            are clipped to zero at the end (Eq. 12).
        normalisation: ``"log"``: each sample is log-scaled by `log_scale` before the mean, which then lies in [0, 1].
            ``"quantile"``: ``s / (s + q)`` with ``q`` the ``quantile`` of the non-zero scores of the scope.
            ``"rank"``: the fraction of the scope's entries that are strictly smaller. ``"none"``: scores that are in
            [0, 1] already (SPG) are taken as they are, larger ones as 1.
        scope: Entries that are compared with each other: a ``"row"`` (first dimension; a vector is one row), a
            ``"tensor"``, a ``"layer"`` (parameters that share the first number in their name: a decoder block; those
            without one are a layer of their own) or the whole ``"model"``. Not used by ``"log"``, whose scale is per
            tensor and sample, nor by ``"none"``.
        quantile: Where ``"quantile"`` gives the importance 1/2, in (0, 1).
        top_k: Number of largest values per entry that are averaged, None for the mean over all samples.
        top_k_method: ``"exact"`` keeps the K largest values of every entry, in time and memory that grow with K.
            ``"blocks"`` averages the maxima of K blocks of samples instead, at about the price of the plain mean; see
            `agcl.attribution.accumulators.BlockMaximaMean` for how the two differ.
        alpha: Steepness of the log scale, > 0.

    Raises:
        AgclError: If a value is not allowed; the message names the option and what is.
    """

    sign: Sign = "absolute"
    normalisation: Normalisation = "quantile"
    scope: Scope = "tensor"
    quantile: float = 0.9
    top_k: int | None = None
    top_k_method: TopKMethod = "blocks"
    alpha: float = 1e4

    def __post_init__(self) -> None:
        choices = {"sign": Sign, "normalisation": Normalisation, "scope": Scope, "top_k_method": TopKMethod}
        for option, kind in choices.items():
            check_choice(option, getattr(self, option), kind)
        if not 0 < self.quantile < 1:
            raise AgclError(f"`quantile` is {self.quantile}; choose a number between 0 and 1, both excluded.")
        if self.top_k is not None and self.top_k < 1:
            raise AgclError(f"`top_k` is {self.top_k}; choose a number of samples >= 1, or None for all of them.")
        if not 0 < self.alpha <= 1e6:
            raise AgclError(f"`alpha` is {self.alpha}; choose a number above 0, at most 1e6.")

    @classmethod
    def paper(cls) -> "ImportanceConfig":
        """The settings of arXiv 2605.05285: positive part, log scale, mean of the 8 largest."""
        return cls(sign="positive", normalisation="log", top_k=8, top_k_method="exact")


def log_scale(relevance: Tensor, alpha: float = 1e4) -> Tensor:
    """Compress relevance to [-1, 1]: ``sign(r) * log1p(alpha |r| / max|r|) / log1p(alpha)``.

    The paper says "log-scaled" only; the form is this project's choice.

    Args:
        relevance: Relevance of one parameter for one sample, any shape, floating point.
        alpha: Steepness, > 0.

    Returns:
        float32 tensor of the same shape. An all-zero tensor gives zeros; so, nearly, does one whose largest magnitude
        lies far below 1e-30, where float32 runs out.

    Example:
        >>> log_scale(torch.tensor([-1.0, 0.0, 0.01]), alpha=1e4)
        tensor([-1.0000,  0.0000,  0.5011])
    """
    return _log_scaled(relevance, _log_factor(relevance, alpha), alpha).copysign_(relevance)


def _log_factor(relevance: Tensor, alpha: float, ranks: Ranks = ALONE) -> Tensor:
    largest = torch.zeros((), device=relevance.device)
    if relevance.numel():
        low, high = relevance.aminmax()
        largest = torch.maximum(high, -low).float()
    return alpha / ranks.maximum(largest).clamp_min(_TINY_RELEVANCE)


def _log_scaled(relevance: Tensor, factor: Tensor, alpha: float) -> Tensor:
    """Unsigned log scale in fresh memory; ``factor`` is alpha / max|r| over the whole tensor."""
    return relevance.abs().float().mul_(factor).log1p_().mul_(1 / math.log1p(alpha))


class SampleAggregator:
    """Streams the relevance of samples into one score per weight entry (Eq. 10), parameter by parameter.

    Memory per weight entry: 4 bytes for the mean (float32), ``2 * top_k`` bytes for the exact top-K mean, 6 bytes for
    the one by blocks. Values kept for a top-K mean are float16 after log scaling, which is in [-1, 1] (rounding 5e-4
    relative), and bfloat16 for unscaled relevance, which spans more decades than float16 has (rounding 4e-3 relative,
    no worse than the uint8 that follows). They live on the relevance's device. An object serves one task.

    Args:
        config: Of which ``sign``, ``top_k``, ``top_k_method`` and, for the log scale, ``normalisation`` and ``alpha``
            matter here.
        num_planned: How many samples are to come, which ``top_k_method="blocks"`` must know; fewer or more may.
        ranks: The processes of which each takes in its part of every tensor, together; by default this one alone takes
            in all of it.

    Raises:
        AgclError: If it must know and does not.

    Example:
        >>> for method in ("exact", "blocks"):
        ...     aggregator = SampleAggregator(ImportanceConfig(top_k=2, top_k_method=method), num_planned=4)
        ...     for relevance in ([1.0, 0.0], [-3.0, 0.0], [2.0, 1.0], [0.0, 4.0]):
        ...         aggregator.update("weight", torch.tensor(relevance))
        ...     print(aggregator.aggregate())
        {'weight': tensor([2.5000, 2.5000])}
        {'weight': tensor([2.5000, 2.0000])}
    """

    def __init__(self, config: ImportanceConfig, num_planned: int | None = None, ranks: Ranks = ALONE) -> None:
        if config.top_k is not None and config.top_k_method == "blocks" and (num_planned is None or num_planned < 1):
            raise AgclError(
                f"`num_planned` is {num_planned}; `top_k_method` 'blocks' needs the number of samples to come, to "
                "cut them into blocks."
            )
        self.config = config
        self.num_samples = 0
        self._num_planned = num_planned
        self._ranks = ranks
        self._kept: dict[str, Accumulator] = {}
        self._shapes: dict[str, torch.Size] = {}

    @torch.no_grad()
    def update(self, name: str, relevance: Tensor) -> None:
        """Take in the relevance of one parameter for one sample; at most once per parameter and sample.

        Args:
            name: The parameter's name; parameters may come in any order.
            relevance: Floating point, the parameter's shape. Neither changed nor kept.

        Raises:
            AgclError: If the shape differs from the earlier samples'.
        """
        kept = self._accumulator(name, relevance)
        is_log = self.config.normalisation == "log"
        factor = _log_factor(relevance, self.config.alpha, self._ranks) if is_log else None
        start = 0
        for piece in relevance.detach().reshape(-1).split(_chunk_entries(relevance)):
            kept.add(start, self._value(piece, factor))
            start += len(piece)
        kept.next_sample()
        self.num_samples = max(self.num_samples, kept.count)

    @property
    def takes_pieces(self) -> bool:
        """Whether `update_batch` will do: the log scale asks for a sample's largest relevance before anything else."""
        return self.config.normalisation != "log"

    @torch.no_grad()
    def update_batch(
        self,
        name: str,
        gradients: SampleGradients,
        relevance: Callable[[Tensor, Tensor], Tensor],
        is_square: bool = False,
    ) -> None:
        """`update` for several samples of one matrix, whose gradients are made and scored piece by piece.

        Args:
            name: The parameter's name.
            gradients: The samples'.
            relevance: From some rows of the parameter and of a sample's gradient, which may be overwritten, to the
                relevance there; entry by entry, zero where the gradient is.
            is_square: Whether it is the gradient squared, which is added up without being written down first.

        Raises:
            AgclError: See `update`.
        """
        kept = self._accumulator(name, gradients.like)
        for rows, number, gradient in gradients.pieces(skips_zeros=kept.skips_zeros):
            if is_square and isinstance(rows, slice):
                kept.add_square(rows.start * gradient.shape[1], gradient.view(-1), number)
                continue
            value = relevance(gradients.like[rows], gradient)
            if self.config.sign == "absolute":
                value = value.abs_() if value is gradient else value.abs()
            if isinstance(rows, slice):
                kept.add(rows.start * gradient.shape[1], value.reshape(-1), number)
            else:
                kept.add_rows(rows, value)
        kept.next_sample(gradients.num_samples)
        self.num_samples = max(self.num_samples, kept.count)

    def pop(self, name: str) -> Tensor:
        """Score of one parameter; its memory is given up.

        The mean divides by ``num_samples``: a parameter that a sample did not reach (an expert not chosen) counts as
        zero there. The top-K mean is over the values seen, if those are fewer than K.

        Returns:
            float32 tensor of the parameter's shape, >= 0; in [0, 1] under log scaling, else in units of relevance.
        """
        score = self._kept.pop(name).score(self.num_samples)
        if self.config.sign == "positive":  # Eq. 12 clips after the maximum over the tasks; before it gives the same.
            score.clamp_min_(0)
        return score.view(self._shapes.pop(name))

    def aggregate(self) -> dict[str, Tensor]:
        """Scores of all parameters (`pop`); each one's memory is given up as soon as its score exists."""
        return {name: self.pop(name) for name in list(self._kept)}

    def _value(self, piece: Tensor, factor: Tensor | None) -> Tensor:
        """What is averaged: magnitude or signed value, log-scaled where a factor is given."""
        is_absolute = self.config.sign == "absolute"
        if factor is None:
            return piece.abs() if is_absolute else piece
        value = _log_scaled(piece, factor, self.config.alpha)
        return value if is_absolute else value.copysign_(piece)

    def _accumulator(self, name: str, relevance: Tensor) -> Accumulator:
        if name not in self._kept:
            self._kept[name] = self._new_accumulator(relevance.numel(), relevance.device)
            self._shapes[name] = relevance.shape
        if self._shapes[name] != relevance.shape:
            raise AgclError(
                f"Relevance of `{name}` has shape {tuple(relevance.shape)}, in earlier samples "
                f"{tuple(self._shapes[name])}; use one model throughout."
            )
        return self._kept[name]

    def _new_accumulator(self, size: int, device: torch.device) -> Accumulator:
        top_k, num_planned = self.config.top_k, self._num_planned
        if top_k is None:
            return Mean(size, device)
        dtype = torch.float16 if self.config.normalisation == "log" else torch.bfloat16
        if self.config.top_k_method == "exact" or num_planned is None:
            return TopKMean(size, device, top_k, dtype)
        if top_k >= num_planned:  # every sample is a block
            return MeanOfSeen(size, device)
        return BlockMaximaMean(size, device, top_k, dtype, num_planned)


def _chunk_entries(tensor: Tensor) -> int:
    return _CPU_CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK


@torch.no_grad()
def normalise(
    scores: dict[str, Tensor],
    config: ImportanceConfig,
    bits: Bits = 8,
    parts: "Parts | None" = None,
) -> dict[str, Tensor]:
    """Turn scores into importance in [0, 1], stored as fixed point rounded to nearest.

    Scores are sorted on the CPU, a tensor at a time. Scopes ``"layer"`` and ``"model"`` are exact up to 2^24 = 16.8
    million entries; larger ones are judged by a fixed pseudo-random sample of about that many, which places a rank
    with a standard error below ``0.5 / sqrt(2^24) = 1.3e-4`` (of the sampled non-zero entries, for the quantile), less
    than the step of uint8.

    Args:
        scores: Name to score, >= 0 and finite. **Consumed**: emptied, the tensors overwritten, so that no second
            full-precision copy of the model exists.
        config: Of which ``normalisation``, ``scope`` and ``quantile`` matter here. Under ``"log"`` scores are in [0,
            1].
        bits: 8 for uint8, 16 for uint16. Top-K scores of unscaled relevance are bfloat16 means, no finer than 8 bits.
        parts: Given if the scores are this process's parts of the tensors; all processes call this together.

    Returns:
        Name to uint8 or uint16 tensor of the same shape and device; `levels.dequantise` gives [0, 1]. A score of zero
        has importance zero. Of parts, see :class:`Parts`.

    Raises:
        AgclError: If a score is negative or not finite; the message names the parameter.
    """
    parts = parts or Parts(ALONE, {name: tuple(score.shape) for name, score in scores.items()})
    parts.check(scores)
    takes_as_is = config.normalisation in ("log", "none")
    yardsticks = {} if takes_as_is else _shared_yardsticks(scores, config, bits, parts)
    importance = {}
    for name in list(scores):
        score = parts.whole(name, scores.pop(name)).float().contiguous()
        rows = score.flatten(1) if config.scope == "row" and score.ndim > 1 else score.view(1, -1)
        if not score.numel():
            levels = rows.to(DTYPES[bits])
        elif takes_as_is:
            levels = _quantise(rows.clamp_(0, 1), bits)
        else:
            yardstick = yardsticks[name] if name in yardsticks else _yardstick(rows, config, bits)
            levels = _compare(rows, yardstick, config, bits)
        importance[name] = parts.kept(levels.view(score.shape))
    return importance


@dataclass(frozen=True)
class Parts:
    """Scores of which each process has its rows (see :mod:`agcl.ranks`).

    A tensor is gathered for the moment in which it is normalised, one after the other, since its entries are compared
    with each other.

    Attributes:
        ranks: The processes.
        shapes: Of the whole tensors.
        keeps_whole: Whether every process is to get all importance, or its own rows.
    """

    ranks: Ranks
    shapes: Mapping[str, tuple[int, ...]]
    keeps_whole: bool = True

    def check(self, scores: Mapping[str, Tensor]) -> None:
        """Raise, in all processes, if a score is negative or not finite in one of them."""
        is_bad = [score.numel() > 0 and not _is_score(score) for score in scores.values()]
        device = next((score.device for score in scores.values()), torch.device("cpu"))
        found = self.ranks.total(torch.tensor(is_bad, dtype=torch.int32, device=device))
        for name, count in zip(scores, found.tolist(), strict=True):
            if count:
                raise AgclError(f"Score of `{name}` is negative or not finite; check the model's loss and precision.")

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor that a part belongs to."""
        return self.ranks.whole(part, self.shapes[name])

    def kept(self, whole: Tensor) -> Tensor:
        """What stays in this process."""
        # A copy: a view would keep all of it in memory.
        return whole if self.keeps_whole or self.ranks.size == 1 else self.ranks.part(whole).clone()


def _is_score(values: Tensor) -> bool:
    lowest, highest = values.aminmax()  # both are NaN where one value is
    return bool(lowest >= 0 and highest < torch.inf)


def _shared_yardsticks(
    scores: Mapping[str, Tensor], config: ImportanceConfig, bits: Bits, parts: Parts
) -> dict[str, Tensor]:
    """Name -> yardstick, where parameters are compared with each other; none for scopes within a tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    if config.scope in ("layer", "model"):
        for name, score in scores.items():
            groups.setdefault(layer_group(name) if config.scope == "layer" else "", {})[name] = score
    found: dict[str, Tensor] = {}
    for group in groups.values():
        found |= dict.fromkeys(group, _yardstick(_spread_sample(group, parts), config, bits))
    return found


def layer_group(name: str) -> str:
    """What scope ``"layer"`` compares a parameter with: those whose name is the same up to the first number.

    Example:
        >>> layer_group("model.layers.7.mlp.up_proj.weight"), layer_group("model.norm.weight")
        ('model.layers.7', 'model.norm.weight')
    """
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.)", name)
    return found[0] if found else name


def _yardstick(rows: Tensor, config: ImportanceConfig, bits: Bits) -> Tensor:
    """What the entries of a row are compared with: its quantile, (rows, 1), or its rank steps, (rows, steps)."""
    if config.normalisation == "rank":
        return rank_steps(rows, MAX_LEVEL[bits])
    return row_quantile(rows, config.quantile)


def _compare(rows: Tensor, yardstick: Tensor, config: ImportanceConfig, bits: Bits) -> Tensor:
    yardstick = yardstick.to(rows.device)
    if config.normalisation == "quantile":
        return _saturated(rows, yardstick, bits)
    num_below, num_steps = torch.searchsorted(yardstick, rows, out_int32=True), yardstick.shape[1]
    if num_steps < MAX_LEVEL[bits]:  # a step for each entry, not for each level
        # round(largest level * num_below / num_steps) in integers, halves up.
        doubled = num_below.long().mul_(2 * MAX_LEVEL[bits]).add_(num_steps)
        num_below = doubled.div_(2 * num_steps, rounding_mode="floor")
    return num_below.to(DTYPES[bits])


def _spread_sample(scores: Mapping[str, Tensor], parts: Parts) -> Tensor:
    """All entries, or one at random of each ``stride`` consecutive ones (jitter: no aliasing with the row length)."""
    stride = math.ceil(sum(math.prod(parts.shapes[name]) for name in scores) / _MODEL_SAMPLE_ENTRIES) or 1
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.empty(0)]
    for name, score in scores.items():
        flat = parts.whole(name, score).reshape(-1)
        if stride > 1:
            positions = torch.arange(0, len(flat), stride)
            positions += torch.randint(stride, positions.shape, generator=generator)
            flat = flat[positions[positions < len(flat)].to(flat.device)]
        pieces.append(flat.float().cpu())
    return torch.cat(pieces).view(1, -1)


def _saturated(rows: Tensor, yardstick: Tensor, bits: Bits) -> Tensor:
    """``s / (s + q)`` of each row with its q, as levels, in pieces that stay in the cache."""
    levels, chunk = torch.empty(rows.shape, dtype=DTYPES[bits], device=rows.device), _chunk_entries(rows)
    dim, length = (1, chunk) if len(rows) == 1 else (0, max(1, chunk // rows.shape[1]))
    quantiles = itertools.repeat(yardstick) if dim else iter(yardstick.split(length))
    for piece, out in zip(rows.split(length, dim), levels.split(length, dim), strict=True):
        value = piece + next(quantiles)
        out.copy_(_quantise(torch.div(piece, value, out=value), bits))
    return levels


def _quantise(values: Tensor, bits: Bits) -> Tensor:
    """As `levels.quantise` for what is in [0, 1] by construction; overwrites ``values`` instead of copying them."""
    return values.mul_(MAX_LEVEL[bits]).round_().to(DTYPES[bits])
