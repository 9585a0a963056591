"""What a model answered to the same rows, before training and after each task: the examples beside the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

_MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Answer:
    """A row and what the model answered to it.

    Attributes:
        prompt: The prompt as the model saw it, special tokens left out.
        right: The right answer.
        given: The model's; the label it chose; only the beginning, where that shows already that it is wrong.
        score: Of the given answer by the task's metric, in [0, 1].
    """

    prompt: str
    right: str
    given: str
    score: float


class AnswerRecord:
    """Answers to the same few rows of each task at each scoring, as plain values for JSON and checkpoints.

    What is kept is bounded: prompts and right answers once, long texts without their middle.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, list[dict[str, Any]]] = {}

    def enter(self, task: str, num_learned: int, answers: Sequence[Answer]) -> None:
        """Enter the answers of one scoring; those of an earlier one after as many tasks are replaced.

        Args:
            task: Name of the task that the rows are of.
            num_learned: Number of tasks learned by then.
            answers: To the same rows in the same order each time.
        """
        if not answers:
            return
        rows = self._tasks.get(task, [])
        if [row["right"] for row in rows] != [shortened(answer.right) for answer in answers]:
            rows = [{"prompt": shortened(a.prompt), "right": shortened(a.right), "answers": []} for a in answers]
            self._tasks[task] = rows
        for row, answer in zip(rows, answers, strict=True):
            kept = [entry for entry in row["answers"] if entry["after"] != num_learned]
            kept.append({"after": num_learned, "given": shortened(answer.given), "score": answer.score})
            row["answers"] = sorted(kept, key=lambda entry: entry["after"])

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Task name to rows.

        Each row has ``prompt``, ``right`` and ``answers``: a list with ``after`` (number of tasks learned), ``given``
        and ``score``.
        """
        return self._tasks

    @classmethod
    def from_dict(cls, tasks: Mapping[str, list[dict[str, Any]]]) -> Self:
        """What :meth:`as_dict` gave."""
        record = cls()
        record._tasks = dict(tasks)
        return record


def shortened(text: str, limit: int = _MAX_CHARACTERS) -> str:
    """The text, or its beginning and end where it is longer than ``limit`` characters.

    Example:
        >>> shortened("abcdefghij", limit=7)
        'abc ... hij'
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
