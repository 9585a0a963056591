"""Which gate protects? Tasks learned one after the other under experimental gates, by a bare loop on one thread.

    python benchmarks/gates.py gate --lr 5e-4 --samples 32 --tasks 3   # a row more in benchmarks/results/gates.jsonl
    python scripts/results.py                                          # RESULTS.md, with the rows as a table

SmolLM2-135M learns the quick start's rows (32 words a language): Welsh without a gate at 3e-4, which is kept for the
next time, then the other languages with one. The plasticity of each weight is held in float32, with no rounding of
importance, so that only the gate's form is compared:

    gate        1 - s / (s + q) with the tensor's quantile q of scores s; over tasks the largest importance counts
    gate_sum    the same, but scores are summed over the tasks before they are normalised
    ratio       as `gate`, of (old score / new score) ** power: the new task's empirical Fisher information at its start
    relative    a / (a + c b), with a = sqrt(v) of Adam's second moment and b = sqrt(s), at each step
    relative2   v / (v + c^2 s)
    directions  matrices by the directions of their inputs, the rest as `gate`: agcl's own
    none        plain fine-tuning

With `--prefix`, each prompt follows as many tokens of a novel, another passage for each row, on which its answer does
not rest: what attribution should see and a count of all inputs alike does not.

A row counts as known if each token of its answer is the most likely one after the right tokens before it.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from agcl.attribution import ImportanceConfig
from agcl.attribution.estimators import LRP, EmpiricalFisher, Evidence, Fisher
from agcl.attribution.rows import samples_of
from agcl.callbacks.directions import Directions, DirectionsSoFar
from agcl.data.tasks import IGNORED_LABEL, AnswerEncoder, Task, collate
from agcl.data.text import load_text, text_windows
from agcl.models import load_model, load_tokenizer
from agcl.scoring import answer_logits, token_nll

MODEL = "builtin:smollm2-135m-instruct"
LANGUAGES = ("welsh", "finnish", "swahili", "turkish")
RESULTS = Path(__file__).parent / "results" / "gates.jsonl"
KINDS = ("none", "gate", "gate_sum", "ratio", "relative", "relative2", "directions")
SCORES = {
    "sensitivity": lambda: LRP("attnlrp", score="sensitivity"),
    "relevance": lambda: LRP("attnlrp"),
    "gradient": lambda: LRP("none", score="sensitivity"),
    "gradient_weight": lambda: LRP("none"),
    "fisher": Fisher,
}
EPOCHS, BATCH, FIRST_LR, BETA2 = 12, 8, 3e-4, 0.999


def encoded_rows(prefix=0):
    tokenizer = load_tokenizer(MODEL)
    encoder = AnswerEncoder(tokenizer, max_length=128)
    number = 32 * len(LANGUAGES)
    passages = text_windows(load_text("builtin:text/alice"), tokenizer, number, prefix).tolist() if prefix else []
    rows = {}
    for index, language in enumerate(LANGUAGES):
        task = Task(language, f"builtin:cldr/{language}")
        rows[language] = list(encoder.encode_rows(task, f"train[{32 * index}:{32 * index + 32}]", task.prompt))
        for passage, row in zip(passages[index :: len(LANGUAGES)], rows[language], strict=False):
            row["input_ids"] = passage + row["input_ids"]
            row["labels"] = [IGNORED_LABEL] * len(passage) + row["labels"]
    return rows


@torch.no_grad()
def evaluate(model, rows):
    """Share of rows that are known, and loss per token in nats."""
    model.eval()
    loss = tokens = known = 0
    for start in range(0, len(rows), 16):
        logits, targets = answer_logits(model, collate(rows[start : start + 16], pad_token_id=0))
        is_answer = targets != IGNORED_LABEL
        loss += float(token_nll(logits, targets).sum())
        tokens += int(is_answer.sum())
        known += int(((logits.argmax(-1) == targets) | ~is_answer).all(-1).sum())
    return known / len(rows), loss / tokens


def evidence_of(model, rows, num_samples, only_correct=True):
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    return Evidence(
        model,
        names,
        samples_of(rows),
        num_samples,
        batch_size=8,
        config=ImportanceConfig(),
        only_correct=only_correct,
    )


def scores_of(model, rows, estimator, num_samples, only_correct=True):
    evidence = evidence_of(model, rows, num_samples, only_correct)
    return {name: score.abs() for name, score in estimator.scores(evidence).items()}


def normalised(scores, quantile):
    """s / (s + q), q over the non-zero scores of the tensor."""
    importance = {}
    for name, score in scores.items():
        positive = score[score > 0]
        if positive.numel() > 2**22:
            positive = positive[torch.randint(positive.numel(), (2**22,), generator=torch.Generator().manual_seed(0))]
        middle = positive.kthvalue(max(1, int(quantile * positive.numel()))).values if positive.numel() else 1.0
        importance[name] = score / (score + middle)
    return importance


def shuffled(tensors):
    generator = torch.Generator().manual_seed(0)
    return {n: t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t) for n, t in tensors.items()}


def learn(model, rows, lr, plasticity=None, directions=None):
    """AdamW with warm-up and linear decay; each weight moves by its plasticity (name, second moment) of the step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    total = EPOCHS * len(rows) // BATCH
    warmup = total // 4
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warmup if step < warmup else max(0.0, (total - step) / (total - warmup))
    )
    if directions is not None:
        directions.attach(optimizer, model, 0, is_last=False)
    model.train()
    step = 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            logits, targets = answer_logits(model, collate([rows[i] for i in order[start : start + BATCH]], 0))
            optimizer.zero_grad(set_to_none=True)
            (token_nll(logits, targets).sum() / (targets != IGNORED_LABEL).sum()).backward()
            before = {n: p.detach().clone() for n, p in model.named_parameters()} if plasticity else {}
            optimizer.step()
            step += 1
            for name, parameter in model.named_parameters() if plasticity else ():
                moment = optimizer.state[parameter]["exp_avg_sq"] / (1 - BETA2**step)
                with torch.no_grad():
                    parameter.copy_(torch.lerp(before[name], parameter, plasticity(name, moment)))
            schedule.step()
    if directions is not None:
        directions.detach()


def plasticity_of(kind, held, c):
    """Function of a parameter's name and second moment; ``held`` is importance, or scores for the relative kinds."""

    def plasticity(name, moment):
        if name not in held:
            return torch.tensor(1.0)
        if kind == "relative":
            return moment.sqrt() / (moment.sqrt() + c * held[name].sqrt() + 1e-12)
        if kind == "relative2":
            return moment / (moment + c**2 * held[name] + 1e-20)
        return 1 - held[name]

    return plasticity


def combined(kind, old, model, rows, options):
    """What the plasticity is made from: the earlier tasks' scores, and for ``ratio`` the new task's."""
    if kind == "gate_sum":
        return normalised(old, options.quantile)
    if kind == "ratio":
        new = scores_of(model, rows, EmpiricalFisher(), options.samples, only_correct=False)
        ratios = {n: (s / (new[n] + 0.1 * new[n].mean() + 1e-30)) ** options.power for n, s in old.items() if n in new}
        return normalised(ratios, options.quantile)
    return old


def first_task(rows, cache):
    """The model that has learned the first task."""
    model = load_model(MODEL)
    if cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
    else:
        learn(model, rows, FIRST_LR)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), cache)
    return model


def run(options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = encoded_rows(options.prefix)
    languages = LANGUAGES[: options.tasks]
    cache = options.cache.with_stem(f"{options.cache.stem}_{options.prefix}") if options.prefix else options.cache
    model = first_task(rows[languages[0]], cache)
    old, directions = {}, None
    if options.kind == "directions":
        control = "shuffled" if options.shuffled else "none"
        settings = Directions(options.plasticity, options.sharpness, options.every, not options.unweighted)
        directions = DirectionsSoFar(settings, SCORES[options.score](), control, on_host=False)
        evidence = evidence_of(model, rows[languages[0]], 1)
        directions.find(model, evidence.parameters, next(iter(evidence.samples)))
    matrix = [[evaluate(model, rows[language]) for language in languages]]
    for before, language in itertools.pairwise(languages):
        plasticity = None
        if options.kind != "none":
            scores = scores_of(model, rows[before], SCORES[options.score](), options.samples)
            if directions is not None:
                directions.learn(evidence_of(model, rows[before], options.samples))
                scores = {name: score for name, score in scores.items() if name not in directions.names()}
            is_merged_last = options.kind not in ("gate", "directions")
            if not is_merged_last:
                scores = normalised(scores, options.quantile)
            for name, score in scores.items():
                if name in old:
                    score = old[name] + score if is_merged_last else torch.maximum(old[name], score)
                old[name] = score
            held = combined(options.kind, old, model, rows[language], options)
            plasticity = plasticity_of(options.kind, shuffled(held) if options.shuffled else held, options.c)
        learn(model, rows[language], options.lr, plasticity, directions)
        matrix.append([evaluate(model, rows[language]) for language in languages])
        print(language, *(f"{known:.3f}/{loss:.4f}" for known, loss in matrix[-1]), flush=True)
    kept = (
        "kind",
        "score",
        "lr",
        "quantile",
        "c",
        "power",
        "samples",
        "prefix",
        "tasks",
        "shuffled",
        "plasticity",
        "sharpness",
        "every",
        "unweighted",
    )
    row = {key: getattr(options, key) for key in kept} | {"matrix": matrix, "torch": torch.__version__}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="gate")
    parser.add_argument("--score", choices=SCORES, default="sensitivity")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--quantile", type=float, default=0.1)
    parser.add_argument("--c", type=float, default=0.1)
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=0, help="tokens of a novel before each prompt")
    parser.add_argument("--tasks", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--plasticity", type=float, default=0.8, help="of `directions`")
    parser.add_argument("--sharpness", type=float, default=4.0, help="of `directions`")
    parser.add_argument("--every", type=int, default=4, help="steps between two products of `directions`")
    parser.add_argument("--unweighted", action="store_true", help="`directions` that count all inputs alike")
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("runs/gates_first_task.pt"))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
