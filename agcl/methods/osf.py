"""Orthogonal subspace fine-tuning (OSF; arXiv 2504.07097) over several tasks, on PEFT's adapter of that name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from peft import PeftModel, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import Tensor

from agcl.errors import AgclError
from agcl.methods.interface import TaskMethod


class OSF(TaskMethod):
    """Learns in the small singular directions of each matrix; what was learned before is in the large ones.

    At each task boundary the last task's change is merged into the weights, which are decomposed anew; a growing share
    of their singular directions is preserved while the next task is learned. (Re-wrapping after PEFT's ``unload()``, as
    its documentation has it, would throw away what was learned: only ``merge_and_unload()`` keeps it.) The paper's
    choice of the share by each layer's importance is not part of PEFT.

    PEFT projects the gradients of the factors. The preserved directions therefore stand still under optimizers whose
    step is linear in the gradient (SGD, with momentum or weight decay); Adam's entry-wise step leaves the subspace.

    Kept between steps: the factors, and their values at the task's start. The saved model is the merged one.

    Args:
        preserved: Share of the singular directions of each matrix preserved while each task but the first is learned,
            in (0, 1); by default ``t / T`` for 0-based task ``t`` of ``T``. The first task has the ``effective_rank``
            of the model's ``adapter``, which cannot be 0.

    Raises:
        AgclError: If a share is unusable or, before training, the model has no OSF adapter or runs on several devices.
    """

    def __init__(self, preserved: list[float] | None = None) -> None:
        super().__init__()
        for share in preserved or ():
            if not 0 < share < 1:
                raise AgclError(f"`preserved` has {share}; choose shares between 0 and 1, both excluded.")
        self.preserved = preserved
        self._shares: list[float] = []
        self._bytes = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check the settings; have the model decomposed as a checkpoint has it before that is loaded."""
        super().setup(trainer, pl_module, stage)
        wanted = len(pl_module.tasks) - 1
        growing = [task / (wanted + 1) for task in range(1, wanted + 1)]
        self._shares = growing if self.preserved is None else self.preserved
        if (given := len(self._shares)) != wanted:
            raise AgclError(f"`preserved` has {given} shares; give one for each of the {wanted} later tasks.")
        if trainer.world_size > 1:
            raise AgclError("OSF wraps the model anew between tasks, which works on one device only.")
        if pl_module.compiled:
            raise AgclError(
                "OSF wraps the model anew between tasks, which a compiled pass does not see: not `compiled`."
            )
        if (pl_module.adapter or {}).get("peft_type") != "OSF":
            raise AgclError("OSF needs its adapter: set `model.adapter` to {peft_type: OSF, effective_rank: 1, ...}.")
        pl_module.checkpoint_changes.append(lambda checkpoint: self._decompose_as_in(pl_module, checkpoint))

    def _decompose_as_in(self, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """PEFT saves no factors of the task's start: they come from the weights that the task started from."""
        task_index = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("task_begun")
        if task_index:
            saved = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
            pl_module.model = decompose(pl_module.model, self._shares[task_index - 1], saved)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming, nothing is left to do but to count."""
        self._bytes = factor_bytes(pl_module.model)

    def begin_task(self, trainer: Trainer, pl_module: Any, task_index: int) -> None:
        """Merge, decompose, and hand the new factors to the optimizer, which has no state at a task's start."""
        if task_index == 0:
            return
        pl_module.model = decompose(pl_module.model, self._shares[task_index - 1])
        optimizer = pl_module.optimizers(use_pl_optimizer=False)
        (group,) = optimizer.param_groups
        group["params"] = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        optimizer.state.clear()
        self._bytes = factor_bytes(pl_module.model)

    def extra_bytes(self) -> int:
        """Of the factors and of their values at the task's start, beside the weights."""
        return self._bytes


def decompose(model: PeftModel, share: float, weights: Mapping[str, Tensor] | None = None) -> PeftModel:
    """Merge an OSF model's change into its weights and wrap them anew.

    Args:
        model: Not to be used afterwards.
        share: Of the singular directions of each matrix, to be preserved.
        weights: By the model's names; its frozen weights, with nothing merged, if they are not to be its own.

    Returns:
        The model with new trainable factors, in the same mode.
    """
    config = replace(model.active_peft_config, effective_rank=share)
    if weights is None:
        base = model.merge_and_unload()
    else:
        frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, parameter in frozen.items():
            parameter.data.copy_(weights[name])
        base = model.unload()
    return get_peft_model(base, config).train(model.training)


def factor_bytes(model: Any) -> int:
    """Bytes of all OSF factors and buffers of a model."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, OSFLayer)]
    tensors = [t for layer in layers for t in (*layer.osf_svd_params.parameters(), *layer.buffers())]
    return sum(tensor.nbytes for tensor in tensors)
