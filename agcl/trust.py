"""What a configuration may make agcl do: it may come from another person, so it chooses among what is named here.

A ``class_path`` is imported, and called with arguments, before the type of what comes out is known. So what may be
named at all is a list; the types of the options choose within it. Everything else takes the consent of the user, in an
environment variable or on the command line, neither of which a file can give. See docs/security.md.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import set_parsing_settings

from agcl.errors import AgclError

ALLOW_IMPORTS = "AGCL_ALLOW_IMPORTS"
TRUST_REMOTE_CODE = "AGCL_TRUST_REMOTE_CODE"

NAMEABLE = (
    "agcl",
    "agcl.compare.Method",  # the mappings in a comparison's file; the rest of the package starts processes
    "agcl.compare.settings.Method",
    "lightning.fabric.plugins",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli.ReduceLROnPlateau",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.distributed.fsdp",
    "torch.optim",
    "transformers.optimization",
)
"""Packages and objects whose contents a configuration may name."""
_NOT_NAMEABLE = ("*", "agcl.cli", "agcl.commands", "agcl.compare", "agcl.lightning_cli")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry")


def restrict_imports() -> None:
    """Let configurations name what is in ``NAMEABLE``, and what the user allows in ``AGCL_ALLOW_IMPORTS``.

    The variable holds packages, modules or classes, separated by commas. The restriction is the parser's and holds for
    the process; what it allowed once it allows on.

    Raises:
        AgclError: If the variable holds something else.
    """
    own = [name.strip() for name in os.environ.get(ALLOW_IMPORTS, "").split(",") if name.strip()]
    try:
        set_parsing_settings(
            instantiate_subclass_spec_in_any=False,  # where any value will do, a `class_path` is just a value
            import_path_denylist=list(_NOT_NAMEABLE),
            import_path_allowlist=[*NAMEABLE, *own],
        )
    except ValueError as error:
        raise AgclError(f"{ALLOW_IMPORTS} is {','.join(own)!r}: give names of packages with commas between.") from error


def denied_import(message: str) -> str | None:
    """What to say instead, where the parser's message is that a configuration named what it may not."""
    found = _DENIED.search(message)
    if found is None:
        return None
    name, entry = found.groups()
    if entry != "*":  # the parser's own list: what starts programs, opens files, loads objects and the like
        return f"The configuration names `{name}`, which is no part of training: do not trust it, or take the name out."
    return (
        f"The configuration names `{name}`, which is none of agcl's, Lightning's or torch.optim's, and would run its "
        f"code. If you know it and trust it, set {ALLOW_IMPORTS}={name.rpartition('.')[0]}; see docs/security.md."
    )


def check_remote_code(is_wanted: bool, words: Sequence[str]) -> None:
    """Refuse to run code that comes with a model where a configuration file alone asks for it.

    Args:
        is_wanted: Whether the configuration says ``trust_remote_code``.
        words: The command line.

    Raises:
        AgclError: If neither the command line nor the environment says so too.
    """
    if (
        is_wanted
        and not _is_said("--model.trust_remote_code", words)
        and os.environ.get(TRUST_REMOTE_CODE, "0") in ("", "0")
    ):
        raise AgclError(
            "A configuration file says `trust_remote_code: true`, which runs code that comes with the model. If you "
            f"trust it, say so yourself: `--model.trust_remote_code true`, or {TRUST_REMOTE_CODE}=1."
        )


def check_sharded_checkpoint(path: str | None, words: Sequence[str]) -> None:
    """Refuse a folder of shards that a configuration file alone names: torch loads parts of it as objects.

    Args:
        path: What ``ckpt_path`` says.
        words: The command line.

    Raises:
        AgclError: If it is such a folder, and the command line neither names it nor asks for the newest checkpoint.
    """
    is_asked_for = any(_is_said(option, words) for option in ("--ckpt_path", "--resume"))
    if path is not None and Path(path).is_dir() and not is_asked_for:
        raise AgclError(
            f"A configuration file names {path}, a checkpoint in shards, and loading one can run code that it holds. "
            "If it is your own, name it on the command line: `--ckpt_path`."
        )


def _is_said(option: str, words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == option for word in words)
