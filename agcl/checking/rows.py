"""A task's rows as the model will see them, and what is wrong with them."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from agcl.data.sources import load_rows
from agcl.data.tasks import IGNORED_LABEL, AnswerEncoder, ScoredSplit, Task, TokenisedRow, class_names, columns_of
from agcl.errors import AgclError

_MAX_KINDS = 12  # of problems of a split's rows that are told apart


@dataclass(frozen=True)
class ShownRow:
    """A row to look at.

    Attributes:
        index: In its split.
        prompt: Its tokens as text, special ones included, after cutting.
        answer: The same of the answer.
        prompt_tokens: Their number, after cutting.
        answer_tokens: The same of the answer, end-of-sequence token included.
        prompt_cut: Number of tokens that the prompt lost at its beginning.
        answer_cut: Number of tokens that the answer lost at its end.
    """

    index: int
    prompt: str
    answer: str
    prompt_tokens: int
    answer_tokens: int
    prompt_cut: int
    answer_cut: int


@dataclass
class SplitCheck:
    """What there is to say of one split of a task.

    Attributes:
        use: What it is for: ``train``, ``test``, ``validation``, or a probe's name.
        split: The split, as the task names it.
        num_rows: Number of its rows, those with problems included.
        lengths: Tokens of each row without problems, after cutting.
        answer_lengths: The same of the answers alone.
        prompts_cut: Tokens that prompts lost, of those rows that lost some.
        answers_cut: The same of answers.
        shown: The first rows, and the first one that was cut.
        labels: Label -> number of rows.
        prompts: Each prompt's text, before cutting, with the answers that it has.
        unknown_tokens: Rows with a character that the tokenizer does not know.
        largest_id: Largest token id met.
        sample: The first encoded row; None if there is none.
        problems: A sentence on each kind of problem.
    """

    use: str
    split: str
    num_rows: int = 0
    lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    prompts_cut: list[int] = field(default_factory=list)
    answers_cut: list[int] = field(default_factory=list)
    shown: list[ShownRow] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    prompts: dict[tuple[int, ...], set[str]] = field(default_factory=dict)
    unknown_tokens: int = 0
    largest_id: int = -1
    sample: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


def check_splits(
    task: Task, encoder: AnswerEncoder | None, evaluate_on: ScoredSplit, num_shown: int
) -> list[SplitCheck]:
    """Look at every row that is learned or scored on.

    Args:
        task: The task.
        encoder: With the model's tokenizer and the run's limits; without it, rows are loaded and no more.
        evaluate_on: As in ``ContinualDataModule``.
        num_shown: Rows of each split to be shown.

    Returns:
        The training split, then what the task is scored on.
    """
    wanted = [("train", task.train_split, task.prompt)]
    try:
        evaluations = list(task.evaluations(evaluate_on))
    except AgclError:  # it has no such split, which the data module says
        evaluations = []
    wanted += [(name or evaluate_on, str(probe.split), str(probe.prompt)) for name, probe in evaluations]
    checks = []
    for use, split, prompt in wanted:
        check = SplitCheck(use, split)
        checks.append(check)
        rows = _load(check, task, prompt)
        if rows is not None:
            check.num_rows = len(rows)
            if encoder is not None:
                _check_rows(check, task, encoder, rows, prompt, num_shown)
    return checks


def _load(check: SplitCheck, task: Task, prompt: str) -> Dataset | None:
    """The rows of a split; also where another split's file is missing."""
    tasks = [task]
    if isinstance(task.source, dict):
        there = {split: file for split, file in task.source.items() if Path(file).expanduser().is_file()}
        if 0 < len(there) < len(task.source):
            tasks.append(replace(task, source=there))
    for attempt in tasks:
        try:
            return load_rows(attempt, check.split, columns_of(task, prompt))
        except AgclError as error:
            # Of a file that is missing, that its split is unknown then is no news.
            if attempt is task or check.split.split("[")[0] in attempt.source:
                check.problems += error.problems
    return None


def notes_on(task: Task, checks: list[SplitCheck], is_chat: bool = False) -> Iterator[str]:
    """What is allowed, but seldom meant; in a chat the template stands between prompt and answer."""
    train = checks[0]
    if not (is_chat or task.answer[:1].isspace() or task.prompt[-1:].isspace()):
        yield f"`answer` ({task.answer!r}) follows the prompt without a space."
    unlearned = [label for label in task.labels or () if label not in train.labels]
    if unlearned and train.labels:
        yield f"No training row has the label {', '.join(unlearned)}."
    contradicting = sum(len(answers) > 1 for answers in train.prompts.values())
    if contradicting:
        yield f"{contradicting} training prompts occur with different answers."
    for check in checks:
        if check.answers_cut:
            most = max(check.answers_cut)
            yield f"{check.use}: {len(check.answers_cut)} answers lose up to {most} tokens at their end."
        if check.unknown_tokens:
            yield f"{check.use}: {check.unknown_tokens} rows hold characters that the tokenizer does not know."
        if check is train:
            continue
        limit = task.max_new_tokens
        too_long = sum(length > limit for length in check.answer_lengths) if limit is not None else 0
        if too_long:
            yield f"{check.use}: {too_long} answers are longer than `max_new_tokens`, so they cannot be given."
        known = sum(prompt in train.prompts for prompt in check.prompts)
        if known and check.split != train.split:
            yield f"{check.use}: {known} of {len(check.prompts)} prompts are learned too."


def _check_rows(
    check: SplitCheck, task: Task, encoder: AnswerEncoder, rows: Dataset, prompt: str, num_shown: int
) -> None:
    kinds: dict[str, list[tuple[int, str]]] = {}
    decode = class_names(rows)
    for index, values in enumerate(rows):
        where = f"row {index} of `{check.split}`"
        try:
            row = encoder.tokenise(task, decode(values), prompt, where)
            encoded = encoder.cut(task, row, where)
        except AgclError as error:
            for problem in error.problems:
                kinds.setdefault(_kind(problem), []).append((index, problem))
        else:
            _take_in(check, task, encoder, index, row, encoded, num_shown)
    for found in list(kinds.values())[:_MAX_KINDS]:
        check.problems.append(found[0][1] + _others([index for index, _ in found[1:]]))
    if len(kinds) > _MAX_KINDS:
        rest = sum(len(found) for found in list(kinds.values())[_MAX_KINDS:])
        check.problems.append(f"Task `{task.name}`: {rest} more rows of `{check.split}` cannot be used either.")


def _take_in(
    check: SplitCheck,
    task: Task,
    encoder: AnswerEncoder,
    index: int,
    row: TokenisedRow,
    encoded: dict[str, Any],
    num_shown: int,
) -> None:
    num_prompt = encoded["labels"].count(IGNORED_LABEL)
    ids = encoded["input_ids"]
    prompt_cut = len(row.prompt_ids) - num_prompt
    answer_cut = len(row.answer_ids) - (len(ids) - num_prompt)
    check.lengths.append(len(ids))
    check.answer_lengths.append(len(ids) - num_prompt)
    check.prompts_cut += [prompt_cut] if prompt_cut else []
    check.answers_cut += [answer_cut] if answer_cut else []
    check.prompts.setdefault(tuple(row.prompt_ids), set()).add(row.answer)
    check.unknown_tokens += encoder.tokenizer.unk_token_id is not None and encoder.tokenizer.unk_token_id in ids
    check.sample = check.sample or encoded
    check.largest_id = max(check.largest_id, *ids)
    if task.labels is not None:
        check.labels[task.labels[row.label]] += 1
    is_first_cut = (prompt_cut or answer_cut) and not any(row.prompt_cut or row.answer_cut for row in check.shown)
    if len(check.shown) < num_shown or (num_shown and is_first_cut):
        prompt, answer = (str(encoder.tokenizer.decode(part)) for part in (ids[:num_prompt], ids[num_prompt:]))
        check.shown.append(ShownRow(index, prompt, answer, num_prompt, len(ids) - num_prompt, prompt_cut, answer_cut))


def _kind(problem: str) -> str:
    """The same for all rows with this problem."""
    return re.sub(r"row \d+ of|\d+ \+ \d+ tokens", "", problem)


def _others(indices: list[int]) -> str:
    if not indices:
        return ""
    more = ", ..." if len(indices) > 5 else ""
    return f" So it is in {len(indices)} more ({', '.join(map(str, indices[:5]))}{more})."
