"""How the costs of attribution, gates and merging grow, on tiny random models: each over a decade.

OMP_NUM_THREADS=1 python benchmarks/growth.py [--only weights samples tokens tasks] [--repeats 5]
"""

import argparse

import torch
from attribution import aggregating, attribute, clock, random_importance, rows, smallest_time, step
from transformers import LlamaConfig, LlamaForCausalLM

from agcl.attribution import ImportanceConfig, RunningMerge
from agcl.attribution.importance import SampleAggregator
from agcl.gating import UpdateGate

BLOCKS = ImportanceConfig(top_k=8)
DECADE = (1, 2, 5, 10)


def tiny_model(num_layers):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def num_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def attribution_time(model, samples, repeats):
    consume = aggregating(BLOCKS)
    return smallest_time(lambda: attribute(model, samples, consume), repeats)


def over_weights(repeats):
    print("\nweights, one row of 32 tokens: forward and backward, attribution with top-8 by blocks, update gate")
    for factor in DECADE:
        model = tiny_model(factor)
        samples = rows(model.config.vocab_size, 32, 1)
        plain = smallest_time(lambda m=model, s=samples: step(m, s), repeats)
        attribution = attribution_time(model, samples, repeats)
        step(model, samples)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        alone = smallest_time(optimizer.step, repeats)
        with UpdateGate(model.named_parameters(), random_importance(model)).attach(optimizer):
            gate = smallest_time(optimizer.step, repeats) - alone
        millions, times = num_weights(model) / 1e6, (1e3 * plain, 1e3 * attribution, 1e3 * gate)
        total = "  ".join(f"{time:5.1f}" for time in times)
        each = "  ".join(f"{time / millions:.2f}" for time in times)
        print(f"  {millions:5.2f}M  {total} ms;  per million weights  {each} ms")


def over_tokens(repeats):
    print("\ntokens of one row: forward and backward, attribution with top-8 by blocks, ratio")
    model = tiny_model(4)
    for factor in DECADE:
        samples = rows(model.config.vocab_size, 32 * factor, 1)
        plain = smallest_time(lambda s=samples: step(model, s), repeats)
        model.zero_grad(set_to_none=True)
        attribution = attribution_time(model, samples, repeats)
        print(f"  {32 * factor:4d}  {1e3 * plain:6.1f} ms  {1e3 * attribution:6.1f} ms  {attribution / plain:.2f} x")


def over_samples(repeats):
    print("\nsamples (rows of 32 tokens, one by one), top-8 by blocks: time, time a row")
    model = tiny_model(4)
    for factor in DECADE:
        samples = rows(model.config.vocab_size, 32, 8 * factor)

        def run(samples=samples):
            aggregator = SampleAggregator(BLOCKS, num_planned=len(samples))
            for sample in samples:
                attribute(model, [sample], lambda name, p, g: aggregator.update(name, g.mul_(p.detach())))
            aggregator.aggregate()

        seconds = smallest_time(run, repeats)
        print(f"  {len(samples):3d}  {seconds:6.3f} s  {1e3 * seconds / len(samples):5.1f} ms")


def over_tasks():
    model = tiny_model(8)
    importance = random_importance(model)
    print(f"\ntasks, {num_weights(model) / 1e6:.1f}M weights: time of merging one more, bytes a weight held")
    for how in ("maximum", "mean", "probabilistic_or"):
        merge, parts = RunningMerge(how), []
        for count in range(1, 11):
            start = clock()
            merge.update(importance)
            seconds = clock() - start
            if count in DECADE:
                held = sum(state.nbytes for state in merge.state_dict()["state"].values())
                parts.append(f"{count}: {1e3 * seconds:.1f} ms, {held / num_weights(model):.0f}")
        print(f"  {how:17s} {';  '.join(parts)}")


def main():
    parts = {"weights": over_weights, "samples": over_samples, "tokens": over_tokens}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*parts, "tasks"), nargs="+", default=(*parts, "tasks"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {clock.__name__}")
    for part in args.only:
        if part == "tasks":
            over_tasks()
        else:
            parts[part](args.repeats)


if __name__ == "__main__":
    main()
