"""Orthogonal low-rank adaptation (O-LoRA; Wang et al., EMNLP Findings 2023, arXiv 2310.14152)."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from agcl.errors import AgclError
from agcl.methods.interface import TaskMethod
from agcl.task_pairs import add_adapters


class OLoRA(TaskMethod):
    """A LoRA pair of its own for each task; the earlier tasks' are frozen, and the new one kept orthogonal to them.

    While task ``t`` is learned, the loss has the term ``strength * sum_i<t sum |A_i A_t^T|`` over all adapted modules:
    the sum of absolute values, as in the authors' code. All pairs learned so far work in the forward pass.

    The pairs are PEFT adapters named ``task0``, ``task1``, ..., made from the model's ``adapter`` before the optimizer
    is built; those not being learned have no gradient, so that the optimizer passes them over. The saved model is one
    adapter that holds them all (`agcl.models.save_model`). Kept between steps: the other tasks' pairs. Over several
    devices it needs ``trainer.strategy: ddp_find_unused_parameters_true``.

    Args:
        strength: Weight of the orthogonality; the authors' is 0.5.

    Raises:
        AgclError: If the strength is negative or, before training, the model has no LoRA adapter.
    """

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__()
        if strength < 0:
            raise AgclError(f"`strength` is {strength}; choose 0 (adapters apart, but not orthogonal) or more.")
        self.strength = strength
        self._names: list[str] = []
        self._pairs: list[tuple[Tensor, list[Tensor]]] = []
        self._idle: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Have the tasks' adapters made as soon as the model is there, whose checkpoint may then be loaded."""
        super().setup(trainer, pl_module, stage)
        self._names = [f"task{index}" for index in range(len(pl_module.tasks))]
        if pl_module.model is None:
            pl_module.model_changes.append(lambda: add_adapters(pl_module.model, self._names))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Add the term to the loss; on resuming, go on with the adapters of the task begun."""
        pl_module.loss_terms["orthogonality"] = lambda batch, logits, targets: (
            self.strength * orthogonality(self._pairs) if self._pairs else logits.new_zeros(())
        )
        if self.task_begun is not None:
            self.begin_task(trainer, pl_module, self.task_begun)

    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """Freeze the earlier tasks' adapters and learn this task's."""
        model, (*old, new) = pl_module.model, self._names[: task_index + 1]
        model.base_model.set_adapter([*old, new])
        model.set_requires_grad(old, requires_grad=False)
        downs = [_down_projections(module) for module in model.modules() if isinstance(module, LoraLayer)]
        self._pairs = [(down[new], [down[name] for name in old]) for down in downs if old]
        self._idle = [p for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad]

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the term out of the loss."""
        pl_module.loss_terms.pop("orthogonality", None)

    def extra_bytes(self) -> int:
        """Of the other tasks' adapters."""
        return sum(parameter.nbytes for parameter in self._idle)


def orthogonality(pairs: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Tensor:
    """``sum |A_i A_t^T|`` over the entries, old tasks ``i`` and modules; scalar, 0 where all rows are orthogonal.

    Args:
        pairs: For each module ``A_t``, shape ``(r, in_features)``, and the old tasks' ``A_i``.
    """
    return torch.stack([(torch.cat(list(old)) @ new.T).abs().sum() for new, old in pairs]).sum()


def _down_projections(module: LoraLayer) -> dict[str, Any]:
    """Adapter name -> ``A`` of a linear or an embedding layer."""
    return {name: linear.weight for name, linear in module.lora_A.items()} | dict(module.lora_embedding_A.items())
