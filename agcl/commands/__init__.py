"""Commands beside LightningCLI's, such as ``agcl importance show FILE``. None of them loads Lightning."""

import inspect
from argparse import HelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from docstring_parser import DocstringStyle, parse
from jsonargparse import ArgumentParser, Namespace

from agcl.commands.check_model import check_model
from agcl.commands.compare_methods import compare_methods
from agcl.commands.export import export
from agcl.commands.importance import compare, merge, show
from agcl.commands.init import init
from agcl.commands.report_run import report

Command = Callable[..., int | None]

COMMANDS: dict[str, Command | dict[str, Any]] = {
    "init": init,
    "importance": {
        "_help": "Show, merge and compare importance files.",
        "show": show,
        "merge": merge,
        "compare": compare,
    },
    "check-model": check_model,
    "compare": compare_methods,
    "export": export,
    "report": report,
}
"""What may follow ``agcl``: a function, or a mapping of further words to functions, ``_help`` saying what it is.

A function's signature is its command line: a positional parameter is an argument, ``*names`` one or more of them, a
keyword-only parameter an option, a required one if it has no default; ``bool`` makes a flag. Help is its docstring.
"""

_Parser = partial(ArgumentParser, formatter_class=HelpFormatter, exit_on_error=False)


def run(args: Sequence[str]) -> int:
    """Run the command that the arguments name, the first of which is a key of ``COMMANDS``.

    Returns:
        Exit status: what the command returned, or 0.

    Raises:
        AgclError: What the command refuses.
        ArgumentError: If the arguments are wrong.
    """
    parser = _Parser(prog="agcl")
    _add_commands(parser, "agcl", COMMANDS)
    chosen: Any = COMMANDS
    values = parser.parse_args(list(args))
    while isinstance(chosen, Mapping):
        word = values.subcommand
        chosen, values = chosen[word], values[word]
    return chosen(*_positional(chosen, values), **values.as_dict()) or 0


def help_text() -> str:
    """A sentence on each command, for the help of the whole program."""
    return " ".join(f"Besides, `agcl {name}`: {_summary(entry)}" for name, entry in COMMANDS.items())


def _add_commands(parser: ArgumentParser, prog: str, commands: Mapping[str, Any]) -> None:
    group = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, entry in commands.items():
        if name == "_help":
            continue
        own = _Parser(description=_summary(entry))
        group.add_subcommand(name, own, help=_summary(entry))
        own.prog = f"{prog} {name}"  # adding it has set another
        if isinstance(entry, Mapping):
            _add_commands(own, own.prog, entry)
        else:
            _add_arguments(own, entry)


def _add_arguments(parser: ArgumentParser, function: Command) -> None:
    texts = {entry.arg_name.lstrip("*"): entry.description for entry in _docstring(function).params}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        option, text = f"--{name}", texts.get(name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(name, nargs="+", type=parameter.annotation, metavar="FILE", help=text)
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            parser.add_argument(name, type=parameter.annotation, metavar=name.upper(), help=text)
        elif parameter.annotation is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            required = parameter.default is parameter.empty
            parser.add_argument(option, type=parameter.annotation, default=default, required=required, help=text)


def _positional(function: Command, values: Namespace) -> list[Any]:
    """Take the positional arguments out of ``values``."""
    found: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found += values.pop(name)
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            found.append(values.pop(name))
    return found


def _summary(entry: Any) -> str:
    return entry["_help"] if isinstance(entry, Mapping) else _docstring(entry).short_description or ""


def _docstring(function: Command) -> Any:
    return parse(inspect.getdoc(function) or "", DocstringStyle.GOOGLE)
