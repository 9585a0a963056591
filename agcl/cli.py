"""Command line: the commands of `agcl.commands`, and for everything else LightningCLI (`agcl.lightning_cli`)."""

import sys
from collections.abc import Sequence

from agcl import commands
from agcl.configurations import resolve_arguments
from agcl.errors import AgclError

_CONFIGURATIONS = "Configurations that come with agcl go by name: `--config builtin:quickstart`."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are printed as one line, exit status 1."""
    words = sys.argv[1:] if args is None else list(args)
    try:
        words = resolve_arguments(words)
        if words and words[0] in commands.COMMANDS:
            status = commands.run(words)
        else:
            from agcl import lightning_cli  # seconds to import, which the other commands do without

            lightning_cli.run(words, epilog=f"{_CONFIGURATIONS} {commands.help_text()}")
            status = 0
    except (ValueError, OSError) as error:
        # What the operating system says (no space left, permission denied) names its file already.
        user_error = error if isinstance(error, OSError) else _user_error(error)
        if user_error is None:
            raise
        sys.exit(f"agcl: error: {user_error}")
    if status:
        sys.exit(status)


def _user_error(error: BaseException | None) -> AgclError | None:
    """The error of ours behind one that the parser raised while it built an object from its configuration."""
    while error is not None and not isinstance(error, AgclError):
        error = error.__cause__ or error.__context__
    return error
