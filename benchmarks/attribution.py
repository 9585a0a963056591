"""What attribution and gating cost on SmolLM2-135M, as ratios to plain training steps measured in the same run.

    python benchmarks/attribution.py [--only attribution gates memory] [--tokens 24 64] [--batch 8] [--repeats 3]

Times are the smallest of the repeats. With one thread (OMP_NUM_THREADS=1) they are processor times, which a busy
machine disturbs less. Memory (Linux only) is the peak resident size after loading the model, in a process of its own
for each case; torch itself is part of it. `growth.py` shows how the costs grow, `draws.py` what cheaper aggregations
change.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch

from agcl.attribution import ImportanceConfig, Sample, attribute_batch
from agcl.attribution.directions import MomentSums, find_matrices, input_moments
from agcl.attribution.estimators import LRP, Evidence
from agcl.attribution.importance import SampleAggregator, normalise
from agcl.attribution.passes import target_logit
from agcl.callbacks import Directions
from agcl.gating import DirectionalGate, UpdateGate
from agcl.gating.plasticity import scaled_gradient
from agcl.models import load_model

MODEL = "builtin:smollm2-135m-instruct"
ANSWER_TOKENS = 5
NUM_PLANNED = 16
AGGREGATIONS = {
    "mean": ImportanceConfig(),
    "top-8 by blocks": ImportanceConfig(top_k=8),
    "top-8, exact": ImportanceConfig(top_k=8, top_k_method="exact"),
    "paper": ImportanceConfig.paper(),
    "paper, by blocks": ImportanceConfig(sign="positive", normalisation="log", top_k=8),
}
PARTS = ("attribution", "gates", "memory")
MEMORY_CASES = ("plain", *AGGREGATIONS)


def rows(vocab_size, num_tokens, count):
    """Random rows; attribution takes the same time whatever they say."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(num_tokens - ANSWER_TOKENS - 1, num_tokens - 1)
    ids = [torch.randint(vocab_size, (num_tokens,), generator=generator) for _ in range(count)]
    return [Sample(row, positions, row[positions + 1]) for row in ids]


def step(model, samples):
    """Plain forward and backward pass of the training loss."""
    model.zero_grad(set_to_none=True)
    ids = torch.stack([sample.input_ids for sample in samples])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def attribute(model, samples, consume, **options):
    attribute_batch(model, samples, consume=consume, only_correct=False, **options)


def aggregating(config, num_planned=NUM_PLANNED):
    aggregator = SampleAggregator(config, num_planned)
    return lambda name, parameter, gradient: aggregator.update(name, gradient.mul_(parameter.detach()))


def aggregating_pieces(config, is_square=False):
    """Of a batch, whose gradients are made a few rows at a time; vectors come whole."""
    aggregator = SampleAggregator(config, NUM_PLANNED)

    def score(parameter, gradient):
        return gradient.square_() if is_square else gradient.mul_(parameter)

    return {
        "consume": lambda name, parameter, gradient: aggregator.update(name, score(parameter.detach(), gradient)),
        "consume_pieces": lambda name, gradients: aggregator.update_batch(name, gradients, score, is_square),
    }


def random_importance(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(256, parameter.shape, dtype=torch.uint8, generator=generator)
        for name, parameter in model.named_parameters()
    }


def found_importance(model, samples):
    """Importance as attribution finds it: most rows of the embedding have none, which the update gate makes use of."""
    aggregator = SampleAggregator(ImportanceConfig())

    def consume(name, parameter, gradient):
        aggregator.update(name, gradient.mul_(parameter.detach()))

    attribute(model, samples, consume)
    return normalise(aggregator.aggregate(), ImportanceConfig())


clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def smallest_time(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def attribution_times(model, num_tokens, batch, repeats):
    samples = rows(model.config.vocab_size, num_tokens, batch)
    plain = smallest_time(lambda: step(model, samples[:1]), repeats)
    model.zero_grad(set_to_none=True)
    print(f"\n{num_tokens} tokens: plain forward and backward of one row {plain:.3f} s")

    def line(what, seconds, count=1):
        print(f"  {what:44s} {seconds / count:.3f} s a row   {seconds / count / plain:.2f} x")

    ignore = lambda *_: None  # noqa: E731
    line("one row, nothing kept", smallest_time(lambda: attribute(model, samples[:1], ignore), repeats))
    for name, config in AGGREGATIONS.items():
        consume = aggregating(config)
        # Exact: past the first K samples, when the buffers are full. Blocks: whole ones, of two samples each.
        for _ in range(8 if config.top_k and config.top_k_method == "exact" else 0):
            attribute(model, samples[:1], consume)
        pair = lambda c=consume: [attribute(model, samples[:1], c) for _ in range(2)]  # noqa: E731
        line(f"one row, {name}", smallest_time(pair, repeats), 2)
    for name, options in {
        "each row's own, mean": aggregating_pieces(AGGREGATIONS["mean"]),
        "each row's own, mean of squares": aggregating_pieces(AGGREGATIONS["mean"], is_square=True),
        "each row's own, top-8 by blocks": aggregating_pieces(AGGREGATIONS["top-8 by blocks"]),
        "their sum as one draw, mean": {"consume": aggregating(AGGREGATIONS["mean"]), "per_sample": False},
    }.items():
        seconds = smallest_time(lambda o=options: attribute(model, samples, **o), repeats)
        line(f"batch of {batch}, {name}", seconds, batch)
    for what, chosen in {"one row": samples[:1], f"batch of {batch}": samples}.items():
        parts = min((time_by_part(model, chosen) for _ in range(repeats)), key=lambda parts: sum(parts.values()))
        shares = ", ".join(f"{part} {seconds / sum(parts.values()):.0%}" for part, seconds in parts.items())
        print(f"  where the time of {what} goes, top-8 by blocks: {shares}")


def time_by_part(model, samples):
    """Seconds of the forward pass, of the backward pass and of what consumes its gradients."""
    marks, spent = [clock()], [0.0]
    consumers = aggregating_pieces(AGGREGATIONS["top-8 by blocks"])

    def objective(logits, targets):  # the first thing after the forward pass
        marks.append(clock())
        return target_logit(logits, targets)

    def timed(consume):
        def consume_timed(*arguments):
            start = clock()
            consume(*arguments)
            spent[0] += clock() - start

        return consume_timed

    attribute(model, samples, objective=objective, **{name: timed(consume) for name, consume in consumers.items()})
    end = clock()
    return {
        "forward": marks[1] - marks[0],
        "backward": end - marks[1] - spent[0],
        "relevance and top-K": spent[0],
    }


def gate_times(model, num_tokens, batch, repeats):
    samples = rows(model.config.vocab_size, num_tokens, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    importance = found_importance(model, samples)
    named = list(model.named_parameters())

    def train():
        step(model, samples)
        optimizer.step()

    def scale():  # what the hooks of the gradient gate do; each gradient is replaced, as in a backward pass
        for name, parameter in named:
            parameter.grad = scaled_gradient(parameter.grad, importance[name], 1.0)

    training = smallest_time(train, repeats)
    # Timed apart from forward and backward, whose noise is larger than the gate.
    alone = smallest_time(optimizer.step, 2 * repeats)
    with UpdateGate(model.named_parameters(), importance).attach(optimizer):
        update = smallest_time(optimizer.step, 2 * repeats) - alone
    gradient = smallest_time(scale, 2 * repeats)
    print(f"\ntraining step, {batch} rows of {num_tokens} tokens: {training:.3f} s (AdamW, fused: {alone:.3f} s)")
    print(f"  update gate   {update:+.3f} s   {update / training:+.1%}")
    print(f"  gradient gate {gradient:+.3f} s   {gradient / training:+.1%}")
    by_direction(model, samples, optimizer, training, alone, repeats)
    model.zero_grad(set_to_none=True)


def by_direction(model, samples, optimizer, training, alone, repeats):
    """The gate by direction: a product with the map, over the steps between two; what a boundary takes."""
    names = [name for name, _ in model.named_parameters()]
    matrices = find_matrices(model, names, samples[0], "attnlrp")

    estimator = LRP(score="sensitivity")

    def evidence(observe=None):
        count = len(samples)
        return Evidence(model, names, samples, count, batch_size=count, only_correct=False, observe=observe)

    def find():
        return input_moments(evidence(), estimator, MomentSums(matrices))

    seconds_of_moments, moments = smallest_time(find, 1), find()
    alone_scored = smallest_time(lambda: estimator.scores(evidence()), 2)
    seen_as_well = smallest_time(lambda: estimator.scores(evidence(MomentSums(matrices).observe)), 2)
    seconds_of_maps, maps = smallest_time(moments.maps, 1), moments.maps()
    every = Directions().every
    for dtype in (torch.float32, torch.bfloat16):
        narrow = {name: (held.to(dtype), is_transposed) for name, (held, is_transposed) in maps.items()}
        with DirectionalGate(model.named_parameters(), narrow).attach(optimizer):
            product = smallest_time(optimizer.step, repeats) - alone
        print(
            f"  by direction, {str(dtype).removeprefix('torch.')}: {product:+.3f} s a product, "
            f"every {every} steps {product / every / training:+.1%}"
        )
    print(
        f"  at a boundary: importance from these rows {alone_scored:.1f} s, with moments seen on the way "
        f"{seen_as_well:.1f} s (in a pass of their own {seconds_of_moments:.1f} s more); "
        f"directions {seconds_of_maps:.1f} s"
    )


def resident(key):
    """MiB; ``VmHWM``: the peak, ``VmRSS``: now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def in_own_process(case):
    command = [sys.executable, __file__, "--memory-case", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(case):
    """Print MiB: the peak of one row of 64 tokens, or what a gate leaves resident."""
    model = load_model(MODEL).eval()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    samples = rows(model.config.vocab_size, 64, 1)
    if case == "gate":
        print(resident_gate(model, samples))
        return
    if case == "plain":
        step(model, samples)
    else:
        consume = aggregating(AGGREGATIONS[case])
        for _ in range(AGGREGATIONS[case].top_k or 2):  # all of its memory is touched before the last row
            attribute(model, samples, consume)
    print(resident("VmHWM"))


def resident_gate(model, samples):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step(model, samples)
    gradients = [parameter.grad for parameter in model.parameters()]  # Python sees them from now on
    before = tensor_bytes()
    UpdateGate(model.named_parameters(), random_importance(model)).attach(optimizer)
    optimizer.step()
    after = tensor_bytes()
    del gradients
    return (after - before) / 2**20


def tensor_bytes():
    """Of all tensors alive; the process's resident size would count memory that was free before as well."""
    gc.collect()
    storages = (item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory():
    print("\npeak memory of one row of 64 tokens")
    plain = in_own_process("plain")
    for case in MEMORY_CASES:
        found = plain if case == "plain" else in_own_process(case)
        print(f"  {case:16s} {found:6.0f} MiB   {found / plain:.2f} x")
    num_weights = sum(parameter.numel() for parameter in load_model(MODEL).parameters())
    print(f"update gate, its importance included: {in_own_process('gate') * 2**20 / num_weights:.2f} bytes a weight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-case", choices=(*MEMORY_CASES, "gate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_case:
        measure_memory(args.memory_case)
        return
    model = load_model(MODEL).eval()
    print(f"{MODEL}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {clock.__name__}")
    for num_tokens in args.tokens:
        if "attribution" in args.only:
            attribution_times(model, num_tokens, args.batch, args.repeats)
        if "gates" in args.only:
            gate_times(model, num_tokens, args.batch, args.repeats)
    del model
    if "memory" in args.only:
        memory()


if __name__ == "__main__":
    main()
