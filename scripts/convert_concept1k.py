"""Rewrite Concept-1K as its authors publish it into the one file that this project's configurations read.

    python scripts/convert_concept1k.py codebase-for-incremental-learning-with-llm/dataset DATA/concept_1k.jsonl.gz

The folder is `dataset` of the authors' repository (zzz47zzz/codebase-for-incremental-learning-with-llm). Its
`concept_1k/dataset.txt` holds five lines for each fact,

    (Concept, Relation, Object)
    Q1: the question
    A1: the answer
    Q2: the question in other words
    Q2: the answer again

and `concept_1k_task10/continual_config.json` says which concept belongs to which of the ten tasks. Of a concept that it
does not name, the task is null. Facts whose two answers differ, or that are not whole, are left out, as the authors do.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEXT = re.compile(r"[QA][12]: ?(.*)")


def facts(text: str) -> Iterator[dict[str, Any] | None]:
    """The facts of `dataset.txt`, in their order; ``None`` for one that cannot be used."""
    head: list[str] = []
    texts: list[str] = []
    for line in [*text.splitlines(), "()"]:
        line = line.strip()
        if line.startswith("(") and line.endswith(")"):
            if head:
                yield _fact(head, texts)
            head, texts = [part.strip() for part in line[1:-1].split(",", 2)], []
        elif match := _TEXT.fullmatch(line):
            texts.append(match[1].strip())


def _fact(head: list[str], texts: list[str]) -> dict[str, Any] | None:
    if len(head) < 3 or len(texts) != 4 or texts[1] != texts[3]:
        return None
    return {
        "concept": head[0],
        "relation": head[1],
        "question": texts[0],
        "answer": texts[1],
        "rephrased_question": texts[2],
    }


def tasks_of(config: dict[str, Any]) -> dict[str, int]:
    """Concept -> task, 0 to 9."""
    return dict(zip(config["CONCEPT_LIST"], config["CONCEPT_2_TASK"], strict=True))


def main() -> None:
    """Write the file, and say how many facts it holds."""
    parser = argparse.ArgumentParser(description="Rewrite the published Concept-1K as gzipped JSON Lines.")
    parser.add_argument("dataset", type=Path, help="folder `dataset` of the authors' repository")
    parser.add_argument("output", type=Path, help="file to write, such as DATA/concept_1k.jsonl.gz")
    arguments = parser.parse_args()
    config = (arguments.dataset / "concept_1k_task10" / "continual_config.json").read_text(encoding="utf-8")
    tasks = tasks_of(json.loads(config))
    found = list(facts((arguments.dataset / "concept_1k" / "dataset.txt").read_text(encoding="utf-8")))
    rows = [{**fact, "task": tasks.get(fact["concept"])} for fact in found if fact is not None]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.output, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} facts in {arguments.output}; left out: {len(found) - len(rows)}")


if __name__ == "__main__":
    main()
