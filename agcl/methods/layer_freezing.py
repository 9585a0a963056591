"""Freezing decoder blocks, or whatever a regular expression names."""

import re
from collections.abc import Collection, Mapping
from typing import Literal

from torch import nn

from agcl.attribution.naming import check_pattern
from agcl.errors import AgclError, check_choice
from agcl.methods.freezing import Freezing, by_block

Side = Literal["bottom", "top"]


class LayerFreezing(Freezing):
    """Freezes decoder blocks at the bottom or the top of the model, or what a regular expression names.

    Freezing the bottom blocks while later tasks are learned is a strong baseline.

    Args:
        num_layers: Decoder blocks to freeze.
        side: ``bottom``: those next to the embeddings; ``top``: those next to the output.
        ends: Freeze also what lies beyond those blocks: the embeddings at the bottom (tied output weights with them);
            the final normalisation and untied output weights at the top.
        parameters: Regular expression; also every parameter whose name it is found in is frozen.
        num_free_tasks: Tasks that are learned with all parameters first; 0 freezes from the start.

    Raises:
        AgclError: For negative numbers, an expression that cannot be used, or, before anything is trained, more blocks
            than there are, or a choice that freezes nothing or everything.
    """

    def __init__(
        self,
        num_layers: int = 0,
        side: Side = "bottom",
        ends: bool = True,
        parameters: str | None = None,
        num_free_tasks: int = 1,
    ) -> None:
        super().__init__()
        if num_layers < 0 or num_free_tasks < 0:
            raise AgclError(f"`num_layers` ({num_layers}) and `num_free_tasks` ({num_free_tasks}) are numbers >= 0.")
        check_choice("side", side, Side)
        if parameters is not None:
            check_pattern(parameters)
        self.parameters = parameters
        self.num_layers = num_layers
        self.side = side
        self.ends = ends
        self.num_free_tasks = num_free_tasks

    def choose(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], task_index: int) -> Collection[str]:
        """See :meth:`Freezing.choose`."""
        if task_index < self.num_free_tasks:
            return []
        blocks = by_block(trainable)
        if self.num_layers > len(blocks):
            raise AgclError(f"`num_layers` is {self.num_layers}, but the model has {len(blocks)} decoder blocks.")
        order = sorted(blocks, reverse=self.side == "top")
        chosen = {name for block in order[: self.num_layers] for name in blocks[block]}
        if self.ends and self.num_layers:
            inside = {name for names in blocks.values() for name in names}
            embeddings = {
                id(parameter)
                for module in model.modules()
                if isinstance(module, nn.Embedding)
                for parameter in module.parameters()
            }
            is_bottom = self.side == "bottom"
            chosen |= {n for n, p in trainable.items() if n not in inside and (id(p) in embeddings) == is_bottom}
        if self.parameters is not None:
            chosen |= {name for name in trainable if re.search(self.parameters, name)}
        if not chosen:
            raise AgclError("LayerFreezing freezes nothing: give `num_layers`, or `parameters` that match some.")
        return [name for name in trainable if name in chosen]
