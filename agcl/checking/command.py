"""The command ``agcl check``."""

from collections.abc import Sequence

from rich.console import Console

from agcl.checking.checking import DESCRIPTION, CheckOptions, check
from agcl.checking.configuration import LenientConfiguration
from agcl.checking.display import show


def run(args: Sequence[str]) -> int:
    """Check the configuration that the arguments give, and print what was found.

    Args:
        args: As for ``agcl fit``, and the options of `CheckOptions`.

    Returns:
        Exit status: 0 if there is no problem, 1 otherwise.
    """
    found = check(LenientConfiguration(args, prog="agcl check", description=DESCRIPTION, options=CheckOptions))
    show(Console(highlight=False), found)
    return 1 if found.problems else 0
