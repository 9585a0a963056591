"""The errors a user can cause and mend; the command line prints them as one line."""

import re
from collections.abc import Iterable
from typing import Any, get_args

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


def choice_problem(name: str, value: Any, choices: Any) -> str | None:
    """What to say of an option that is none of the values of a ``typing.Literal``; None, if it is one.

    Args:
        name: The option's.
        value: What the user gave.
        choices: The ``Literal``.
    """
    allowed = get_args(choices)
    return None if value in allowed else f"`{name}` is {value!r}; choose one of {', '.join(map(repr, allowed))}."


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless an option is one of the values of a ``typing.Literal``; see :func:`choice_problem`.

    Raises:
        AgclError: Naming the option, the value and the choices.
    """
    if (problem := choice_problem(name, value, choices)) is not None:
        raise AgclError(problem)


def one_line(error: object, most: int | None = 300) -> str:
    """An error's message in one line, cut where it gets longer than ``most``; its type, if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


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
