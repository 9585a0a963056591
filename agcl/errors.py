"""The errors a user can cause and mend; the command line prints them as one line."""

import re
from collections.abc import Iterable

_MEMORY_FULL = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", re.IGNORECASE)


class AgclError(ValueError):
    """A setting, file or model that cannot work; each message names it and the remedy in one line.

    It takes one message, or several that were found together, in the order of finding. Printed is the first of them,
    and how many follow; ``agcl check`` prints all.
    """

    @property
    def problems(self) -> tuple[str, ...]:
        """All messages."""
        return tuple(map(str, self.args))

    def __str__(self) -> str:
        first, *others = self.problems or ("",)
        return f"{first} ({len(others)} more: `agcl check` lists all)" if others else first


class UnsupportedModelError(AgclError):
    """A model or one of its operations that attribution cannot see into."""


def raise_any(problems: Iterable[str]) -> None:
    """Raise one error for all problems; nothing, if there are none.

    Raises:
        AgclError: With all of them.
    """
    if found := tuple(problems):
        raise AgclError(*found)


def user_error(error: BaseException | None) -> AgclError | None:
    """The error of ours behind one that a parser raised while it built an object from its configuration."""
    while error is not None and not isinstance(error, AgclError):
        error = error.__cause__ or error.__context__
    return error


def quoting_hint(text: str) -> str:
    """What to do about a parser's message, if text was wanted and YAML took it for a number or a truth value."""
    is_typed = re.search(r"Expected a (<class 'str'>|str)\. Got value: (-?[\d.]|True|False)", text)
    return " In YAML, put it in quotes." if is_typed else ""


def is_memory_full(error: BaseException) -> bool:
    """Whether memory ran out, of the host or an accelerator: torch says so with several types, some only in words."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _MEMORY_FULL.search(str(error)) is not None
    )
