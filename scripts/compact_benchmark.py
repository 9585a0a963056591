"""Make the small files that a benchmark's reduced configuration reads from the benchmark as it is published.

    python scripts/compact_benchmark.py trace LLM-CL-Benchmark_5000 DATA
    python scripts/compact_benchmark.py standard CL_Benchmark DATA
    python scripts/compact_benchmark.py long CL_Benchmark DATA

What `lightning_configs/data/NAME.yaml` reads is written as `NAME_reduced.yaml` reads it. Of each file it takes so many
rows, drawn by a fixed seed, each prompt once; rows without an answer, and test rows whose prompt is among the published
training rows, are left out.
"""

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from agcl.data.tasks import Task, template_columns

CONFIGS = Path(__file__).parents[1] / "lightning_configs" / "data"
NAMES = ("trace", "standard", "long")

Pair = tuple[str, str]
"""What the model is asked, and the answer."""


def tasks(name: str) -> dict[str, Task]:
    """The tasks of a data configuration, by name."""
    return {
        task["name"]: Task(**{**task, "probes": {}})
        for task in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["data"]["tasks"]
    }


def columns(task: Task) -> Pair:
    """Names of the columns of prompt and answer."""
    (prompt,), (answer,) = template_columns(task.prompt), template_columns(task.answer)
    return prompt, answer


def read_pairs(path: Path, names: Pair) -> list[Pair]:
    """Prompts and answers of a published file, a JSON list or JSON Lines, without empty ones."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    pairs = [(str(row[names[0]]), str(row[names[1]])) for row in rows]
    return [pair for pair in pairs if all(part.strip() for part in pair)]


def draw(pairs: Sequence[Pair], count: int, without: set[str]) -> list[Pair]:
    """At most so many pairs in random order, each prompt once and none of those to be left out."""
    distinct: dict[str, str] = {}
    for prompt, answer in random.Random(0).sample(pairs, len(pairs)):
        if prompt not in without:
            distinct.setdefault(prompt, answer)
    return list(distinct.items())[:count]


def write_pairs(path: Path, pairs: Sequence[Pair], names: Pair) -> None:
    """Write gzipped JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False) + "\n" for pair in pairs)


def compact(published: Task, reduced: Task, folder: Path, output: Path, num_train: int, num_test: int) -> None:
    """Write one task's training and test file."""
    sources: Any = published.source
    targets: Any = reduced.source
    train = read_pairs(folder / sources["train"], columns(published))
    test = read_pairs(folder / sources["test"], columns(published))
    chosen = {
        "train": draw(train, num_train, set()),
        "test": draw(test, num_test, {prompt for prompt, _ in train}),
    }
    for split, pairs in chosen.items():
        write_pairs(output / targets[split], pairs, columns(reduced))
    print(f"{reduced.name}: {len(chosen['train'])} training and {len(chosen['test'])} test rows")


def main() -> None:
    """Write the files of all tasks of one benchmark."""
    parser = argparse.ArgumentParser(description="Make the small files that a reduced configuration reads.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("published", type=Path, help="the benchmark's folder as published")
    parser.add_argument("output", type=Path, help="folder to write to: the reduced configurations' data_dir")
    parser.add_argument("--train_rows", type=int, default=500, help="at most, of each task")
    parser.add_argument("--test_rows", type=int, default=200, help="at most, of each task")
    arguments = parser.parse_args()
    published = tasks(arguments.name)
    for name, reduced in tasks(f"{arguments.name}_reduced").items():
        compact(
            published[name],
            reduced,
            arguments.published,
            arguments.output,
            arguments.train_rows,
            arguments.test_rows,
        )


if __name__ == "__main__":
    main()
