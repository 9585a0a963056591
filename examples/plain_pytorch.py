"""agcl in a training loop of one's own: ``python examples/plain_pytorch.py [SEED...]``."""

import sys

import torch
from two_tasks import LEARNED, collate, encoded, loss, print_comparison, tiny_model, tiny_tokenizer, twin_of

import agcl
from agcl.attribution.estimators import LRP
from agcl.gating import shuffled


def learn(model, rows, importance=None, maps=None, learning_rate=5e-3):
    """Train until the rows are learned, gated by direction where there are maps, by entry where there is importance."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    if maps is not None:
        agcl.DirectionalGate(model.named_parameters(), maps).attach(optimizer)
        importance = {name: values for name, values in importance.items() if name not in maps}
    if importance is not None:
        agcl.gate(optimizer, model, importance)
    while loss(model, rows) > LEARNED:
        for start in range(0, len(rows), 4):
            optimizer.zero_grad()
            model(**collate(rows[start : start + 4])).loss.backward()
            optimizer.step()


def run(seed=0, control=False):
    """Loss on the old and on the new task after the new one was learned, without and with the gate.

    The controls: a gate with the same values in the wrong places, shuffled within each tensor; and no gate, but a
    fifth of the learning rate.
    """
    tokenizer = tiny_tokenizer()
    old_rows, new_rows = encoded(tokenizer, "welsh"), encoded(tokenizer, "finnish")
    model = tiny_model(tokenizer, seed)
    learn(model, old_rows)
    estimator = LRP(score="sensitivity")  # suits AdamW
    config = agcl.ImportanceConfig(quantile=0.2)  # a strong gate
    importance = agcl.compute_importance(model, old_rows, estimator=estimator, config=config)
    moments = agcl.compute_input_moments(model, old_rows)
    maps = moments.maps(plasticity=0.5)
    ways = {
        "without the gate": {},
        "with the gate": {"importance": importance},
        "by direction": {"importance": importance, "maps": maps},
    }
    if control:
        random = moments.maps(plasticity=0.5, control="shuffled", seed=seed)
        ways["random directions"] = {"importance": importance, "maps": random}
        ways["with it shuffled"] = {"importance": shuffled(importance, seed)}
        ways["without, slowly"] = {"learning_rate": 1e-3}
    results = {}
    for name, options in ways.items():
        twin = twin_of(model)
        learn(twin, new_rows, **options)
        results[name] = loss(twin, old_rows), loss(twin, new_rows)
    return results


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or [0]):
        print_comparison(run(number, control=True))
