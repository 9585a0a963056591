"""Reading a configuration with all its mistakes, where ``agcl fit`` stops at the first."""

import re
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from agcl.errors import AgclError, quoting_hint, user_error
from agcl.lightning_cli import FitConfiguration

_PLACEHOLDER = {"name": "placeholder", "source": "placeholder"}
_LISTS = (("trainer", "callbacks"), ("trainer", "logger"))  # whose items are looked at one by one


class LenientConfiguration(FitConfiguration):
    """Reads what ``agcl fit`` would be given, leaves out what cannot be used, and goes on.

    Attributes:
        problems: A sentence on everything that was left out.
        config: The rest.
        is_usable: Whether there is a rest; without, ``config`` is empty.
    """

    def __init__(self, args: Sequence[str], *, prog: str, description: str, options: type | None = None) -> None:
        self.problems: list[str] = []
        self.is_usable = True
        super().__init__(args, prog=prog, description=description, options=options)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; where that fails, find each mistake, and parse what is left."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            files, words = _split_words(self._args)
            content = _Content(parser, files)
            self.problems += content.problems or [_one_line(error)]
            self._parse_rest(parser, content, words)
        self.config.seed_everything = False

    def before_instantiate_classes(self) -> None:
        """Check what may run code; where a file alone asks for it, go on without."""
        if not self.is_usable:
            return
        try:
            super().before_instantiate_classes()
        except AgclError as error:
            self.problems += error.problems
            self.config.model.trust_remote_code = self.config.data.trust_remote_code = False

    def _parse_rest(self, parser: LightningArgumentParser, content: "_Content", words: list[str]) -> None:
        """Parse the usable part of the files with the other words of the command line."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "usable.yaml"
            path.write_text(yaml.safe_dump(content.usable, allow_unicode=True), encoding="utf-8")
            try:
                self.config = parser.parse_args(["--config", str(path), *words])
            except ArgumentError as error:
                self.is_usable, self.config = False, Namespace()
                if content.problems and content.has_tasks:  # without a task nothing else was to be expected
                    self.problems.append(_one_line(error))


@dataclass
class _Content:
    """What the configuration files hold, merged as the parser does: later ones win, lists are replaced.

    Attributes:
        usable: What the parser takes.
        problems: A sentence on everything else.
    """

    parser: LightningArgumentParser
    files: list[str]
    usable: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        merged: dict[str, Any] = {}
        for file in self.files:
            try:
                read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                return  # the parser's own message says it all
            _merge(merged, read if isinstance(read, dict) else {})
        self.usable = merged
        for section, values in list(merged.items()):
            if isinstance(values, dict) and self._accepts({section: {}}):
                for option in list(values):
                    self._check_option(section, option)
            else:
                self._check({section: values}, section, partial(merged.pop, section))

    @property
    def has_tasks(self) -> bool:
        """Whether a task is left."""
        data = self.usable.get("data")
        return isinstance(data, dict) and bool(data.get("tasks"))

    def _check_option(self, section: str, option: str) -> None:
        values = self.usable[section]
        value = values[option]
        if (section, option) == ("data", "tasks") and isinstance(value, list):
            values[option] = [task for number, task in enumerate(value, 1) if self._check_task(task, number)]
        elif (section, option) in _LISTS and isinstance(value, list):
            for item in list(value):
                self._check({section: {option: [item]}}, f"{section}.{option}", partial(value.remove, item))
        else:
            self._check({section: {option: value}}, f"{section}.{option}", partial(values.pop, option))

    def _check_task(self, task: Any, number: int) -> bool:
        """Whether anything of a task is left; its unusable options are taken out."""
        if not isinstance(task, dict):
            self.problems.append(
                f"data.tasks: task {number} is {task!r}; a task is a mapping with a `name` and a `source`."
            )
            return False
        where = f"Task `{task['name']}`" if "name" in task else f"Task {number} of `data.tasks`"
        missing = [option for option in _PLACEHOLDER if option not in task]
        self.problems += [f"{where} has no `{option}`." for option in missing]
        for option, value in list(task.items()):
            piece = {"data": {"tasks": [_PLACEHOLDER | {option: value}]}}
            self._check(piece, f"{where}, `{option}`", partial(task.pop, option))
        return all(option in task for option in _PLACEHOLDER)

    def _check(self, piece: dict[str, Any], where: str, leave_out: Callable[[], Any]) -> None:
        try:
            self._parse(piece)
        except ArgumentError as error:
            self.problems.append(f"{where}: {_one_line(error)}")
            leave_out()

    def _accepts(self, piece: dict[str, Any]) -> bool:
        try:
            self._parse(piece)
        except ArgumentError:
            return False
        return True

    def _parse(self, piece: dict[str, Any]) -> None:
        whole = deepcopy(piece)
        data = whole.setdefault("data", {})
        if isinstance(data, dict):
            data.setdefault("tasks", [dict(_PLACEHOLDER)])
        self.parser.parse_object(whole)


def build(kind: type, options: Any) -> Any:
    """Make an object of a class with the options that the configuration has for it.

    Args:
        kind: The class.
        options: A namespace of its arguments, or of ``class_path`` and ``init_args`` of a subclass.

    Raises:
        AgclError: If it refuses them; other errors of libraries are put in its words.
    """
    parser = ArgumentParser(exit_on_error=False)
    values = options.as_dict() if isinstance(options, Namespace) else dict(options)
    if "class_path" in values:
        parser.add_argument("--it", type=kind)
    else:
        parser.add_class_arguments(kind, "it")
    try:
        return parser.instantiate(parser.parse_object({"it": values})).it
    except Exception as error:  # each class has its own
        ours = user_error(error)
        raise ours if ours is not None else AgclError(_one_line(error)) from error


def _split_words(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names, and the other words."""
    files, words, rest = [], [], iter(args)
    for word in rest:
        if word in ("--config", "-c"):
            files.append(next(rest, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            words.append(word)
    return files, words


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "class_path" not in value:
            _merge(into[key], value)
        else:
            into[key] = value


def _one_line(error: BaseException) -> str:
    """What a parser says, without what it says of alternatives and of where it was."""
    text = re.sub(r"<class '([^']*)'>|typing\.(?=Literal|Callable)", r"\1", " ".join(str(error).split()))
    alternatives = re.search(r"Errors: - (.*?)(?= - (?:Not a|Expected|Does|Problem)|$)", text)
    text = alternatives[1] if alternatives else text
    text = re.sub(r"^(?:(?:Parser key \"[^\"]*\"|Problem with given class_path '[^']*Task'):\s*)+", "", text)
    return f"{text.rstrip('.')}.{hint}" if (hint := quoting_hint(text)) else text
