"""A row as a chat: its prompt is the user's turn, its answer the assistant's, in the chat template of the model."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from agcl.errors import AgclError

_ANSWER = "the answer 5d0c"  # what no template says by itself, to see what it puts around an answer


class ChatTurns:
    """The text around a prompt and around its answer in the chat template of a tokenizer.

    A template that can ask for reasoning is told not to (``enable_thinking=False``).

    Args:
        tokenizer: With a chat template, which knows its special tokens.
        system_prompt: The turn before the user's; the template's own, if it has one, where left out.

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
        beginning = self._rendered("question", add_generation_prompt=True)
        whole = self._rendered("question", [{"role": "assistant", "content": _ANSWER}])
        before, answer, after = whole[len(beginning) :].partition(_ANSWER)
        if not whole.startswith(beginning) or not answer:
            raise AgclError(
                "The chat template of the model's tokenizer writes an answered question otherwise than one that is to "
                "be answered: leave `chat_template` out, and write the turns into the tasks' `prompt` and `answer`."
            )
        # What a template writes before every answer, the end of a thought that was not thought, is no part of it; a
        # space is, since tokens begin with one.
        self._end_of_prompt, self._space = (before, "") if before.strip() else ("", before)
        self._after = after.rstrip()

    def prompt(self, text: str) -> str:
        """The user's turn, and the assistant's up to the answer."""
        return self._rendered(text, add_generation_prompt=True) + self._end_of_prompt

    def answer(self, text: str) -> str:
        """The answer and what closes the assistant's turn; white space around an answer is left out."""
        return f"{self._space}{text.strip()}{self._after}"

    def _rendered(self, text: str, turns: list[dict[str, str]] | None = None, **options: Any) -> str:
        turns = [*self._first, {"role": "user", "content": text}, *(turns or [])]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options))
        except Exception as error:  # Jinja's, and whatever a template raises
            raise AgclError(f"The model's chat template refuses the turns: {' '.join(str(error).split())}") from error
