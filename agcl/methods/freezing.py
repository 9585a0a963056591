"""Parameters that do not move while a task is learned."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn

from agcl.blocks import block_number
from agcl.errors import AgclError
from agcl.methods.interface import check_sequence, check_whole


class Freezing(Callback):
    """Holds the parameters still that a subclass names, task by task.

    They require no gradient meanwhile and have none, so that torch's optimizers leave them out: neither momentum nor
    weight decay moves them, and the backward pass skips what it can. Which ones is a function of the task alone:
    nothing needs to be saved. Under DDP use ``ddp_find_unused_parameters_true``.
    """

    def __init__(self) -> None:
        self.frozen: list[nn.Parameter] = []
        """What is frozen now."""
        self._task: int | None = None

    def choose(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], task_index: int) -> Collection[str]:
        """Names of the parameters to hold still during a task.

        Args:
            model: The language model.
            trainable: Its trainable parameters by name, in its order.
            task_index: 0-based.
        """
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse joint training and split weights."""
        check_sequence(self, pl_module)
        check_whole(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check that the choice works and leaves something to learn with."""
        trainable = _trainable(pl_module.model)
        for index in range(len(pl_module.tasks)):
            if len(set(self.choose(pl_module.model, trainable, index))) == len(trainable):
                raise AgclError(
                    f"{type(self).__name__} freezes every trainable parameter at task `{pl_module.tasks[index].name}`; "
                    "leave some to learn with."
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task's beginning: thaw the last one's, freeze this one's."""
        self._freeze(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same where Lightning, resuming inside of an epoch, left its start out."""
        self._freeze(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the model as it was."""
        self._thaw()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._thaw()

    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond plain fine-tuning: none."""
        return 0

    def _freeze(self, pl_module: Any) -> None:
        if self._task == pl_module.task_index:
            return
        self._thaw()
        self._task = pl_module.task_index
        trainable = _trainable(pl_module.model)
        self.frozen = [trainable[name] for name in self.choose(pl_module.model, trainable, pl_module.task_index)]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _thaw(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen, self._task = [], None


def by_block(names: Collection[str]) -> dict[int, list[str]]:
    """Parameter names by decoder block (:func:`block_number`); names without one are left out.

    Example:
        >>> by_block(["wte.weight", "h.0.ln.weight", "h.1.ln.weight", "h.1.ln.bias"])
        {0: ['h.0.ln.weight'], 1: ['h.1.ln.weight', 'h.1.ln.bias']}
    """
    blocks = defaultdict(list)
    for name in names:
        if (number := block_number(name)) is not None:
            blocks[number].append(name)
    return dict(blocks)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
