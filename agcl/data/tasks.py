"""Declaring tasks, and turning their rows into token ids with the answer marked."""

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from agcl.attribution.rows import IGNORED_LABEL
from agcl.data.chat import ChatTurns, Turn, split_chat
from agcl.data.repeats import Repeats
from agcl.data.sources import is_empty, load_rows, quiet_datasets
from agcl.errors import AgclError, choice_problem, raise_any

TaskMetric = Literal[
    "exact_match", "label_accuracy", "label_ranking", "first_character", "rouge_l", "edit_similarity", "sari"
]
ScoredSplit = Literal["test", "validation"]
Truncation = Literal["error", "left"]


@dataclass
class Probe:
    """Other rows, or another wording, that a task is scored on beside its own test rows.

    Args:
        split: Rows, in the slicing syntax of ``datasets`` (``train[64:96]``); the task's own scored rows if left out.
        prompt: Prompt template; the task's own if left out.
    """

    split: str | None = None
    prompt: str | None = None


@dataclass
class Task:
    """One task of the sequence.

    Args:
        name: Its name in tables, file names and TensorBoard tags.
        source: ``builtin:FOLDER/NAME``, a local JSONL, JSON, CSV, TSV or Parquet file (also gzipped; a relative one is
            looked for in the data module's ``data_dir``), a mapping of split names to such files, or a data set's name
            on the hub.
        prompt: Template of the prompt; ``{column}`` is replaced by the row's value.
        answer: Template of the answer. It is joined to the prompt as it stands, so it usually starts with a space (in
            a chat it makes no difference); the tokenizer's end-of-sequence token is added.
        subset: The hub data set's configuration, if it has several.
        where: Take only rows that hold these values, by column (``{task: 3}``; of a list, any). Splits are sliced after
            that: ``train[:64]`` are the first 64 of these rows.
        drop_empty: Leave out, of a split, rows without a prompt or answer, which are refused otherwise.
        train_split: Rows to learn, in the slicing syntax of ``datasets`` (``train[:64]``).
        test_split: Rows to be scored on. For facts to be memorised, the same as ``train_split``.
        validation_split: Rows to be scored on instead while hyper-parameters are chosen; see ``evaluate_on`` of
            ``ContinualDataModule``.
        probes: Further rows or wordings to be scored on, by name.
        epochs: Passes over the training rows.
        metric: ``exact_match``: share of greedily generated answers that equal the row's. ``label_accuracy``: the same
            for a closed set of labels. ``label_ranking``: share of rows whose own label has the highest likelihood of
            all ``labels``; it hides a forgotten answer format. Of greedily generated answers also, a mean over rows in
            [0, 1]: ``first_character`` (share whose first character is right), ``rouge_l`` (F measure),
            ``edit_similarity``, ``sari`` (the prompt is what was to be simplified); see ``agcl.metrics.text``.
        labels: The closed set of answers (required by the two label metrics), as the rows spell them.
        substitutions: Regular expressions with what replaces them, in this order, in the generated and in the right
            answer before they are compared.
        max_answer_tokens: Longer answers are cut to so many tokens before they are learned (but not before a generated
            answer is compared with them); ``truncation`` is about prompts alone.
        max_new_tokens: Length limit of generated answers in tokens. Without it, that of the longest right answer.
        messages: Column of chats, lists of turns with ``role`` and ``content`` (or ``from`` and ``value``), in the
            place of ``prompt`` and ``answer``: a chat's last turn, the assistant's, is the answer, the turns before it
            are the prompt. Needs the data module's ``chat_template``.

    Raises:
        AgclError: If values are not usable, with a message for each; it names the task.
    """

    name: str
    source: str | dict[str, str]
    prompt: str = "{prompt}"
    answer: str = " {answer}"
    subset: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    drop_empty: bool = False
    train_split: str = "train"
    test_split: str = "test"
    validation_split: str | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    epochs: int = 1
    metric: TaskMetric = "exact_match"
    labels: list[str] | None = None
    substitutions: dict[str, str] = field(default_factory=dict)
    max_answer_tokens: int | None = None
    max_new_tokens: int | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        problems = [f"Task `{self.name}`: {problem}" for problem in self._problems()]
        if not self.name or any(c in self.name for c in "/\\ "):
            problems.insert(0, f"Task name {self.name!r} must not be empty or contain slashes or spaces.")
        raise_any(problems)

    def _problems(self) -> Iterator[str]:
        if self.epochs < 1:
            yield f"`epochs` is {self.epochs}; give at least 1."
        for option in ("max_answer_tokens", "max_new_tokens"):
            limit = getattr(self, option)
            if limit is not None and limit < 1:
                yield f"`{option}` is {limit}; give at least 1."
        if (problem := choice_problem("metric", self.metric, TaskMetric)) is not None:
            yield problem
        if self.metric.startswith("label") and not self.labels:
            yield f"metric `{self.metric}` needs `labels`, the list of possible answers."
        prompts = [self.prompt, *(probe.prompt for probe in self.probes.values() if probe.prompt is not None)]
        for option, template in [("answer", self.answer), *(("prompt", prompt) for prompt in prompts)]:
            if not _is_template(template):
                yield (
                    f"`{option}` is {template!r}; it must hold at least one {{column}} by its plain name. Write {{{{ "
                    "and }} for braces as such."
                )
        if self.messages is not None and [*prompts, self.answer] != [Task.prompt, Task.answer]:
            yield "`messages` holds prompt and answer already: leave `prompt` and `answer` out, also of probes."
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            yield f"`labels` names a label twice: {', '.join(self.labels)}; leave one out."
        if self.labels is not None and _is_template(self.answer) and len(template_columns(self.answer)) != 1:
            yield "with `labels`, `answer` must hold exactly one {column}."
        yield from self._substitution_problems()

    def _substitution_problems(self) -> Iterator[str]:
        if self.substitutions and self.metric.startswith("label"):
            yield f"metric `{self.metric}` compares with `labels`, so `substitutions` cannot be used."
        for pattern, replacement in self.substitutions.items():
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                yield f"the substitution {pattern!r}: {replacement!r} cannot be used: {error}."

    def compared(self, answer: str) -> str:
        """An answer as it is compared: after the substitutions, without surrounding white space."""
        for pattern, replacement in self.substitutions.items():
            answer = re.sub(pattern, replacement, answer)
        return answer.strip()

    def label_answer(self, label: str) -> str:
        """The answer that a row with this label has."""
        return label if self.messages is not None else self.answer.format(**{template_columns(self.answer)[0]: label})

    def split_row(self, row: Mapping[str, Any], prompt: str) -> tuple[str | list[Turn], str]:
        """Prompt and answer of a row.

        Args:
            row: Its values by column.
            prompt: Template; without a meaning for chats.

        Returns:
            The prompt as text, or as a chat's turns, and the answer's text, which is empty in a chat without one.
        """
        if self.messages is not None:
            return split_chat(row[self.messages])
        return prompt.format(**row), self.answer.format(**row)

    def evaluations(self, evaluate_on: ScoredSplit = "test") -> Iterator[tuple[str | None, Probe]]:
        """Yield what the task is scored on: ``(None, its own rows)`` first, then each probe with its name.

        Raises:
            AgclError: If the task declares no ``validation_split`` and is to be scored on it.
        """
        split = self.test_split if evaluate_on == "test" else self.validation_split
        if split is None:
            raise AgclError(
                f"Task `{self.name}` declares no `validation_split`, but `evaluate_on` is `validation`: name the rows "
                "that it is to be scored on, or leave `evaluate_on` at `test`."
            )
        yield None, Probe(split, self.prompt)
        for name, probe in self.probes.items():
            yield name, Probe(probe.split or split, probe.prompt or self.prompt)


def template_columns(template: str) -> list[str]:
    """Names of the columns that a ``{column}`` template refers to."""
    return [name for name in _fields(template) if name]


def columns_of(task: Task, prompt: str) -> list[str]:
    """Names of the columns that a task's rows need under a prompt template."""
    if task.messages is not None:
        return [task.messages]
    return list(dict.fromkeys([*template_columns(prompt), *template_columns(task.answer)]))


def _is_template(template: str) -> bool:
    try:
        return all(name and name.isidentifier() for name in _fields(template)) and bool(template_columns(template))
    except ValueError:  # unbalanced braces
        return False


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


@dataclass(frozen=True)
class TokenisedRow:
    """A row in tokens, before anything is cut.

    Attributes:
        prompt_ids: The prompt's token ids.
        answer_ids: The answer's, closed by the end-of-sequence token.
        answer: The answer's text.
        label: Index of the row's label in the task's ``labels``; -1 if it declares none.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    label: int


class AnswerEncoder:
    """Turns rows into ``prompt + answer + end of sequence`` token ids, the prompt masked in ``labels``.

    Prompt and answer are tokenised apart, so the boundary between them never falls inside a token.

    Args:
        tokenizer: Adds its beginning-of-sequence token to the prompt where it has that habit; a chat's template does.
        max_length: Longest allowed row in tokens.
        truncation: What happens to a longer one: ``error``, or ``left``: the prompt loses its beginning.
        vocab_size: Number of tokens that the model knows, if it may be fewer than the tokenizer has.
        chat: Writes prompt and answer as turns of a chat, in the place of all that.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: Truncation = "error",
        vocab_size: int | None = None,
        chat: ChatTurns | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.vocab_size = vocab_size
        self.chat = chat
        # No token stands for more characters than its own spelling has.
        self._max_characters = max_length * max(map(len, tokenizer.get_vocab()), default=1)

    @property
    def end_token_id(self) -> int:
        """The token that closes every answer: the end of sequence, or of a chat's turn."""
        return int(self.tokenizer.eos_token_id) if self.chat is None else self.chat.end_token_id

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer, closed by :attr:`end_token_id`."""
        if self.chat is not None:
            return self.chat.encode_answer(text)
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_token_id]

    def encode_prompt(self, prompt: str | list[Turn]) -> list[int]:
        """Token ids of a prompt: text, or turns of a chat."""
        return list(self.tokenizer(prompt)["input_ids"]) if self.chat is None else self.chat.encode_prompt(prompt)

    def encode_rows(self, task: Task, split: str, prompt: str) -> Dataset:
        """Load and encode one split.

        Returns:
            A data set with columns ``input_ids`` and ``labels`` (lists of int, equally long; -100 on the prompt),
            ``answer`` (str, stripped) and ``label`` (index in ``task.labels``, or -1).

        Raises:
            AgclError: As :func:`load_rows`; also for an empty or missing value, a label outside the declared set and a
                row that is too long. Names task and row.
        """
        rows = load_rows(task, split, columns_of(task, prompt))
        named = class_names(rows)
        repeats = Repeats()

        def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
            where, values = f"row {index} of `{split}`", named(row)
            tokens = self.tokenise(task, values, prompt, where)
            repeats.add(tokens.prompt_ids, tokens.answer)
            return self.cut(task, tokens, where)

        with quiet_datasets():
            try:
                encoded = rows.map(
                    encode, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
                )
            except UnicodeDecodeError as error:  # which the reader of JSON leaves to whoever looks at a text
                raise AgclError(
                    f"Task `{task.name}`: {task.source} is not in UTF-8, so convert it ({error})."
                ) from error
        repeats.warn(task.name, split)
        return encoded

    def tokenise(self, task: Task, row: Mapping[str, Any], prompt: str, where: str) -> TokenisedRow:
        """Prompt and answer of a row in tokens, whatever their length.

        Args:
            task: The row's.
            row: Its values by column.
            prompt: Template.
            where: What the row is called in messages.

        Raises:
            AgclError: For each empty or missing value, a chat without an answer or that its template refuses, or a
                label outside the declared set.
        """
        raise_any(
            f"Task `{task.name}`: column `{column}` is empty in {where}; `drop_empty` leaves such rows out."
            for column in columns_of(task, prompt)
            if column != task.messages and is_empty(row[column])
        )
        question, answer = task.split_row(row, prompt)
        if is_empty(answer):
            raise AgclError(
                f"Task `{task.name}`: the chat in {where} does not end in an answer of the assistant's, a turn of text "
                "alone after another's; `drop_empty` leaves such rows out."
            )
        label = -1
        if task.labels is not None:
            value = answer.strip() if task.messages is not None else str(row[template_columns(task.answer)[0]])
            if value not in task.labels:
                raise AgclError(
                    f"Task `{task.name}`: {where} has the label {value!r}, which is not among `labels` "
                    f"({', '.join(task.labels)})."
                )
            label = task.labels.index(value)
        characters = len(question) if isinstance(question, str) else sum(len(str(t.get("content"))) for t in question)
        if self.truncation == "error" and characters > self._max_characters:  # whose tokens would take minutes to count
            size = f"a prompt of {characters} characters, more than {self.max_length} tokens hold"
            raise self._too_long(task, where, size)
        try:
            prompt_ids = self.encode_prompt(question)
        except AgclError as error:  # a chat's template
            raise AgclError(f"Task `{task.name}`: {where}: {error}") from error
        tokens = TokenisedRow(prompt_ids, self.encode_answer(answer), answer, label)
        largest = max([*tokens.prompt_ids, *tokens.answer_ids])
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise AgclError(
                f"Task `{task.name}`: {where} has the token {largest}, but the model knows only {self.vocab_size}: it "
                "and the tokenizer do not belong together, so put the model's own beside it."
            )
        return tokens

    def cut(self, task: Task, row: TokenisedRow, where: str) -> dict[str, Any]:
        """A row as it is learned, in the form that :meth:`encode_rows` gives.

        Raises:
            AgclError: If it is too long and must not, or cannot, be cut.
        """
        answer_ids = row.answer_ids[: task.max_answer_tokens]
        if len(answer_ids) >= self.max_length:
            raise AgclError(
                f"Task `{task.name}`: {where} has an answer of {len(answer_ids)} tokens, which with a prompt is more "
                f"than the {self.max_length} allowed. Shorten it, set `max_answer_tokens`, or choose a model with a "
                "longer context."
            )
        prompt_ids = row.prompt_ids
        excess = len(prompt_ids) + len(answer_ids) - self.max_length
        if excess > 0:
            if self.truncation == "error" or excess >= len(prompt_ids):
                size = f"{len(prompt_ids)} + {len(answer_ids)} tokens (prompt + answer)"
                raise self._too_long(task, where, f"{size}, more than the {self.max_length} allowed")
            prompt_ids = prompt_ids[excess:]
        return {
            "input_ids": prompt_ids + answer_ids,
            "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids,
            "answer": row.answer.strip(),
            "label": row.label,
        }

    def _too_long(self, task: Task, where: str, size: str) -> AgclError:
        remedies = ["shorten it", "raise `max_length` if the model's context allows"]
        remedies += [] if self.chat is not None else ["set `truncation: left`"]
        return AgclError(f"Task `{task.name}`: {where} has {size}; {', '.join(remedies[:-1])}, or {remedies[-1]}.")


def class_names(rows: Dataset) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that puts, in a row, the names of class labels in place of their numbers."""
    names = {column: f for column, f in rows.features.items() if isinstance(f, ClassLabel)}
    return lambda row: {c: names[c].int2str(v) if c in names and v is not None else v for c, v in row.items()}


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Pad rows on the left to the longest one.

    Left padding puts all answers at the end, so that the vocabulary projection is needed on the last positions only.

    Returns:
        ``input_ids``, ``labels`` (int64, shape ``(batch, length)``), ``attention_mask`` (int64, 1 on tokens), ``label``
        (int64, shape ``(batch,)``), ``answer`` (list of str) and ``counts`` (bool, shape ``(batch,)``): False where a
        row only fills the batch up.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def padded(column: str, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (length - len(row[column])) + list(row[column]) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED_LABEL),
        "attention_mask": (torch.arange(length) >= length - lengths[:, None]).long(),
        "label": torch.tensor([row["label"] for row in rows]),
        "answer": [row["answer"] for row in rows],
        "counts": torch.tensor([bool(row.get("counts", True)) for row in rows]),
    }
