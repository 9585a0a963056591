"""Command line: the commands of `agcl.commands`, and for everything else LightningCLI (`agcl.lightning_cli`)."""

import errno
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentError

from agcl import commands
from agcl.configurations import resolve_arguments
from agcl.errors import is_memory_full, quoting_hint, user_error
from agcl.files import DISK_FULL, MAKE_ROOM
from agcl.trust import denied_import, restrict_imports

DEBUG = "--debug"
_DEBUG_VARIABLE = "AGCL_DEBUG"  # which the processes that a run starts inherit
_LONGEST = 600

# Of a value that fits none of several types the parser explains each. These say nothing of what is wrong.
_NOISE = re.compile(
    r"Does not validate against any|Subtypes: |Errors:$|Given value|Subclass types expect one of|- a (class path|dict) "
    r"|- Not a valid subclass of|- Expected a <class 'NoneType'>$"
)
_LESS_MEMORY = (
    "see `agcl plan` for where it goes; lower `data.batch_size` (and raise `trainer.accumulate_grad_batches`), "
    "`data.eval_batch_size` or `data.max_length`, set `model.gradient_checkpointing`, or end what else holds some"
)
_PERMISSION = "choose a folder that you may write to"
_REMEDIES = {
    **dict.fromkeys(DISK_FULL, f"{MAKE_ROOM}; what was saved before is whole"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST), _PERMISSION),
}

ON_CONFIGURATIONS = {
    "check": (
        "agcl.checking.command",
        "Show what a configuration's rows look like to the model, a forecast, and every problem, without training.",
    ),
    "plan": ("agcl.planning", "Print what memory and time a configuration would take, before anything is loaded."),
}
"""Commands that take what ``agcl fit`` takes: the module whose ``run`` does it, imported on demand; a sentence."""

_CONFIGURATIONS = "Configurations that come with agcl go by name: `--config builtin:quickstart`."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error is printed as one line (exit status 2 for wrong arguments, else 1).

    With ``--debug`` anywhere among the arguments, or ``AGCL_DEBUG=1`` in the environment, it is raised as it is.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in words or os.environ.get(_DEBUG_VARIABLE, "0") not in ("", "0")
    if DEBUG in words:
        words = [word for word in words if word != DEBUG]
        if args is None:
            sys.argv[1:] = words
            os.environ[_DEBUG_VARIABLE] = "1"
    try:
        restrict_imports()
        words = resolve_arguments(words)
        status = _run(words)
    except KeyboardInterrupt:  # Ctrl-C before training, where there is nothing to save
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if debug:
            raise
        line = f"agcl: error: {_one_line(error, words)}"
        if user_error(error) is not None or not isinstance(error, ArgumentError):
            sys.exit(line)
        print(line, file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def _run(words: list[str]) -> int:
    if words and words[0] in commands.COMMANDS:
        return commands.run(words)
    if words and words[0] in ON_CONFIGURATIONS:
        return import_module(ON_CONFIGURATIONS[words[0]][0]).run(words[1:])
    from agcl import lightning_cli  # seconds to import, which the other commands do without

    others = " ".join(f"Besides, `agcl {name}`: {text}" for name, (_, text) in ON_CONFIGURATIONS.items())
    lightning_cli.run(words, epilog=f"{_CONFIGURATIONS} {commands.help_text()} {others}")
    return 0


def _one_line(error: Exception, words: list[str]) -> str:
    """What went wrong and what to do about it."""
    if (ours := user_error(error)) is not None:
        return " ".join(str(ours).split())
    if isinstance(error, ArgumentError):
        return _argument_line(str(error), words)
    text = " ".join(str(error).split())[:_LONGEST]
    if is_memory_full(error):
        return f"Memory is full: {_LESS_MEMORY} ({text[: _LONGEST // 2] or type(error).__name__})"
    if isinstance(error, OSError):  # what the operating system says names its file already
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{text}; {remedy}." if remedy else text
    return f"{type(error).__name__}: {text or 'no message'} (not foreseen; add {DEBUG} to see where)"


def _argument_line(message: str, words: list[str]) -> str:
    """The parser's message, which may be dozens of lines, by what it says of the mistake."""
    if (line := denied_import(message)) is not None:
        return line
    kept = [line.strip() for line in message.splitlines() if not _NOISE.match(line.strip())]
    text = re.sub(r'Parser key "([^"]*)"', r"`\1`", " ".join(" ".join(kept).split()))
    text = text.replace("a typing.Literal", "one of ").replace("Expected a <class 'int'> ", "").replace(" - ", " ")
    return f"{text[:_LONGEST].rstrip('.: ')}.{quoting_hint(text)} See `{_command(words)} --help`."


def _command(words: list[str]) -> str:
    """The words that name a command, without its arguments."""
    known: Any = {**commands.COMMANDS, **dict.fromkeys((*ON_CONFIGURATIONS, "fit", "validate"))}
    found = ["agcl"]
    for word in words:
        if not isinstance(known, Mapping) or word not in known:
            break
        found.append(word)
        known = known[word]
    return " ".join(found)
