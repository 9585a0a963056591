"""Learning without Forgetting (Li and Hoiem, ECCV 2016, arXiv 1606.09282)."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.func import functional_call

from agcl.attribution.lrp import evaluation_mode
from agcl.data.tasks import IGNORED_LABEL
from agcl.errors import AgclError
from agcl.methods.interface import TaskMethod
from agcl.scoring import answer_logits


class LwF(TaskMethod):
    """Distils the model as it was when the task began, on the new task's own rows; no old row is kept.

    From the second task on, the loss has the term ``strength * T ** 2 * KL(teacher || student)``, both distributions
    softened by the temperature ``T``, averaged over the answer tokens. (The paper has a head for each task; a language
    model has one for all.) Kept between steps: one more copy of the trainable weights.

    Args:
        strength: Weight of the distillation.
        temperature: Softening of both distributions; the paper's is 2.

    Raises:
        AgclError: If a value is not usable.
    """

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        if strength < 0:
            raise AgclError(f"`strength` is {strength}; choose 0 (no distillation) or more.")
        if temperature <= 0:
            raise AgclError(f"`temperature` is {temperature}; choose a number above 0.")
        self.strength = strength
        self.temperature = temperature
        self.teacher: dict[str, Tensor] = {}
        """The trainable parameters as they were when the present task began; empty during the first task."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse joint training; a run of its own begins without a teacher."""
        super().setup(trainer, pl_module, stage)
        self.teacher = {}

    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """From the second task on: the model as it is now becomes the teacher."""
        if task_index > 0:
            named = pl_module.model.named_parameters()
            self.teacher = {name: p.detach().clone() for name, p in named if p.requires_grad}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Add the term to the loss; on resuming, take the teacher to the model's device."""
        self.teacher = {name: weights.to(pl_module.device) for name, weights in self.teacher.items()}

        def term(batch: dict[str, Any], logits: Tensor, targets: Tensor) -> Tensor:
            if not self.teacher:
                return logits.new_zeros(())
            taught = teacher_logits(pl_module.model, self.teacher, batch)
            return self.strength * distillation_loss(logits, taught, targets, self.temperature)

        pl_module.loss_terms["distillation"] = term

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the term out of the loss."""
        pl_module.loss_terms.pop("distillation", None)

    def extra_bytes(self) -> int:
        """Of the teacher's weights."""
        return sum(weights.nbytes for weights in self.teacher.values())

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, too."""
        return {**super().state_dict(), "teacher": dict(self.teacher)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        super().load_state_dict(state_dict)
        self.teacher = dict(state_dict["teacher"])


class _AnswerLogits(nn.Module):
    """`answer_logits` as the module that `functional_call` wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return answer_logits(self.model, batch)[0]  # type: ignore[arg-type]


def teacher_logits(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """What `model` answers with other weights in the place of its own; in eval mode, without gradients.

    Args:
        model: The language model.
        weights: By parameter name; those left out are the model's own.
        batch: As for `answer_logits`, whose logits are returned.
    """
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    with evaluation_mode(model), torch.no_grad():
        return functional_call(_AnswerLogits(model), named, (batch,))


def distillation_loss(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``T ** 2 * KL(teacher || student)`` of distributions softened by ``T``, mean over the answer tokens, in nats.

    Args:
        student: Logits, shape ``(batch, length, vocabulary)``.
        teacher: The same.
        targets: Shape ``(batch, length)``; positions of -100 are left out.
        temperature: ``T``.
    """
    is_answer = targets != IGNORED_LABEL
    wide = torch.promote_types(student.dtype, torch.float32)
    ours, taught = ((logits[is_answer].to(wide) / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * nn.functional.kl_div(ours, taught, reduction="batchmean", log_target=True)
