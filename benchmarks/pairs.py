"""Does it help to hold pairs of an output's and an input's direction, instead of inputs' directions whole?

    python benchmarks/pairs.py pairs --objective answers   # a row more in benchmarks/results/pairs.jsonl
    python scripts/results.py                              # RESULTS.md, with the rows as a table

SmolLM2-135M has learned the quick start's Welsh rows (as in `gates.py`) and learns the Finnish ones at 3e-4 while each
matrix moves along ``v_j u_i^T`` by a share ``c / (c + s_ij)``, of which the mean is `--plasticity`; every 4 steps:

    inputs  s_ij = a_i, eigenvalues of the inputs' second moments A, weighted by the gradient: agcl's gate
    pairs   s_ij = sum over tokens of (g v_j)^2 (x u_i)^2, with v_j eigenvectors of the gradients' second moments, too

The gradient g is that of the answers' logits under the AttnLRP rules (`--objective answers`), or of all logits there,
with random signs and without rules (`all`). What is no matrix is gated entry by entry, as ever.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from gates import (
    SCORES,
    encoded_rows,
    evaluate,
    evidence_of,
    first_task,
    learn,
    normalised,
    plasticity_of,
    scores_of,
)

from agcl.attribution.directions import find_matrices, shares_within
from agcl.attribution.estimators import LRP

RESULTS = Path(__file__).parent / "results" / "pairs.jsonl"
EVERY, LR, SAMPLES = 4, 3e-4, 32


class AllLogits(LRP):
    """The sum of all logits at the answer's positions, with random signs."""

    def __init__(self):
        super().__init__("none", score="sensitivity")
        self.generator = torch.Generator().manual_seed(1)

    def objective(self, logits, targets):
        signs = torch.randint(0, 2, logits.shape, generator=self.generator).float() * 2 - 1
        return (logits * signs).sum()


def inputs_and_gradients(model, rows, estimator, matrices):
    """Name -> inputs and gradients of the tokens on which the objective rests, (tokens, in) and (tokens, out)."""
    found = {name: ([], []) for name in matrices}

    def observe(name, use, upstream):
        upstream = upstream.reshape(-1, upstream.shape[-1])
        weight = upstream.square().sum(1)
        counts = weight > weight.max() * 1e-12
        found[name][0].append(use.inputs().reshape(-1, use.inputs().shape[-1])[counts].clone())
        found[name][1].append(upstream[counts].clone())

    evidence = replace(evidence_of(model, rows, SAMPLES), parameters=list(matrices), observe=observe)
    estimator.visit(evidence, consume=lambda *_: None, consume_pieces=lambda *_: None)
    return {name: (torch.cat(inputs), torch.cat(gradients)) for name, (inputs, gradients) in found.items()}


def held_back(scores, plasticity):
    """1 - c / (c + s), with c such that the mean of c / (c + s) is the plasticity."""
    return (1 - shares_within(scores, plasticity, 1.0, least=2.0**-120)).float()


def directions_of(kind, inputs, gradients, plasticity):
    """V (or None), U and what is held back of each pair: directions of which at least 1/255 is held."""
    weighted = inputs * gradients.square().sum(1, keepdim=True)
    importance, u = torch.linalg.eigh(weighted.T @ inputs)
    v = None
    if kind == "pairs":
        _, v = torch.linalg.eigh(gradients.T @ gradients)
        held = held_back((gradients @ v).square().T @ (inputs @ u).square(), plasticity)
    else:
        held = held_back(importance[None], plasticity)
    columns, rows = (held >= 1 / 255).any(0), (held >= 1 / 255).any(1)
    return None if v is None else v[:, rows], u[:, columns], held[rows][:, columns]


class PairGate:
    """Maps what matrices have moved by, every few steps."""

    def __init__(self, model, maps):
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if name in maps}
        self.maps = maps

    def attach(self, optimizer, model, seed, *, is_last):
        self.before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.num_steps = 0
        self.handle = optimizer.register_step_post_hook(self.after_step)

    def after_step(self, *arguments):
        self.num_steps += 1
        if self.num_steps % EVERY == 0:
            self.map_steps()

    @torch.no_grad()
    def map_steps(self):
        for name, parameter in self.parameters.items():
            v, u, held = self.maps[name]
            moved = parameter - self.before[name]
            along = moved @ u
            moved -= ((along * held) if v is None else v @ ((v.T @ along) * held)) @ u.T
            self.before[name] += moved
            parameter.copy_(self.before[name])

    def detach(self):
        self.map_steps()
        self.handle.remove()


def run(options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = encoded_rows()
    model = first_task(rows["welsh"], options.cache)
    evidence = evidence_of(model, rows["welsh"], 1)
    matrices = find_matrices(model, evidence.parameters, next(iter(evidence.samples)), "attnlrp")
    estimator = AllLogits() if options.objective == "all" else SCORES["sensitivity"]()
    scores = scores_of(model, rows["welsh"], SCORES["sensitivity"](), SAMPLES)
    entries = normalised({name: score for name, score in scores.items() if name not in matrices}, 0.1)
    found = inputs_and_gradients(model, rows["welsh"], estimator, matrices)
    maps = {name: directions_of(options.kind, *pair, options.plasticity) for name, pair in found.items()}
    learn(model, rows["finnish"], LR, plasticity_of("gate", entries, 0), PairGate(model, maps))
    row = {key: getattr(options, key) for key in ("kind", "objective", "plasticity")} | {"lr": LR}
    row |= {language: evaluate(model, rows[language]) for language in ("welsh", "finnish")}
    print(row)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row | {"torch": torch.__version__}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("inputs", "pairs"))
    parser.add_argument("--objective", choices=("answers", "all"), default="answers")
    parser.add_argument("--plasticity", type=float, default=0.98)
    parser.add_argument("--cache", type=Path, default=Path("runs/gates_first_task.pt"))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
