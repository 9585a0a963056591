"""A row as a chat: its prompt is the user's turn, its answer the assistant's, in the chat template of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Value
from transformers import PreTrainedTokenizerBase

from agcl.errors import AgclError

Turn = dict[str, Any]
"""``role``, ``content``, and whatever else a template knows of."""
_ANSWER = "the answer 5d0c"  # what no template says by itself, to see what it puts around an answer
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}  # where the keys are "from" and "value"


def holds_turns(feature: Any) -> bool:
    """Whether a column of a data set holds chats: lists of turns, each with its ``role`` and ``content`` as text.

    The names ``from`` and ``value`` for these count as well, with the roles ``human`` and ``gpt``.

    Args:
        feature: The column's type, from ``Dataset.features``.
    """
    turn = getattr(feature, "feature", None)  # of a list
    texts = (Value("string"), Value("large_string"))
    return isinstance(turn, Mapping) and any(all(turn.get(key) in texts for key in keys) for keys in _KEYS)


def split_chat(turns: Sequence[Mapping[str, Any]] | None) -> tuple[list[Turn], str]:
    """A chat up to its last answer, and that answer.

    Args:
        turns: As :func:`holds_turns` describes them. What a turn does not have may be None.

    Returns:
        The turns before the last one, and the last one's text: empty if it is not the assistant's, or there is none.
    """
    known = [_as_turn(turn) for turn in turns or ()]
    if not known or known[-1]["role"] != "assistant":
        return known, ""
    return known[:-1], str(known[-1].get("content", ""))


def _as_turn(turn: Mapping[str, Any]) -> Turn:
    filled = {key: value for key, value in turn.items() if value is not None}
    if "from" in filled:
        role = filled.pop("from")
        filled |= {"role": _ROLES.get(role, role), "content": filled.pop("value", "")}
    return {"role": "", **filled}


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
                "`chat_template` is set, but the model's tokenizer has none: leave it out, or take a model that was "
                "trained to chat."
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
            raise AgclError(f"The model's chat template refuses the turns: {' '.join(str(error).split())}") from error
