"""MkDocs hook: the pages of the site that are made from the code, and those that lie outside ``docs/``."""

import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout is described, not another that may be installed

from agcl.cli import ON_CONFIGURATIONS, main  # noqa: E402
from agcl.commands import COMMANDS  # noqa: E402
from agcl.configurations import configuration_names  # noqa: E402

WIDTH = "80"
CLI = """\
# Command line

Made from the help texts of the program. Any option of `agcl fit` can be given in a YAML file (`--config`, several are
laid over each other) or as `--section.option value`; `--print_config` shows the whole configuration. Configurations
that come with the package are given by name, `--config builtin:quickstart`; the names are in
[the last section](#built-in-configurations).
"""
API = """\
# {package}

::: {package}
    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "cli.md": command_line_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "results.md": _results_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        **api_pages(runpy.run_path(str(ROOT / "scripts" / "public_api.py"))["PACKAGES"]),
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def _results_page() -> str:
    """RESULTS.md without its figures, which are not here, and with links as from within ``docs/``."""
    text = re.sub(r"!\[.*\n", "", (ROOT / "RESULTS.md").read_text(encoding="utf-8"))
    return text.replace("](docs/", "](")


def command_line_page() -> str:
    """Help of every command."""
    commands = [["fit"], *([name] for name in ON_CONFIGURATIONS), *_command_words(COMMANDS)]
    helps = [f"## agcl {' '.join(words)}\n\n```text\n{_help(words)}```\n" for words in commands]
    names = "\n".join(f"- `builtin:{name}`" for name in configuration_names())
    return "\n".join([CLI, *helps, f"## Built-in configurations\n\n{names}\n"])


def _command_words(commands: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[list[str]]:
    for name, entry in commands.items():
        if isinstance(entry, Mapping):
            yield from _command_words(entry, (*before, name))
        elif name != "_help":
            yield [*before, name]


def _help(words: list[str]) -> str:
    text, arguments = io.StringIO(), sys.argv
    os.environ["COLUMNS"] = WIDTH
    sys.argv = ["agcl"]
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        sys.argv = arguments
    shown = "".join(c for c in text.getvalue() if c == "\n" or c.isprintable())  # jsonargparse writes a backspace
    if words[0] not in ("fit", *ON_CONFIGURATIONS):
        return shown
    return shown.partition("\n\n")[2]  # the usage is fifty lines of what follows


def api_pages(packages: tuple[str, ...]) -> dict[str, str]:
    """A page for each public package; a name is described where the innermost package lists it."""
    names = {package: list(import_module(package).__all__) for package in packages}
    homes = {name: package for package in sorted(packages, key=lambda p: p.count(".")) for name in names[package]}
    pages = {}
    for package, own in names.items():
        elsewhere = [f"[`{name}`][{homes[name]}.{name}]" for name in own if homes[name] != package]
        parts = [API.format(package=package)]
        if elsewhere:
            parts.append(f"Also to be had from here: {', '.join(elsewhere)}.\n")
        parts += [f"::: {package}.{name}\n" for name in own if homes[name] == package]
        pages[f"api/{package}.md"] = "\n".join(parts)
    return pages
