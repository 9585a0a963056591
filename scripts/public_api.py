"""Print the public API, a line for each name: ``python scripts/public_api.py > tests/public_api.txt``.

Public is what the packages below list in ``__all__``, with the names and defaults of the arguments: YAML files use
them.
"""

import dataclasses
import inspect
from importlib import import_module
from typing import Any

PACKAGES = (
    "agcl",
    "agcl.attribution",
    "agcl.attribution.estimators",
    "agcl.callbacks",
    "agcl.compare",
    "agcl.export",
    "agcl.gating",
    "agcl.integrations.transformers",
    "agcl.methods",
    "agcl.metrics",
    "agcl.reporting",
)


def listing() -> list[str]:
    """One line for each public name, packages and names in order."""
    lines = []
    for package in PACKAGES:
        module = import_module(package)
        lines += [f"{package}.{name}{_arguments(getattr(module, name))}" for name in sorted(module.__all__)]
    return lines


def _arguments(value: Any) -> str:
    """Arguments and their defaults; nothing for exceptions, plain values and types of annotations."""
    is_class = inspect.isclass(value) and not issubclass(value, Exception)
    if not is_class and not inspect.isfunction(value):
        return ""
    factories = (
        {f.name: f.default_factory for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    )
    texts, is_keyword_only = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            texts.append("*")
        is_keyword_only = parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        factory = factories.get(parameter.name, dataclasses.MISSING)
        default = parameter.default if factory is dataclasses.MISSING else factory()
        texts.append(f"{prefix}{parameter.name}" + ("" if default is parameter.empty else f"={_text(default)}"))
    return f"({', '.join(texts)})"


def _text(default: Any) -> str:
    return default.__qualname__ if inspect.isfunction(default) else repr(default)


if __name__ == "__main__":
    print("\n".join(listing()))
