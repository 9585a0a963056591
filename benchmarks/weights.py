"""Does it matter how much each input counts? One recorded step, mapped by gates that weigh inputs in different ways.

    python benchmarks/weights.py names --prefix 48               # rows more in benchmarks/results/weights.jsonl
    python benchmarks/weights.py concept1k --data_dir DATA --pair 0 --trained 0.98
    python scripts/results.py                                    # RESULTS.md, with the rows as a table

SmolLM2-135M learns one task and then another, both without a gate, and what it moved by in the second is recorded. Then
the directions that the first task needs are found, each input ``x_t`` counting by a weight made from the gradient
``g_t`` of the answers' logits at the matrix's output (AttnLRP's rules), and the recorded step is mapped as by the gate
(`agcl.gating.DirectionalGate`, sharpness 4), for several plasticities. What the two tasks' losses are then shows
the trade; nothing is trained again, so that many gates can be compared on the same step. With `--trained` the second
task is learned anew under each gate instead, with a product every 4 steps. Embedding and normalisations move as without
a gate.

    square        |g_t|^2, as in agcl.attribution.directions
    norm          |g_t|
    row           |g_t|^2, divided by its sum over the row: each row counts alike
    row_norm      |g_t|, the same
    alike         1, wherever the answers rest on the input at all
    shuffled      |g_t|^2 of another such input, drawn at random: the same weights without attribution

`--rule none` takes the plain gradient, without AttnLRP's rules; `--objective margin` that of the answer's logit less
the next largest one, and `log_margin` that of its logarithm, so that answers which are soon lost count more.

The tasks are names in Welsh and Finnish, as in `gates.py`, after `--prefix` tokens of a novel, on which the answers do
not rest; or facts of Concept-1K, 64 of task `--pair` and 64 of the next.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import gates
import torch

from agcl.attribution.directions import find_matrices, shares_within
from agcl.attribution.estimators import LRP
from agcl.attribution.passes import target_logit
from agcl.data.tasks import AnswerEncoder, Task
from agcl.gating import DirectionalGate
from agcl.models import load_model, load_tokenizer

RESULTS = Path(__file__).parent / "results" / "weights.jsonl"
PLASTICITIES = (0.95, 0.98, 0.99)
LR, EPOCHS, SHARPNESS = 3e-4, 8, 4.0
PROMPT = "Question: {question}\n Short Answer:"


def squares(gradients):
    """Of the gradients' lengths, for each row and token."""
    return gradients.square().sum(-1)


def share_of_row(weights):
    """Each row's weights sum to one."""
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


def has_weight(weights):
    """Where the answers rest on the input at all."""
    return weights > 1e-12 * weights.max()


def shuffled(gradients):
    """Squares, each given to another input that has one."""
    weights = squares(gradients)
    found = has_weight(weights)
    weights[found] = weights[found][torch.randperm(int(found.sum()))]
    return weights


WEIGHTS = {
    "square": squares,
    "norm": lambda gradients: squares(gradients).sqrt(),
    "row": lambda gradients: share_of_row(squares(gradients)),
    "row_norm": lambda gradients: share_of_row(squares(gradients).sqrt()),
    "alike": lambda gradients: has_weight(squares(gradients)).float(),
    "shuffled": shuffled,
}


def pair_of_tasks(options):
    """Encoded rows of the old task and the new one."""
    if options.tasks == "names":
        rows = gates.encoded_rows(options.prefix)
        return rows["welsh"], rows["finnish"]
    encoder = AnswerEncoder(load_tokenizer(gates.MODEL), max_length=128)

    def rows_of(number):
        source = str(Path(options.data_dir) / "concept_1k.jsonl.gz")
        task = Task(f"concepts{number}", source, prompt=PROMPT, where={"task": number})
        return list(encoder.encode_rows(task, "train[:64]", PROMPT))

    return rows_of(options.pair), rows_of(options.pair + 1)


def margins(logits, targets):
    """How far each target's logit is above the next largest one."""
    others = logits.scatter(-1, targets[:, None], -torch.inf)
    return logits.gather(-1, targets[:, None])[:, 0] - others.amax(-1)


OBJECTIVES = {
    "logit": target_logit,
    "margin": lambda logits, targets: margins(logits, targets).sum(),
    "log_margin": lambda logits, targets: margins(logits, targets).clamp(min=0.1).log().sum(),
}


def moments(model, rows, kinds, rule, objective):
    """For each way to weigh: the moments of all matrices, from one pass."""
    estimator, found = LRP(rule, score="sensitivity"), {kind: {} for kind in kinds}
    estimator.objective = OBJECTIVES[objective]
    evidence = gates.evidence_of(model, rows, len(rows))
    samples = list(evidence.samples)
    matrices = find_matrices(model, evidence.parameters, samples[0], estimator.rule)

    def observe(name, use, upstream):
        inputs, gradients = use.inputs().float(), upstream.float()
        for kind in kinds:
            weighted = inputs * WEIGHTS[kind](gradients)[..., None]
            moment = weighted.flatten(0, 1).T @ inputs.flatten(0, 1)
            found[kind][name] = found[kind][name] + moment if name in found[kind] else moment

    evidence = replace(evidence, samples=samples, parameters=list(matrices), observe=observe)
    estimator.visit(evidence, consume=lambda *_: None, consume_pieces=lambda *_: None)
    return found


def held_columns(importance, directions, plasticity):
    """``V`` of the gate's map, as `InputMoments.maps` makes it."""
    held = (1 - shares_within(importance, plasticity, SHARPNESS)).to(directions)
    counts = held >= 1 / 255
    return (directions * held.sqrt())[:, counts]


class Gate:
    """A gate with given maps, for `gates.learn`."""

    def __init__(self, columns):
        self.maps = {name: (held, False) for name, held in columns.items()}

    def attach(self, optimizer, model, seed, *, is_last):
        self.gate = DirectionalGate(model.named_parameters(), self.maps, every=4).attach(optimizer)

    def detach(self):
        self.gate.detach()


def learned(model, old, new, cache):
    """Weights after the old task, and after the new one; kept for the next time."""
    if not cache.exists():
        found = []
        for rows in (old, new):
            gates.learn(model, rows, LR)
            found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(found), cache)
    return torch.load(cache, weights_only=True)


def run(options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gates.EPOCHS = EPOCHS
    old, new = pair_of_tasks(options)
    model = load_model(gates.MODEL)
    cache = options.cache / f"weights_{options.tasks}_{options.prefix or options.pair}.pt"
    first, second = learned(model, old, new, cache)
    step = {name: tensor - first[name] for name, tensor in second.items()}
    losses = partial(gates.evaluate, model)
    model.load_state_dict(second)
    end = losses(old), losses(new)
    model.load_state_dict(first)
    start = losses(old), losses(new)
    print(f"old and new task (known, loss) after the first: {start}; after the second, without a gate: {end}")
    for kind, sums in moments(model, old, options.weights, options.rule, options.objective).items():
        spectra = {name: torch.linalg.eigh(moment) for name, moment in sums.items()}
        for plasticity in (options.trained,) if options.trained else PLASTICITIES:
            columns = {name: held_columns(*spectrum, plasticity) for name, spectrum in spectra.items()}
            if options.trained:
                model.load_state_dict(first)
                gates.learn(model, new, LR, directions=Gate(columns))
            else:
                mapped = {name: first[name] + step[name] for name in first}
                for name, held in columns.items():
                    mapped[name] -= (step[name] @ held) @ held.T
                model.load_state_dict(mapped)
            row = {key: getattr(options, key) for key in ("tasks", "prefix", "pair", "rule", "objective")}
            row |= {"weights": kind, "plasticity": plasticity, "trained": bool(options.trained)}
            row |= {"start": start, "ungated": end, "old": losses(old), "new": losses(new), "torch": torch.__version__}
            print(kind, plasticity, row["old"], row["new"], flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", choices=("names", "concept1k"))
    parser.add_argument("--prefix", type=int, default=0, help="tokens of a novel before each prompt (names)")
    parser.add_argument("--pair", type=int, default=0, help="which tasks (concept1k)")
    parser.add_argument("--data_dir", help="folder of concept_1k.jsonl.gz")
    parser.add_argument("--weights", nargs="*", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--rule", choices=("attnlrp", "cplrp", "none"), default="attnlrp")
    parser.add_argument("--objective", choices=OBJECTIVES, default="logit")
    parser.add_argument("--trained", type=float, help="learn the new task under the gate, at this plasticity")
    parser.add_argument("--cache", type=Path, default=Path("runs"), help="folder for the weights learned")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
