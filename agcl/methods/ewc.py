"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796)."""

from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer

from agcl.attribution.estimators import Evidence, Fisher, PerSampleGradient
from agcl.errors import AgclError, check_choice
from agcl.evidence import task_evidence
from agcl.methods.interface import check_sequence, check_whole
from agcl.methods.quadratic import QuadraticPenalty
from agcl.module import unscales_in_its_step
from agcl.ranks import Ranks

Mode = Literal["separate", "online"]


class EWC(Callback):
    """Adds ``strength / 2 * sum_i F_i (theta_i - theta*_i)^2`` to the loss of every task but the first.

    ``F`` is the diagonal Fisher information at the task's end, over all rows drawn, answered correctly or not, with
    labels drawn from the model. Each row's gradient is squared on its own: squaring the mean gradient of a batch
    instead, as public code for language models often does, cancels rows against each other and shrinks with the batch.

    The penalty's gradient is added in closed form once per optimizer step, after accumulation and before clipping.

    Args:
        strength: Factor of the penalty, to be tuned over powers of ten; under SGD, lr * strength * F > 2 diverges.
        mode: ``separate``: one parabola per task, each around that task's own weights (the paper; in memory that does
            not grow with the tasks). ``online``: decayed Fisher information around the latest weights (Schwarz et al.,
            ICML 2018, arXiv 1805.06370; its factor of ``decay`` on the whole penalty is left to ``strength``).
        decay: Of the earlier tasks' Fisher information per task, in [0, 1]; ``online`` alone.
        estimator: ``Fisher`` if left out; ``EmpiricalFisher`` takes the true answers; ``MAS`` makes it Memory Aware
            Synapses.
        num_samples: Rows of each task, at most, that ``F`` is the mean over.
        parameters: Regular expression; only parameters whose name it is found in are penalised.
        seed: Choice of the rows, draw of the labels; the data module's if left out.

    Raises:
        AgclError: For other values; before training, for an optimizer that unscales gradients itself.
    """

    def __init__(
        self,
        strength: float,
        mode: Mode = "separate",
        decay: float = 0.95,
        estimator: PerSampleGradient | None = None,
        num_samples: int = 64,
        parameters: str = "",
        seed: int | None = None,
    ) -> None:
        if strength < 0:
            raise AgclError(f"`strength` is {strength}; choose 0 (no penalty) or more.")
        check_choice("mode", mode, Mode)
        if not 0 <= decay <= 1:
            raise AgclError(f"`decay` is {decay}; choose a number from 0 (forget earlier tasks) to 1 (add up).")
        if num_samples < 1:
            raise AgclError(f"`num_samples` is {num_samples}; the Fisher information needs at least one row.")
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.estimator = Fisher() if estimator is None else estimator
        self.num_samples = num_samples
        self.parameters = parameters
        self.seed = seed
        self.penalty = QuadraticPenalty()
        self.num_boundaries = 0  # of the tasks that the penalty holds

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse joint training and split weights; begin without a penalty (what is resumed is loaded after this)."""
        check_sequence(self, pl_module)
        check_whole(self, trainer)
        self.penalty, self.num_boundaries = QuadraticPenalty(), 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check optimizer, parameters and architecture before anything is trained."""
        if unscales_in_its_step(trainer):
            raise AgclError(
                "Under 16-mixed precision a fused optimizer unscales all gradients inside of its step, the penalty's "
                "too: set `fused: false`, or precision bf16-mixed."
            )
        evidence = self._evidence(trainer, pl_module, 0)
        with trainer.precision_plugin.forward_context():
            self.estimator.check(pl_module.model, evidence.parameters, next(iter(evidence.samples)))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """On resuming: make up for a task boundary that Lightning goes on without."""
        self.penalty.to(pl_module.device)
        completed = pl_module.tasks.num_completed(trainer.current_epoch)
        if completed:
            self._pass_boundary(trainer, pl_module, completed - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task boundary: take in the Fisher information of the task just learned."""
        if pl_module.ends_task:
            self._pass_boundary(trainer, pl_module, pl_module.tasks.index_at(trainer.current_epoch))

    def _pass_boundary(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        # On resuming, Lightning may run an epoch's end again; the last task's is of no more use.
        if self.num_boundaries > index or index + 1 == len(pl_module.tasks):
            return
        evidence = self._evidence(trainer, pl_module, index)
        with trainer.precision_plugin.forward_context():
            fisher = self.estimator.scores(evidence)
        for scores in fisher.values():  # rounding must not let the processes' weights part
            Ranks.of_this_run().agree_on(scores)
        weights = dict(pl_module.model.named_parameters())
        if self.mode == "separate":
            self.penalty.add(fisher, weights)
        else:
            self.penalty.replace(fisher, weights, self.decay)
        self.num_boundaries = index + 1

    def _evidence(self, trainer: Trainer, pl_module: Any, index: int) -> Evidence:
        """A task's rows, all of them alike whether answered correctly or not."""
        return task_evidence(
            trainer, pl_module, index, self.parameters, self.num_samples, seed=self.seed, only_correct=False
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the penalty's gradient."""
        if self.penalty.precision:
            weights = dict(pl_module.model.named_parameters())
            pl_module.log("ewc/penalty", self.penalty.add_gradient(weights, self.strength))

    def extra_bytes(self) -> int:
        """Bytes kept between steps beyond plain fine-tuning: 8 per weight, whatever the number of tasks."""
        return self.penalty.num_bytes()

    def state_dict(self) -> dict[str, Any]:
        """The penalty and the number of tasks in it."""
        return {"penalty": self.penalty.state_dict(), "num_boundaries": self.num_boundaries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.penalty.load_state_dict(state_dict["penalty"])
        self.num_boundaries = state_dict["num_boundaries"]
