"""What became of each task and of each answer: the numbers of the page, from the score matrix and the answers."""

from dataclasses import dataclass
from typing import Any

from agcl.reporting.record import RunRecord

CHANGE = 0.5
"""A score that falls (rises) by this much or more counts as forgotten (learned later); exact scores are 0 or 1."""


@dataclass(frozen=True)
class TaskOutcome:
    """One task's scores; None is what was not measured or does not exist.

    Attributes:
        name: The task's.
        before: Before any training.
        learned: Right after the task was learned.
        best: The best one from the first task's end until before the last one's.
        last: After the last task learned so far.
        forgetting: ``best - last``; None for the task learned last, and for those not learned yet.
    """

    name: str
    before: float | None
    learned: float | None
    best: float | None
    last: float | None
    forgetting: float | None


def task_outcomes(record: RunRecord) -> list[TaskOutcome]:
    """Each task's outcome, as the metric ``forgetting`` has it: its mean is that of the last column's numbers."""
    scores, num_learned = record.results["scores"], record.num_learned
    outcomes = []
    for index, name in enumerate(record.tasks):
        column = [row[index] for row in scores]
        earlier = [value for value in column[1:num_learned] if value is not None]
        learned = column[num_learned if record.is_joint else index + 1]
        best, last = max(earlier, default=None), column[num_learned]
        is_over = not record.is_joint and index + 1 < num_learned and None not in (best, last)
        forgetting = best - last if is_over and best is not None else None
        outcomes.append(TaskOutcome(name, column[0], learned, best if is_over else None, last, forgetting))
    return outcomes


@dataclass(frozen=True)
class Example:
    """A row and the answers to it at three moments; None where there was no scoring.

    Attributes:
        prompt: As the model saw it.
        right: The right answer.
        before: Before any training.
        learned: Right after its task was learned.
        last: After the last task learned so far.
        fate: ``forgotten``, ``kept``, ``learned later``, ``never learned`` or, before its task's turn, ``to come``.
    """

    prompt: str
    right: str
    before: dict[str, Any] | None
    learned: dict[str, Any] | None
    last: dict[str, Any] | None
    fate: str


def examples(record: RunRecord) -> dict[str, list[Example]]:
    """Task to its rows, the forgotten ones first."""
    found = {}
    for index, task in enumerate(record.tasks):
        when = record.num_learned if record.is_joint else index + 1
        rows = [_example(row, when, record.num_learned) for row in record.answers.get(task, [])]
        if rows:
            found[task] = sorted(rows, key=lambda row: row.fate != "forgotten")  # stable: else in the rows' order
    return found


def _example(row: dict[str, Any], when_learned: int, num_learned: int) -> Example:
    answers = {answer["after"]: answer for answer in row["answers"]}
    before, learned, last = answers.get(0), answers.get(when_learned), answers.get(num_learned)
    if when_learned > num_learned:
        fate = "to come"
    else:
        fate = fate_of(learned["score"] if learned else None, last["score"] if last else None)
    return Example(row["prompt"], row["right"], before, learned, last, fate)


def fate_of(learned: float | None, last: float | None) -> str:
    """What became of an answer, from its scores when its task was learned and now.

    Example:
        >>> fate_of(1.0, 0.0), fate_of(1.0, 1.0), fate_of(0.0, 1.0), fate_of(0.0, 0.0)
        ('forgotten', 'kept', 'learned later', 'never learned')
    """
    if learned is None or last is None:
        return "unknown"
    if learned - last >= CHANGE:
        return "forgotten"
    if last - learned >= CHANGE:
        return "learned later"
    return "kept" if learned >= CHANGE else "never learned"
