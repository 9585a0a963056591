"""Griffe extension: Sphinx's roles, formulas and examples in docstrings as the site's Markdown has them."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^([ \t]*)Example:$", re.MULTILINE)
_FORMULA = re.compile(r"^([ \t]*)\.\. math:: (.+)$", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """A role becomes code, ``.. math::`` a displayed formula, ``Example:`` a section of code."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", obj.docstring.value))
            obj.docstring.value = _FORMULA.sub(r"\1$$\n\1\2\n\1$$", text)
