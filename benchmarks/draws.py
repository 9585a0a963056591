"""How far gates differ that come from cheaper aggregations of the same real rows, in four blocks of SmolLM2-135M.

python benchmarks/draws.py [--batch 8]
"""

import argparse
import re

import numpy as np
import torch
from attribution import AGGREGATIONS, MODEL, NUM_PLANNED, attribute

from agcl.attribution import Sample
from agcl.attribution.importance import SampleAggregator, normalise
from agcl.data.tasks import IGNORED_LABEL, AnswerEncoder, Task
from agcl.models import load_model, load_tokenizer

SOURCE = "builtin:cldr/welsh"
BLOCKS = r"layers\.(0|9|19|29)\."


def real_samples():
    encoder = AnswerEncoder(load_tokenizer(MODEL), 512)
    task = Task("welsh", SOURCE)
    samples = []
    for row in encoder.encode_rows(task, f"train[:{NUM_PLANNED}]", task.prompt):
        labels = torch.tensor(row["labels"])
        answer = (labels != IGNORED_LABEL).nonzero().flatten()
        samples.append(Sample(torch.tensor(row["input_ids"]), answer - 1, labels[answer]))
    return samples


def importance(model, samples, batch, config, per_sample=True):
    """Levels of all entries of the chosen parameters."""
    names = [name for name, _ in model.named_parameters() if re.search(BLOCKS, name)]
    aggregator = SampleAggregator(config, NUM_PLANNED)
    for start in range(0, NUM_PLANNED, batch):
        attribute(
            model,
            samples[start : start + batch],
            lambda name, parameter, gradient: aggregator.update(name, gradient.mul_(parameter.detach())),
            parameters=names,
            per_sample=per_sample,
        )
    levels = normalise(aggregator.aggregate(), config)
    return np.concatenate([levels[name].flatten().numpy() for name in names])


def compare(model, batch):
    samples = real_samples()
    found = {name: importance(model, samples, batch, config) for name, config in AGGREGATIONS.items()}
    found["sums"] = importance(model, samples, batch, AGGREGATIONS["mean"], per_sample=False)
    print(f"{MODEL}, {NUM_PLANNED} rows of {SOURCE}, {found['sums'].size / 1e6:.1f}M weights: importance differs by")
    for what, one, other in (
        (f"mean: sums of {batch} rows, against each row's own", "mean", "sums"),
        ("top-8: by blocks, against exact", "top-8, exact", "top-8 by blocks"),
        ("top-8, exact, against the mean", "top-8, exact", "mean"),
        ("paper: by blocks, against exact", "paper", "paper, by blocks"),
    ):
        one, other = found[one], found[other]
        difference = np.abs(one.astype(float) - other).mean() / 255
        print(
            f"  {what:45s} {difference:.4f} on average, rank correlation {rank_correlation(one, other):.4f};"
            f" means {one.mean() / 255:.3f} and {other.mean() / 255:.3f}"
        )


def rank_correlation(one, other):
    """Spearman's, ties at their middle rank."""
    ranks = []
    for levels in (one, other):
        counts = np.bincount(levels, minlength=256)
        ranks.append((np.cumsum(counts) - counts / 2)[levels])
    return np.corrcoef(*ranks)[0, 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    compare(load_model(MODEL).eval(), args.batch)


if __name__ == "__main__":
    main()
