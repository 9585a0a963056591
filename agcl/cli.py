"""Command line: the commands of `agcl.commands`, and for everything else LightningCLI (`agcl.lightning_cli`)."""

import sys
from collections.abc import Sequence

from agcl import commands
from agcl.errors import user_error

_CHECK = "Show what a configuration's rows look like to the model, a forecast, and every problem, without training."
_PLAN = "Print what memory and time a configuration would take, before anything is loaded."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are printed as one line, exit status 1."""
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words and words[0] in commands.COMMANDS:
            status = commands.run(words)
        elif words and words[0] == "check":
            from agcl.checking import command

            status = command.run(words[1:])
        elif words and words[0] == "plan":
            from agcl import planning

            status = planning.run(words[1:])
        else:
            from agcl import lightning_cli  # seconds to import, which the other commands do without

            lightning_cli.run(
                args, epilog=f"{commands.help_text()} Besides, `agcl check`: {_CHECK} Besides, `agcl plan`: {_PLAN}"
            )
            status = 0
    except (ValueError, OSError) as error:
        # What the operating system says (no space left, permission denied) names its file already.
        shown = error if isinstance(error, OSError) else user_error(error)
        if shown is None:
            raise
        sys.exit(f"agcl: error: {shown}")
    if status:
        sys.exit(status)
