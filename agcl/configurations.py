"""Configurations: those that come with the package, by name (``builtin:method/ewc``), and the callbacks of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agcl.errors import AgclError

PREFIX = "builtin:"
_OPTIONS = ("--config", "-c")


def configurations_folder() -> Path:
    """Where they lie: inside an installed package, and beside it in a checkout (``lightning_configs/``)."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "lightning_configs"


def configuration_names() -> list[str]:
    """All names that may follow ``builtin:``, sorted."""
    folder = configurations_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def resolve_configuration(path: str) -> str:
    """The file that a ``builtin:`` name means; any other path as it is.

    Raises:
        AgclError: If there is no built-in configuration of that name.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    names = configuration_names()
    if name not in names:
        beside = [other for other in names if _folder(other) == _folder(name)]
        folders = sorted({f"{_folder(other)}/..." for other in names if _folder(other) not in ("", _folder(name))})
        choice = ", ".join([*beside, *folders])
        raise AgclError(f"There is no built-in configuration `{name}`. Choose one of: {choice}.")
    return str(configurations_folder() / f"{name}.yaml")


def resolve_arguments(words: Sequence[str]) -> list[str]:
    """A command line in which the values of ``--config`` and ``-c`` are files.

    Example:
        >>> resolve_arguments(["fit", "--config", "mine.yaml", "--model.model_name_or_path=builtin:some-model"])
        ['fit', '--config', 'mine.yaml', '--model.model_name_or_path=builtin:some-model']
    """
    resolved: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if equals and option in _OPTIONS:
            resolved.append(f"{option}={resolve_configuration(value)}")
        elif resolved and resolved[-1] in _OPTIONS:
            resolved.append(resolve_configuration(word))
        else:
            resolved.append(word)
    return resolved


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def all_callbacks(config: Any) -> list[Any]:
    """``trainer.callbacks``, which may be a single one or none, and ``extra_callbacks``.

    Args:
        config: What ``agcl fit`` was given, as a mapping or a parser's namespace.
    """
    return [*as_list((config.get("trainer") or {}).get("callbacks")), *(config.get("extra_callbacks") or [])]


def as_list(callbacks: Any) -> list[Any]:
    """A list of what may be a list, a single callback, or none."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
