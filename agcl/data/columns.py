"""What a data set's columns are for, guessed from their names and contents."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from datasets import ClassLabel, Dataset, Value

from agcl.data.chat import holds_chats, split_chat
from agcl.data.sources import is_empty
from agcl.data.tasks import class_names
from agcl.errors import AgclError

Role = Literal["prompt", "answer", "chat", "left out"]

ANSWER_NAMES = (
    *("answer", "answers", "response", "output", "completion", "target", "reply", "solution", "gold", "label_text"),
    *("label_name", "label", "labels", "category", "class", "sentiment", "intent", "topic", "department", "summary"),
    *("translation", "highlights", "y"),
)
"""Names of columns that hold the answer; the first one found counts."""
PROMPT_NAMES = (
    *("system", "instruction", "context", "passage", "title", "subject", "premise", "sentence1", "prompt", "question"),
    *("query", "input", "text", "sentence", "sentence2", "hypothesis", "document", "article", "body", "message"),
    *("content", "review", "comment", "description", "source", "utterance", "ticket", "choices", "options"),
)
"""Names of columns that belong to the prompt."""
_IDENTIFIERS = ("id", "idx", "index", "uid", "uuid", "guid")
MAX_LABELS = 20
"""An answer with more distinct values is not taken for a label."""
_MAX_LABEL_CHARACTERS = 40
_CHAT = "lists of turns"


@dataclass
class Column:
    """A column, what it holds, and what it is taken for.

    Attributes:
        name: Its name.
        num_values: Number of values that are not empty. Of a chat, its answer is meant by its value.
        num_empty: Number of those that are.
        counts: Each value, as text, with its number of rows.
        role: What it is taken for.
        reason: Why.
    """

    name: str
    num_values: int
    num_empty: int
    counts: Counter[str] = field(repr=False)
    role: Role = "left out"
    reason: str = "not needed"

    @property
    def median_characters(self) -> float:
        """Of the values that are not empty; 0 if there are none."""
        return statistics.median(map(len, self.counts.elements())) if self.num_values else 0.0

    @property
    def example(self) -> str:
        """The first value."""
        return next(iter(self.counts), "")

    @property
    def is_closed_set(self) -> bool:
        """Whether the values are few and short, and come back: labels."""
        few = 2 <= len(self.counts) <= MAX_LABELS and 2 * len(self.counts) <= self.num_values
        return few and all(len(value) <= _MAX_LABEL_CHARACTERS and "\n" not in value for value in self.counts)


def guess_columns(splits: Mapping[str, Dataset]) -> list[Column]:
    """Say of each column whether it is part of the prompt, the answer, a chat that holds both, or left out.

    The first column of chats that end in an answer, if there is one, makes all others needless. Otherwise:
    The answer is the first of ``ANSWER_NAMES`` that is there; else a column of few distinct values; else the last one.
    The prompt are all columns named in ``PROMPT_NAMES``; else the one with the longest text. Identifiers, constants,
    columns that are partly empty (unless there is no other), lists and structures are left out.

    Args:
        splits: Rows by split, all with the same columns.

    Returns:
        The columns in their order. There is a single ``answer``, or a single ``chat``.

    Raises:
        AgclError: If there are not two usable columns.
    """
    columns = _measure(splits)
    for column in columns:
        if column.reason == _CHAT and column.num_values:
            column.role = "chat"
            return columns
    usable = [column for column in columns if not _refuse(column)]
    if len(usable) < 2:
        found = ", ".join(f"{column.name} ({column.reason})" for column in columns if column not in usable)
        raise AgclError(
            f"Two columns at least are needed, one to ask with and one to answer with; usable are "
            f"{', '.join(column.name for column in usable) or 'none'}, not {found or 'anything else'}."
        )
    answer = _mark_answer(usable)
    _mark_prompt([column for column in usable if column is not answer])
    return columns


def _measure(splits: Mapping[str, Dataset]) -> list[Column]:
    columns = []
    first = next(iter(splits.values()))
    for name, feature in first.features.items():
        is_chat = holds_chats(first, name)
        counts: Counter[str] = Counter()
        num_empty = 0
        for rows in splits.values():
            decode = class_names(rows)
            for value in rows[name][:] if name in rows.column_names else ():
                text = split_chat(value)[1].strip() if is_chat else decode({name: value})[name]
                if is_empty(text):
                    num_empty += 1
                else:
                    counts[str(text)] += 1
        columns.append(Column(name, counts.total(), num_empty, counts))
        if is_chat:
            columns[-1].reason = _CHAT if counts else "chats without an answer, not text"
        elif not isinstance(feature, (Value, ClassLabel)):
            columns[-1].reason = f"{type(feature).__name__.lower()}, not text"
    return columns


def _refuse(column: Column) -> bool:
    """Whether a column cannot be used; its reason then says why."""
    if column.reason.endswith("not text"):
        return True
    if not column.name.isidentifier():
        column.reason = "rename it: no plain word"
    elif column.num_values == 0:
        column.reason = "empty"
    elif len(column.counts) == 1 and column.num_values > 1:
        column.reason = "the same in every row"
    elif column.name.lower() in _IDENTIFIERS or column.name.lower().endswith("_id"):
        column.reason = "an identifier"
    else:
        return False
    return True


def _mark_answer(usable: Sequence[Column]) -> Column:
    by_name = {column.name.lower(): column for column in reversed(usable)}
    named = next((by_name[name] for name in ANSWER_NAMES if name in by_name), None)
    unknown = [column for column in usable if column.name.lower() not in PROMPT_NAMES] or list(usable)
    labels = [column for column in unknown if column.is_closed_set]
    if named is not None:
        answer, reason = named, "by its name"
    elif labels:
        answer, reason = labels[-1], "few distinct values"
    else:
        answer, reason = unknown[-1], "the last column"
    answer.role, answer.reason = "answer", reason
    return answer


def _mark_prompt(rest: Sequence[Column]) -> None:
    full = [column for column in rest if column.num_empty == 0]
    for column in rest:
        if column not in full:
            column.reason = f"empty in {column.num_empty} rows"
    candidates = full or rest
    named = [column for column in candidates if column.name.lower() in PROMPT_NAMES]
    # An answer-like column beside the answer would give it away.
    others = [column for column in candidates if column.name.lower() not in ANSWER_NAMES] or candidates
    chosen = named or [max(others, key=lambda column: column.median_characters)]
    for column in chosen:
        column.role, column.reason = "prompt", "by its name" if named else "the longest text"
    for column in rest:
        if column.role == "left out" and column.reason == "not needed":
            is_twin = column.name.lower() in ANSWER_NAMES
            column.reason = "may give the answer away" if is_twin else "neither named nor longest"
