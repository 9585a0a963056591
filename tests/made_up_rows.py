"""Data files as the benchmarks' configurations name them, with rows of nonsense."""

import gzip
import json

from agcl.data.tasks import template_columns


def write_made_up_rows(folder, tasks):
    """Three rows for each task and file, with the columns that the task names."""
    rows = {}
    for task in tasks:
        (answer,) = template_columns(task.get("answer", " {answer}"))
        prompts = [task.get("prompt", "{prompt}"), *(probe["prompt"] for probe in task.get("probes", {}).values())]
        labels = task.get("labels") or ["one", "two"]
        new = [
            {
                **{column: f"some {column} {i}" for prompt in prompts for column in template_columns(prompt)},
                **{column: value for column, value in task.get("where", {}).items() if column != answer},
                answer: labels[i % len(labels)],
            }
            for i in range(3)
        ]
        source = task["source"]
        for file in source.values() if isinstance(source, dict) else [source]:
            rows.setdefault(file, []).extend(new)
    for file, content in rows.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":  # a list, as TRACE and O-LoRA publish theirs
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in content).encode()))
