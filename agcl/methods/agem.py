"""Averaged Gradient Episodic Memory (Chaudhry et al., ICLR 2019, arXiv 1812.00420)."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from agcl.attribution.lrp import evaluation_mode
from agcl.data.samples import resolve_seed
from agcl.data.tasks import IGNORED_LABEL, collate
from agcl.errors import AgclError
from agcl.methods.interface import TaskMethod
from agcl.scoring import answer_logits, token_nll


class AGEM(TaskMethod):
    """Projects each gradient so that, to first order, the step does not raise the loss on kept rows of old tasks.

    Before each optimizer step, after accumulation and before clipping, the gradient ``g`` over all parameters is
    compared with that on a random batch of kept rows: if ``g . g_ref < 0``, it becomes ``g - (g . g_ref / g_ref .
    g_ref) g_ref``. What this promises holds for plain SGD's step: Adam's goes another way than its gradient.

    The reference gradient is taken without dropout: it uses up no random numbers, and is the same on every rank.

    Args:
        rows_per_task: Rows kept of each task.
        batch_size: Rows, drawn from those of all old tasks anew for each step, that give the reference gradient.
        seed: Choice of the rows for each step; the data module's if left out.

    Raises:
        AgclError: If a value is not usable.
    """

    def __init__(self, rows_per_task: int = 16, batch_size: int = 16, seed: int | None = None) -> None:
        super().__init__()
        for name, value in (("rows_per_task", rows_per_task), ("batch_size", batch_size)):
            if value < 1:
                raise AgclError(f"`{name}` is {value}; A-GEM needs at least one row.")
        self.rows_per_task = rows_per_task
        self.batch_size = batch_size
        self.seed = seed
        self.memory: list[dict[str, Any]] = []
        """Kept rows of the tasks before the present one; they follow from the data, so no checkpoint holds them."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming: take the old tasks' rows up again."""
        if self.task_begun is not None:
            self.begin_task(trainer, pl_module, self.task_begun)

    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """Keep rows of all tasks before this one."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.memory = [dict(row) for task in range(task_index) for row in data.kept_rows(task, self.rows_per_task)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Project what was accumulated for this step."""
        if not self.memory:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        reference = self._reference_gradient(trainer, pl_module, parameters)
        for parameter in parameters:
            if parameter.grad is None:  # a part of the vector too: the projection may move it
                parameter.grad = torch.zeros_like(parameter)
        project([parameter.grad for parameter in parameters], reference)

    def _reference_gradient(self, trainer: Trainer, pl_module: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        # The step alone decides on the rows: a resumed run draws the same.
        seed = resolve_seed(self.seed, trainer.datamodule)  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + trainer.global_step)
        chosen = torch.randperm(len(self.memory), generator=generator)[: self.batch_size].tolist()
        batch = collate([self.memory[row] for row in chosen], pl_module.tokenizer.pad_token_id)
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        with evaluation_mode(pl_module.model), torch.enable_grad(), trainer.precision_plugin.forward_context():
            logits, targets = answer_logits(pl_module.model, batch)
            loss = token_nll(logits, targets).sum() / (targets != IGNORED_LABEL).sum()
        # Not backward(): what was accumulated in `.grad` stays as it is.
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    def extra_bytes(self) -> int:
        """Of the kept rows' token ids and labels."""
        return sum(8 * len(row[column]) for row in self.memory for column in ("input_ids", "labels"))


def project(gradients: Sequence[Any], reference: Sequence[Tensor]) -> None:
    """Take out of a gradient, in place, what points against a reference: ``g - (g . r / r . r) r`` if ``g . r < 0``.

    Args:
        gradients: The parts of ``g``, one for each parameter.
        reference: The parts of ``r``, of the same shapes and devices.
    """
    inner = _inner(gradients, reference)
    if inner < 0:
        scale = inner / _inner(reference, reference)
        for gradient, part in zip(gradients, reference, strict=True):
            gradient.add_(part, alpha=-scale)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    wide = [torch.promote_types(part.dtype, torch.float32) for part in left]
    products = [(a.to(d) * b.to(d)).sum() for a, b, d in zip(left, right, wide, strict=True)]
    return torch.stack(products).sum().item()
