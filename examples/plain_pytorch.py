"""agcl in a training loop of one's own: ``python examples/plain_pytorch.py``."""

import torch
from two_tasks import LEARNED, collate, encoded, loss, print_comparison, tiny_model, tiny_tokenizer, twin_of

import agcl
from agcl.attribution.estimators import LRP


def learn(model, rows, importance=None):
    """Train until the rows are learned, gated where there is importance."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    if importance is not None:
        agcl.gate(optimizer, model, importance)
    while loss(model, rows) > LEARNED:
        for start in range(0, len(rows), 4):
            optimizer.zero_grad()
            model(**collate(rows[start : start + 4])).loss.backward()
            optimizer.step()


def run(seed=0):
    """Loss on the old and on the new task after the new one was learned, without and with the gate."""
    tokenizer = tiny_tokenizer()
    old_rows, new_rows = encoded(tokenizer, "welsh"), encoded(tokenizer, "finnish")
    model = tiny_model(tokenizer, seed)
    learn(model, old_rows)
    importance = agcl.compute_importance(
        model,
        old_rows,
        estimator=LRP(score="sensitivity"),  # suits AdamW
        config=agcl.ImportanceConfig(quantile=0.2),  # a strong gate
    )
    results = {}
    for name, protected in {"without the gate": None, "with the gate": importance}.items():
        twin = twin_of(model)
        learn(twin, new_rows, protected)
        results[name] = loss(twin, old_rows), loss(twin, new_rows)
    return results


if __name__ == "__main__":
    print_comparison(run())
