"""Which decoder block a parameter belongs to, by its name."""

import re


def block_number(parameter_name: str) -> int | None:
    """The first number between dots of the name, which counts the blocks from 0; None where there is none.

    Example:
        >>> block_number("model.layers.7.mlp.up_proj.weight"), block_number("transformer.wte.weight")
        (7, None)
    """
    number = re.search(r"(?:^|\.)(\d+)\.", parameter_name)
    return int(number[1]) if number else None
