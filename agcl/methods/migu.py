"""Magnitude-based gradient updating (MIGU; Du et al., EMNLP Findings 2024, arXiv 2406.17245)."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from agcl.errors import AgclError
from agcl.methods.interface import TaskMethod


class MIGU(TaskMethod):
    """Updates, in each linear layer, only the outputs that the present batch makes large; needs no old data.

    From the second task on, the magnitude of a linear layer's output, summed over the tokens of a step's batches and
    divided by its sum (L1), ranks the output features; the gradient of the weights and biases of the smallest
    ``masked`` share of them is set to zero before the step. Padding is left out. A layer whose weight is an embedding
    too (a tied vocabulary projection) is left alone, as are all other parameters.

    As published, the gradient is masked: Adam's momentum and weight decay go on moving what was masked.

    Args:
        masked: Share of the output features of each layer that is not updated, in [0, 1).

    Raises:
        AgclError: If the share is unusable or, before training, the model is ``compiled``.
    """

    def __init__(self, masked: float = 0.7) -> None:
        super().__init__()
        if not 0 <= masked < 1:
            raise AgclError(f"`masked` is {masked}; choose a share of at least 0 and below 1.")
        self.masked = masked
        self._handles: list[RemovableHandle] = []
        self._magnitudes: dict[nn.Module, Tensor] = {}
        self._is_token: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check that the hooks will be called."""
        super().setup(trainer, pl_module, stage)
        if pl_module.compiled:
            raise AgclError(
                "MIGU watches each layer's output by hooks, which a compiled pass leaves out: not `compiled`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Watch the outputs of the linear layers."""
        embeddings = {module.weight for module in pl_module.model.modules() if isinstance(module, nn.Embedding)}
        for module in pl_module.model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.weight not in embeddings:
                self._handles.append(module.register_forward_hook(self._observe))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which positions hold tokens."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._is_token = batch["attention_mask"].bool() if pl_module.task_index > 0 else None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Mask what was accumulated for this step."""
        for module, magnitude in self._magnitudes.items():
            # Over several devices every one must mask the same.
            updated = largest(trainer.strategy.reduce(magnitude, reduce_op="sum"), self.masked)
            for parameter in module.parameters(recurse=False):
                if parameter.grad is not None:
                    parameter.grad.mul_(along_outputs(updated, parameter, module))
        self._magnitudes.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at training batches alone."""
        self._is_token = None

    def _observe(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._is_token is None or not module.training:
            return
        sizes = output.detach().abs()
        # Vocabulary projections see the answers' positions only.
        sizes = sizes[self._is_token] if sizes.shape[:-1] == self._is_token.shape else sizes.flatten(0, -2)
        total = sizes.sum(0, dtype=torch.float32)
        self._magnitudes[module] = self._magnitudes[module] + total if module in self._magnitudes else total

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._magnitudes.clear()

    def extra_bytes(self) -> int:
        """None: magnitudes are of one step alone."""
        return 0


def largest(magnitude: Tensor, masked: float) -> Tensor:
    """Whether each entry is among the largest; the smallest ``masked`` share, rounded down, is not.

    Args:
        magnitude: Shape ``(n,)``. Its scale does not matter, so dividing by the sum can be left out.
        masked: In [0, 1).

    Returns:
        bool tensor of the same shape.
    """
    mask = torch.ones_like(magnitude, dtype=torch.bool)
    mask[magnitude.argsort(stable=True)[: int(masked * len(magnitude))]] = False
    return mask


def along_outputs(mask: Tensor, parameter: Tensor, module: nn.Module) -> Tensor:
    """A mask of output features as a factor of a weight, whose rows (`Conv1D`: columns) they are, or of a bias."""
    return mask[:, None] if parameter.ndim == 2 and not isinstance(module, Conv1D) else mask
