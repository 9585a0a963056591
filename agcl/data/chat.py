"""A row as a chat, in the chat template of the model: prompt and answer become its turns, or it is one already."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from agcl.errors import AgclError, one_line

Turn = dict[str, Any]
"""``role``, ``content``, and whatever else a template knows of."""
_ANSWER = "the answer 5d0c"  # what no template says by itself, to see what it puts around an answer
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


def holds_chats(rows: Dataset, column: str) -> bool:
    """Whether a column holds chats: lists of turns, each with its ``role`` and ``content`` as text.

    The names ``from`` and ``value`` for these count as well. The first value that is there decides: where turns differ
    in what they have beside these, the column's type does not say what it holds.
    """
    values = (row[column] for row in rows.select_columns(column))
    first = next((value for value in values if value), None)
    return isinstance(first, list) and all(isinstance(turn, Mapping) and _is_turn(turn) for turn in first)


def split_chat(turns: Sequence[Mapping[str, Any]] | None) -> tuple[list[Turn], str]:
    """A chat up to its last answer, and that answer.

    Args:
        turns: As :func:`holds_chats` describes them. What a turn does not have may be None.

    Returns:
        The turns before the last one, and the last one's text. It is empty unless the last turn is the assistant's, of
        text alone, and answers something.
    """
    known = [_as_turn(turn) for turn in turns or () if turn]
    before, last = known[:-1], known[-1] if known else {}
    is_answer = last.get("role") == "assistant" and "tool_calls" not in last
    is_asked = any(turn["role"] != "system" for turn in before)
    return before, str(last.get("content", "")) if is_answer and is_asked else ""


def _is_turn(turn: Mapping[str, Any]) -> bool:
    return any(role in turn and isinstance(turn.get(text, 0), str | None) for role, text in _KEYS)


def _as_turn(turn: Mapping[str, Any]) -> Turn:
    filled = _filled(turn)
    if "role" not in filled:
        filled |= {"role": filled.pop("from", ""), "content": filled.pop("value", "")}
    return {**filled, "role": _ROLES.get(filled["role"], filled["role"])}


def _filled(value: Any) -> Any:
    """Without what is None in it, as a table writes what a turn does not have."""
    if isinstance(value, Mapping):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


class ChatTurns:
    """Prompts and answers in token ids, as the chat template of a tokenizer writes them.

    A template that can be told not to ask for reasoning is told so (``enable_thinking=False``).

    Args:
        tokenizer: With a chat template, which knows its special tokens.
        system_prompt: The turn before the user's, in chats that do not begin with one of their own; the template's, if
            it has one, where left out.

    Attributes:
        end_token_id: What closes an answer: the template's own token, if it is a single special one, else the
            tokenizer's end of sequence.

    Raises:
        AgclError: If there is no template, it refuses a system prompt, or writes a turn otherwise than it begins it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> None:
        if tokenizer.chat_template is None:
            raise AgclError(
                "`chat_template` is set, but the model's tokenizer has none: take a model that was trained to chat, or "
                "leave it out (which tasks with `messages` cannot)."
            )
        self._tokenizer = tokenizer
        self._first = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        question = [{"role": "user", "content": "question"}]
        beginning = self._rendered(question, add_generation_prompt=True)
        whole = self._rendered([*question, {"role": "assistant", "content": _ANSWER}])
        before, answer, after = whole[len(beginning) :].partition(_ANSWER)
        if not whole.startswith(beginning) or not answer:
            own = "" if system_prompt is None else "`system_prompt` or "
            raise AgclError(
                "The chat template of the model's tokenizer writes an answered question otherwise than one that is to "
                f"be answered: leave {own}`chat_template` out, and write the turns into the tasks' `prompt` and "
                "`answer`."
            )
        # What a template writes before every answer, the end of a thought that was not thought, is no part of it; a
        # space is, since tokens begin with one.
        self._end_of_prompt, self._space = (before, "") if before.strip() else ("", before)
        self._before_answer = beginning + self._end_of_prompt
        self._before_ids = self._ids(self._before_answer)
        closing = self._ids(after.strip())
        is_token = len(closing) == 1 and closing[0] in tokenizer.all_special_ids
        self.end_token_id = int(closing[0] if is_token else tokenizer.eos_token_id)

    def encode_prompt(self, prompt: str | list[Turn]) -> list[int]:
        """The user's turn, or all turns before the answer, and the assistant's up to the answer."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._ids(self._rendered(turns, add_generation_prompt=True) + self._end_of_prompt)

    def encode_answer(self, text: str) -> list[int]:
        """An answer, without white space around it, and its end."""
        answer = self._space + text.strip()
        # Some tokenizers begin a text with a space of their own: what precedes an answer is the same in all rows.
        whole, length = self._ids(self._before_answer + answer), len(self._before_ids)
        ids = whole[length:] if whole[:length] == self._before_ids else self._ids(answer)
        return [*ids, self.end_token_id]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, turns: list[Turn], **options: Any) -> str:
        if not turns or turns[0]["role"] != "system":
            turns = [*self._first, *turns]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options))
        except Exception as error:  # Jinja's, and whatever a template raises
            raise AgclError(f"The model's chat template refuses the turns: {one_line(error, None)}") from error
