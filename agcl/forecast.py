"""Memory and time of a run on paper: arithmetic on the number of weights, without a model.

Its figures were measured on CPUs (`docs/cost.md`), counted from what the code allocates, or are data-sheet values;
each constant says which. **Nothing was measured on a GPU.**

Bytes on each of ``r`` devices, ``s`` of which share the weights (1 under DDP, all of them under FSDP2)::

    kept      = (weights * w + trained * (g + o) + gated * i) / s + gathered + directions
    training  = kept + max(activations + casts, copy of the largest gated tensor)
    boundary  = kept + gated * a / r + moments + activations of the attributed batch
    peak      = max(training, boundary)

``w``, ``g``, ``o``, ``i``, ``a``: bytes of a weight (fewer of a quantised one), of its gradient (twice under DDP, whose
buckets are copies), of the optimizer's state, of its importance, and of its scores at a task boundary. ``gathered``,
FSDP2 alone: two layers' weights whole, the one in use and the next. ``moments``, where matrices are gated by direction:
4 bytes for each pair of a matrix's inputs; ``directions``: as many again, 2 (under ``bf16-mixed``) or 4 at most of the
maps, and the gated matrices as they were, in float32. Moments are in host memory where importance is.

Seconds::

    row          = max((4 * weights + 2 * trained) * tokens / flops, weights * 67 / bandwidth)
    training     = steps * micro_batches * max((4 * weights + 2 * trained) * rows * tokens / flops,
                                               weights * 67 / bandwidth) + steps * trained / s * 28 / bandwidth
    gate         = steps * gated / s * 29 / bandwidth
    directions   = steps * 2 * products / flops / steps from one product to the next
    own text     = the model's, written token by token and attributed
    attribution  = num_tasks * ceil(samples / r) * row * factor
    normalising  = num_tasks * gated * 8.9e-9

A pass over a token costs two operations per weight forward, two backward through a weight, two more for its gradient,
and not less than the weights' own way through memory. Attention's products (small for rows much shorter than the model
is wide), scoring, reading data, writing files and what single processes wait for each other are left out. Rows are
attributed one by one; in batches they take about two thirds. Left out as well: finding the directions of moments.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from agcl.errors import AgclError

Precision = Literal["32", "bf16-mixed", "bf16"]
Strategy = Literal["ddp", "fsdp"]

_WEIGHT_BYTES = {"32": 4, "bf16-mixed": 4, "bf16": 2}
# Bytes kept for the backward pass per token and layer, for each entry of the layer's width and of its inner width.
# Counted on a Llama with SDPA attention by `torch.autograd.graph.saved_tensors_hooks` (tests/test_forecast.py).
_ACTIVATION_BYTES = {"32": (40, 16), "bf16-mixed": (34, 8), "bf16": (24, 8)}
# Per entry of the answers' logits: as the model makes them, in float32, log-softmax and its gradient.
_LOGIT_BYTES = {"32": 16, "bf16-mixed": 14, "bf16": 14}
# A row's attribution relative to its forward and backward pass, 64 tokens, measured on a CPU.
_ATTRIBUTION_FACTOR = {"mean": 1.09, "blocks": 1.20, "exact": 2.36}
# Bytes read and written per weight, counted: by the update gate (copy 8, importance as float 9, blend 12); by AdamW
# (weight, gradient and two moments read, all but the gradient written).
_GATE_BYTES, _STEP_BYTES = 29, 28
# What forward and backward pass take however few the tokens are, as bytes at the bandwidth that the gate reaches:
# 0.28 s for 134.5M weights, extrapolated from rows of 24 and 64 tokens, measured on a CPU.
_PASS_BYTES = 67
_NORMALISING_SECONDS = 8.9e-9  # per score, sorted on the CPU: 1.2 s for 134.5M, measured
_GATE_COPY_ENTRIES = 2**26  # agcl.gating.slices: a slice is at least that on a GPU


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides memory and time.

    Attributes:
        weights: Number of all weights, tied ones once.
        trained: Number of those that require a gradient.
        gated: Number of those that get importance.
        largest: Number of entries of the largest gated tensor.
        layers: Number of decoder blocks.
        width: Size of the hidden state.
        inner: Width inside the MLP (of all experts that a token is sent to).
        vocabulary: Number of tokens.
        matrices: Number of weights that are gated by direction.
        squares: Sum over those matrices of their inputs squared.
        products: Multiplications of those matrices with their maps.
        quantised: Number of weights that are stored quantised.
        quantised_bytes: What those take, all together.
    """

    weights: int
    trained: int
    gated: int
    largest: int
    layers: int
    width: int
    inner: int
    vocabulary: int
    matrices: int = 0
    squares: int = 0
    products: int = 0
    quantised: int = 0
    quantised_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """One device.

    Attributes:
        name: What it is called.
        memory: Bytes; None: not compared with.
        flops: Sustained operations per second in matrix products, at 32 and at 16 bits.
        bandwidth: Sustained bytes per second of element-wise work.
        is_measured: Whether the speeds were measured by this project, or assumed from a data sheet.
    """

    name: str
    memory: int | None
    flops: tuple[float, float]
    bandwidth: float
    is_measured: bool = False


# Of a data sheet's speed, the share that is assumed to be reached: 38 to 43 % of the peak were in the training of
# Llama 3 405B on H100s, communication included (arXiv 2407.21783, Table 4); of the bandwidth, our guess.
_PEAK_SHARE, _BANDWIDTH_SHARE = 0.4, 0.7


def _from_data_sheet(name: str, gigabytes: int, teraflops: tuple[float, float], terabytes: float) -> Machine:
    flops = (teraflops[0] * 1e12 * _PEAK_SHARE, teraflops[1] * 1e12 * _PEAK_SHARE)
    return Machine(name, gigabytes * 10**9, flops, terabytes * 1e12 * _BANDWIDTH_SHARE)


MACHINES = {
    # docs/cost.md, 2 cores, float32: 2048 tokens of a 134.5M model in 9.11 s; the update gate in 0.12 s. bfloat16 was
    # not faster there.
    "cpu": Machine("CPU (2 cores)", None, (1.81e11, 1.81e11), _GATE_BYTES * 134.5e6 / 0.12, is_measured=True),
    "a100": _from_data_sheet("A100 80 GB", 80, (19.5, 312), 2.04),
    "h100": _from_data_sheet("H100 80 GB", 80, (67, 989), 3.35),
}


@dataclass(frozen=True)
class Settings:
    """How a run is set up.

    Attributes:
        precision: ``32``, ``bf16-mixed`` (32-bit weights, 16-bit products) or ``bf16`` (all in 16 bits).
        strategy: ``ddp``: every device has all weights. ``fsdp``: the weights, and all that is kept for each, are
            split over the devices (Lightning's ``ModelParallelStrategy``, or FSDP).
        devices: Number of them, all nodes together.
        state_bytes: Bytes of the optimizer's state per trained weight; AdamW with 32-bit weights: 8.
        gate: Whether there is one.
        importance_bytes: Kept between steps per gated weight: 1; with ``importance_bits: 16``, 2; the merges
            ``mean`` and ``probabilistic_or`` twice that and one more; the shuffled control one more.
        file_bytes: Of a gated weight in a task's importance file: 1; with ``importance_bits: 16``, 2.
        importance_on_host: Whether importance, and the moments that directions are found from, lie in host memory.
        aggregation: ``mean`` over samples, or the mean of the K largest, by ``blocks`` or ``exact``.
        top_k: K.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        directions_every: Steps from one product with the maps of directions to the next.
        own_text: Pieces of text that the model writes before the first task, where matrices are gated by direction.
        own_tokens: Tokens of each.
    """

    precision: Precision = "bf16-mixed"
    strategy: Strategy = "ddp"
    devices: int = 1
    state_bytes: float = 8
    gate: bool = True
    importance_bytes: int = 1
    file_bytes: int = 1
    importance_on_host: bool = False
    aggregation: Literal["mean", "blocks", "exact"] = "mean"
    top_k: int = 8
    gradient_checkpointing: bool = False
    directions_every: int = 1
    own_text: int = 0
    own_tokens: int = 64

    def __post_init__(self) -> None:
        for option, table in (("precision", _WEIGHT_BYTES), ("aggregation", _ATTRIBUTION_FACTOR)):
            if getattr(self, option) not in table:
                raise AgclError(f"`{option}` is {getattr(self, option)!r}; choose one of {', '.join(table)}.")
        if self.devices < 1:
            raise AgclError(f"`devices` is {self.devices}; a run needs at least one.")

    @property
    def shards(self) -> int:
        """In how many parts the weights are."""
        return self.devices if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        num_tasks: Number of tasks.
        steps: Optimizer steps, all tasks together.
        micro_batches: Batches of a step on each device (gradient accumulation).
        rows: Rows of a batch on each device.
        tokens: Tokens of a row, padding included; on average, for the time.
        longest: Tokens of the longest row, for the memory; None: ``tokens``.
        answer_tokens: Tokens of a row whose logits are computed.
        samples: Rows that a task's importance comes from.
        attributed_rows: Rows attributed together.
    """

    num_tasks: int
    steps: int
    micro_batches: int = 1
    rows: int = 16
    tokens: float = 128
    longest: int | None = None
    answer_tokens: int = 16
    samples: int = 16
    attributed_rows: int = 16


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        kept: Bytes on each device throughout, by what they are for.
        training: Further bytes on each device at a training step, by what they are for.
        boundary: Further bytes on each device at a task boundary.
        host: Bytes in the host memory of each device.
        seconds: By what is done.
        files: Bytes on disk of one checkpoint and of all importance files.
    """

    kept: dict[str, int] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)
    boundary: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that a device holds at once."""
        return sum(self.kept.values()) + max(max(self.training.values()), sum(self.boundary.values()))

    @property
    def total_seconds(self) -> float:
        """Of training and all task boundaries; scoring is not counted."""
        return sum(self.seconds.values())


def forecast(size: ModelSize, settings: Settings, work: Work, machine: Machine) -> Forecast:
    """Memory and time by the formula at the top of this module.

    Args:
        size: The model's.
        settings: Precision, strategy, devices, optimizer, gate.
        work: Tasks, steps and rows.
        machine: Its speeds; its memory does not matter here.

    Returns:
        Bytes and seconds.

    Example:
        >>> size = ModelSize(10**9, 10**9, 10**9, 2 * 10**8, layers=16, width=2048, inner=8192, vocabulary=10**5)
        >>> found = forecast(size, Settings("32"), Work(num_tasks=4, steps=1000), MACHINES["cpu"])
        >>> found.kept
        {'weights': 4000000000, 'gradients': 4000000000, 'optimizer': 8000000000, 'importance': 1000000000}
    """
    return Forecast(
        kept=_kept(size, settings),
        training=_training(size, settings, work),
        boundary=_boundary(size, settings, work),
        host=_host(size, settings),
        seconds=_seconds(size, settings, work, machine),
        files=_files(size, settings, work),
    )


def _kept(size: ModelSize, settings: Settings) -> dict[str, int]:
    width, shards = _WEIGHT_BYTES[settings.precision], settings.shards
    # DDP's buckets are copies of the gradients (gradient_as_bucket_view: false).
    copies = 2 if settings.strategy == "ddp" and settings.devices > 1 else 1
    kept = {
        "weights": ((size.weights - size.quantised) * width + size.quantised_bytes) // shards,
        "gradients": size.trained * width * copies // shards,
        "optimizer": int(size.trained * settings.state_bytes) // shards,
    }
    if settings.gate and not settings.importance_on_host:
        kept["importance"] = size.gated * settings.importance_bytes // shards
    if size.matrices:  # moments, at most as many numbers of maps, and the matrices as they were
        of_maps = 2 if settings.precision == "bf16-mixed" else 4
        of_moments = 0 if settings.importance_on_host else 4
        kept["directions"] = (of_moments + of_maps) * size.squares + size.matrices * 4
    if shards > 1:
        kept["gathered layers"] = 2 * size.weights // max(size.layers, 1) * width
    return kept


def _host(size: ModelSize, settings: Settings) -> dict[str, int]:
    if not settings.gate or not settings.importance_on_host:
        return {}
    moments = {"moments": 2 * 4 * size.squares} if size.squares else {}  # those of one more task at a boundary
    return {"importance": size.gated * settings.importance_bytes // settings.shards, **moments}


def _training(size: ModelSize, settings: Settings, work: Work) -> dict[str, int]:
    """The backward pass and the optimizer's step, which come one after the other."""
    passes = _activations(size, settings, work.rows, work) + _casts(size, settings)
    if not settings.gate:
        return {"passes": passes}
    width = _WEIGHT_BYTES[settings.precision]
    copied = max(size.largest // settings.shards, min(_GATE_COPY_ENTRIES, size.gated // settings.shards))
    return {"passes": passes, "gate": copied * width}


def _boundary(size: ModelSize, settings: Settings, work: Work) -> dict[str, int]:
    if not settings.gate:
        return {}
    each = {"mean": 4, "blocks": 6, "exact": 2 * settings.top_k}[settings.aggregation]
    passes = _activations(size, settings, min(work.attributed_rows, work.samples), work)
    if size.products and settings.own_text:  # of which all tokens are answers
        length = settings.own_tokens
        own = replace(work, tokens=length, longest=length, answer_tokens=length)
        passes = max(passes, _activations(size, settings, min(work.attributed_rows, settings.own_text), own))
    boundary = {
        "scores": size.gated * each // settings.devices,  # each process has its rows, also under DDP
        "passes": passes + _casts(size, settings),
    }
    if size.squares and not settings.importance_on_host:
        boundary["new moments"] = 4 * size.squares
    return boundary


def _activations(size: ModelSize, settings: Settings, rows: int, work: Work) -> int:
    per_width, per_inner = _ACTIVATION_BYTES[settings.precision]
    longest = math.ceil(work.tokens) if work.longest is None else work.longest
    layer = rows * longest * (per_width * size.width + per_inner * size.inner)
    kept = rows * longest * size.width * _WEIGHT_BYTES[settings.precision]  # a layer's input
    layers = size.layers * kept + layer if settings.gradient_checkpointing else size.layers * layer
    logits = rows * min(work.answer_tokens, longest) * size.vocabulary * _LOGIT_BYTES[settings.precision]
    return layers + logits


def _casts(size: ModelSize, settings: Settings) -> int:
    """Autocast keeps a 16-bit copy of each weight in use until the pass is over."""
    if settings.precision != "bf16-mixed":
        return 0
    cast = size.weights - size.quantised
    return 2 * cast if settings.shards == 1 else 4 * cast // max(size.layers, 1)


def _seconds(size: ModelSize, settings: Settings, work: Work, machine: Machine) -> dict[str, float]:
    flops = machine.flops[0 if settings.precision == "32" else 1]
    each_token = (4 * size.weights + 2 * size.trained) / flops
    forward_again = 2 * size.weights / flops if settings.gradient_checkpointing else 0.0
    shortest = size.weights * _PASS_BYTES / machine.bandwidth
    batch = max(work.rows * work.tokens * (each_token + forward_again), shortest)
    step = size.trained / settings.shards * _STEP_BYTES / machine.bandwidth
    seconds = {"training": work.steps * (work.micro_batches * batch + step)}
    if not settings.gate:
        return seconds
    share = size.gated / settings.shards
    row = max(work.tokens * each_token, shortest) * _ATTRIBUTION_FACTOR[settings.aggregation]
    seconds["gate"] = work.steps * share * _GATE_BYTES / machine.bandwidth
    if size.products:
        speed = machine.flops[1 if settings.precision == "bf16-mixed" else 0]
        seconds["directions"] = work.steps * 2 * size.products / speed / settings.directions_every
    if size.products and settings.own_text:  # written token by token, all pieces together, then attributed
        token = max(settings.own_text * 2 * size.weights / flops, shortest / 3)  # forward alone
        seconds["own text"] = settings.own_tokens * (token + settings.own_text * each_token)
    seconds["attribution"] = work.num_tasks * math.ceil(work.samples / settings.devices) * row
    # Each process sorts all tensors, one after the other.
    seconds["normalising importance"] = work.num_tasks * size.gated * _NORMALISING_SECONDS
    return seconds


def _files(size: ModelSize, settings: Settings, work: Work) -> dict[str, int]:
    width = _WEIGHT_BYTES[settings.precision]
    importance = size.gated * settings.importance_bytes if settings.gate else 0
    weights = (size.weights - size.quantised) * width
    checkpoint = weights + int(size.trained * settings.state_bytes) + importance + 4 * size.squares
    files = {"one checkpoint": checkpoint}
    if settings.gate:
        files["importance of all tasks"] = size.gated * settings.file_bytes * work.num_tasks
    return files
