"""Does an answer rest on the weights that a score calls important? Zero them, and see what is left of the answer.

    python benchmarks/faithfulness.py [--scopes model tensor] [--rows 16] [--seeds 0 1 2] [--output docs/faithfulness]

SmolLM2-135M first learns names of countries and languages in four languages at once, until it knows them. Each score is
computed on the rows of one language; the highest-scored weights of the decoder's matrices, ranked over the whole model
or within each matrix, are set to zero, and the mean log-likelihood of the answers' tokens is measured: of the rows that
the score was computed on, and of rows in the three other languages. The faster the first falls, the more faithful the
score; the more the others keep, the more specific. A seed changes words, training and random scores.

Writes OUTPUT.json, OUTPUT.png and OUTPUT.md; --report_only makes the last two from the first.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from agcl.attribution.estimators import LRP, Evidence, Fisher, GradientWeight, Magnitude, Random, Wanda
from agcl.attribution.rows import samples_of
from agcl.data.tasks import IGNORED_LABEL, AnswerEncoder, Task, collate
from agcl.models import load_model, load_tokenizer
from agcl.scoring import answer_logits, token_nll

MODEL = "builtin:smollm2-135m-instruct"
LANGUAGES = ("welsh", "finnish", "swahili", "turkish")
# Shares of the weights. Over the whole model it begins with a single one: some weights of this model are so large that
# nothing works without them. Within matrices the smallest share is one or two weights of each.
SHARES = {
    "model": (1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "tensor": (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
RANKED = {"model": "over the model", "tensor": "within each matrix"}
LIMIT = -5  # nats per token: an answer that is lost
SCORES = {
    "relevance, AttnLRP": lambda: LRP("attnlrp"),
    "relevance, CP-LRP": lambda: LRP("cplrp"),
    "sensitivity, AttnLRP": lambda: LRP("attnlrp", score="sensitivity"),
    "gradient x weight": GradientWeight,
    "Fisher": Fisher,
    "Wanda": Wanda,
    "magnitude": Magnitude,
    "random": Random,
}


def encoded_rows(tokenizer, num_rows, seed):
    """Language -> rows; every language has other words, and every seed too."""
    encoder = AnswerEncoder(tokenizer, max_length=128)
    rows = {}
    for index, language in enumerate(LANGUAGES):
        start = (seed * len(LANGUAGES) + index) * num_rows % 128
        task = Task(language, f"builtin:cldr/{language}")
        rows[language] = list(encoder.encode_rows(task, f"train[{start}:{start + num_rows}]", task.prompt))
    return rows


def batches(rows, size=16):
    return [collate(rows[start : start + size], pad_token_id=0) for start in range(0, len(rows), size)]


def learn(model, rows, seed, epochs=12, batch_size=8):
    """Plain fine-tuning until the rows are known."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    num_steps = epochs * len(rows) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=num_steps + 1, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            batch = collate([rows[index] for index in order[start : start + batch_size]], pad_token_id=0)
            logits, targets = answer_logits(model, batch)
            (token_nll(logits, targets).sum() / (targets != IGNORED_LABEL).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    model.eval()


@torch.no_grad()
def log_likelihood(model, rows):
    """Mean over the answers' tokens, in nats."""
    total = count = 0
    for batch in batches(rows):
        logits, targets = answer_logits(model, batch)
        total -= float(token_nll(logits, targets).sum())
        count += int((targets != IGNORED_LABEL).sum())
    return total / count


def matrices(model):
    """The decoder's weight matrices, without embeddings and norms: what pruning looks at."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 2 and ".layers." in name]


def top_values(scores, shares):
    """Smallest of the top ``share`` of all entries, at least one entry, for each share."""
    counts = [max(1, round(scores.numel() * share)) for share in shares]
    top = scores.flatten().topk(max(counts)).values
    return [float(top[count - 1]) for count in counts]


def thresholds(scores, scope):
    """Name -> score from which on weights are set to zero, for each share."""
    if scope == "model":
        return dict.fromkeys(
            scores, top_values(torch.cat([score.flatten() for score in scores.values()]), SHARES[scope])
        )
    return {name: top_values(score, SHARES[scope]) for name, score in scores.items()}


@torch.no_grad()
def zeroing_curve(model, scores, scope, own, others):
    """Log-likelihood of own and other rows with the top weights at zero, for each share; weights put back."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].clone() for name in scores}
    limits = thresholds(scores, scope)
    curve = []
    for step in range(len(SHARES[scope])):
        for name, score in scores.items():
            parameters[name].masked_fill_(score >= limits[name][step], 0)
        curve.append((log_likelihood(model, own), log_likelihood(model, others)))
        for name, old in kept.items():
            parameters[name].copy_(old)
    return curve


def one_seed(seed, num_rows, scopes):
    torch.manual_seed(seed)
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    rows = encoded_rows(tokenizer, num_rows, seed)
    learn(model, [row for group in rows.values() for row in group], seed)
    own = rows[LANGUAGES[seed % len(LANGUAGES)]]
    others = [row for group in rows.values() if group is not own for row in group[: num_rows // 3]]
    intact = (log_likelihood(model, own), log_likelihood(model, others))
    found = {"intact": intact, "rows_used": {}, "curves": {scope: {} for scope in scopes}}
    print(f"seed {seed}: intact, own answers {intact[0]:.3f}, others {intact[1]:.3f}", flush=True)
    for name, make in SCORES.items():
        evidence = Evidence(model, matrices(model), samples_of(own), num_rows, batch_size=8, seed=seed)
        scores = make().scores(evidence)
        found["rows_used"][name] = evidence.num_used
        for scope in scopes:
            curve = zeroing_curve(model, scores, scope, own, others)
            found["curves"][scope][name] = curve
            text = "  ".join(f"{s:.0e}: {a:.2f}/{b:.2f}" for s, (a, b) in zip(SHARES[scope], curve, strict=True))
            print(f"  {scope:6s} {name:20s} {text}", flush=True)
    return found


def needed(curve, shares):
    """The smallest share that takes the attributed answers below LIMIT, and what the others then have; None if none."""
    return next(((share, other) for share, (own, other) in zip(shares, curve, strict=True) if own < LIMIT), None)


def table(results, scopes):
    """How little it takes to lose the answers, by seed, as Markdown."""
    lines = [
        f"Smallest share of the weights (%) that takes the attributed answers below {LIMIT} nats per token, by seed;",
        "in brackets what the answers in the other three languages then have.",
        "",
        "| score | " + " | ".join(f"ranked {RANKED[scope]}" for scope in scopes) + " |",
        "|---|" + "---|" * len(scopes),
    ]
    for name in SCORES:
        cells = []
        for scope in scopes:
            found = [needed(seed["curves"][scope][name], SHARES[scope]) for seed in results.values()]
            texts = [f"{100 * point[0]:g} ({point[1]:.1f})" if point else "not reached" for point in found]
            cells.append("; ".join(texts) if len(set(texts)) > 1 else texts[0])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results, scopes, path):
    figure, axes = plt.subplots(
        len(scopes), 2, figsize=(11, 4.4 * len(scopes)), sharex="row", sharey=True, squeeze=False, layout="constrained"
    )
    titles = ("the answers that were attributed", "answers in the other three languages")
    for row, scope in zip(axes, scopes, strict=True):
        percent = [100 * share for share in SHARES[scope]]
        for which, (axis, title) in enumerate(zip(row, titles, strict=True)):
            for name in SCORES:
                curves = [[point[which] for point in found["curves"][scope][name]] for found in results.values()]
                style = {"color": "0.5", "linestyle": "--"} if name == "random" else {}
                points = list(zip(*curves, strict=True))
                (line,) = axis.plot(percent, list(map(statistics.mean, points)), marker="o", ms=4, label=name, **style)
                axis.fill_between(
                    percent, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.12
                )
            axis.axhline(statistics.mean(found["intact"][which] for found in results.values()), color="black", lw=0.8)
            axis.set(xscale="log", xlabel=f"weights set to zero (%), ranked {RANKED[scope]}", title=title)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("log-likelihood (nats per answer token)")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=100)


def report(document, output):
    results = document["seeds"]
    scopes = list(next(iter(results.values()))["curves"])
    draw(results, scopes, output.with_suffix(".png"))
    output.with_suffix(".md").write_text(table(results, scopes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scopes", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--rows", type=int, default=16, help="of each language")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/faithfulness"))
    parser.add_argument("--report_only", action="store_true", help="make picture and table from OUTPUT.json")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    data = args.output.with_suffix(".json")
    if args.report_only:
        report(json.loads(data.read_text()), args.output)
        return
    results = {}
    for seed in args.seeds:
        results[str(seed)] = one_seed(seed, args.rows, args.scopes)
        versions = {"torch": torch.__version__, "machine": platform.machine()}
        document = {"model": MODEL, "rows": args.rows, "shares": SHARES, "versions": versions, "seeds": results}
        data.write_text(json.dumps(document))
        report(document, args.output)


if __name__ == "__main__":
    main()
