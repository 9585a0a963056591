"""What attribution and gating cost on SmolLM2-135M, as ratios to plain training steps measured in the same run.

    python benchmarks/attribution.py [--tokens 24 64] [--batch 8] [--repeats 3]

Times are the smallest of the repeats. Memory (Linux only) is the peak resident size after loading the model, in a
process of its own for each case; torch itself is part of it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from agcl.attribution import ImportanceConfig, Sample, attribute_batch
from agcl.attribution.importance import SampleAggregator
from agcl.gating import UpdateGate
from agcl.gating.plasticity import scaled_gradient
from agcl.models import load_model

MODEL = "builtin:smollm2-135m-instruct"
ANSWER_TOKENS = 5
AGGREGATIONS = {"mean": ImportanceConfig(), "top-8": ImportanceConfig(top_k=8), "paper": ImportanceConfig.paper()}
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


def aggregating(config):
    aggregator = SampleAggregator(config)
    return lambda name, parameter, gradient: aggregator.update(name, gradient.mul_(parameter.detach()))


def smallest_time(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
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
        # Past the first K samples, when the buffers are full.
        for _ in range(config.top_k or 0):
            attribute(model, samples[:1], consume)
        line(f"one row, {name}", smallest_time(lambda c=consume: attribute(model, samples[:1], c), repeats))
    for name, options in {"each row's own": {}, "their sum as one draw": {"per_sample": False}}.items():
        consume = aggregating(AGGREGATIONS["mean"])
        seconds = smallest_time(lambda c=consume, o=options: attribute(model, samples, c, **o), repeats)
        line(f"batch of {batch}, {name}, mean", seconds, batch)


def gate_times(model, num_tokens, batch, repeats):
    samples = rows(model.config.vocab_size, num_tokens, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(0)
    importance = {
        name: torch.randint(256, parameter.shape, dtype=torch.uint8, generator=generator)
        for name, parameter in model.named_parameters()
    }

    def train():
        step(model, samples)
        optimizer.step()

    training = smallest_time(train, repeats)
    # Timed apart from forward and backward, whose noise is larger than the gate.
    alone = smallest_time(optimizer.step, repeats)
    with UpdateGate(model.named_parameters(), importance).attach(optimizer):
        update = smallest_time(optimizer.step, repeats) - alone
    # What its hooks do, for the same reason.
    named = list(model.named_parameters())
    gradient = smallest_time(lambda: [scaled_gradient(p.grad, importance[name], 1.0) for name, p in named], repeats)
    print(f"\ntraining step, {batch} rows of {num_tokens} tokens: {training:.3f} s (AdamW, fused: {alone:.3f} s)")
    print(f"  update gate   {update:+.3f} s   {update / training:+.1%}")
    print(f"  gradient gate {gradient:+.3f} s   {gradient / training:+.1%}")
    model.zero_grad(set_to_none=True)


def peak_memory(case, num_tokens):
    """MiB, of a process of its own."""
    command = [sys.executable, __file__, "--memory-case", case, "--tokens", str(num_tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(case, num_tokens):
    model = load_model(MODEL).eval()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    samples = rows(model.config.vocab_size, num_tokens, 1)
    if case == "plain":
        step(model, samples)
    else:
        consume = aggregating(AGGREGATIONS[case])
        for _ in range(AGGREGATIONS[case].top_k or 1):
            attribute(model, samples, consume)
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-case", choices=MEMORY_CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_case:
        measure_memory(args.memory_case, args.tokens[0])
        return
    model = load_model(MODEL).eval()
    print(f"{MODEL}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for num_tokens in args.tokens:
        attribution_times(model, num_tokens, args.batch, args.repeats)
        gate_times(model, num_tokens, args.batch, args.repeats)
    del model
    print("\npeak memory of one row of 64 tokens")
    plain = peak_memory("plain", 64)
    for case in MEMORY_CASES:
        found = peak_memory(case, 64)
        print(f"  {case:8s} {found:6.0f} MiB   {found / plain:.2f} x")


if __name__ == "__main__":
    main()
