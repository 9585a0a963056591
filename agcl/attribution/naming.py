"""Which parameters are scored: the trainable ones whose name a regular expression is found in."""

import re

from torch import nn

from ..errors import AgclError


def check_pattern(parameters: str) -> None:
    """Refuse what is not a regular expression.

    Raises:
        AgclError: Naming it.
    """
    try:
        re.compile(parameters)
    except re.error as error:
        raise AgclError(f"`parameters` is not a regular expression: {parameters!r} ({error}).") from error


def matching_parameters(model: nn.Module, parameters: str = "") -> list[str]:
    """Names of the trainable parameters that a regular expression is found in.

    Raises:
        AgclError: If it is none, or is found in no name.
    """
    check_pattern(parameters)
    pattern = re.compile(parameters)
    names = [name for name, p in model.named_parameters() if p.requires_grad and pattern.search(name)]
    if not names:
        frozen = [name for name, _ in model.named_parameters() if pattern.search(name)]
        found = f"only frozen ones, such as `{frozen[0]}`" if frozen else "none at all"
        raise AgclError(
            f"`parameters` {parameters!r} matches no trainable parameter of the model, {found}: choose others."
        )
    return names
