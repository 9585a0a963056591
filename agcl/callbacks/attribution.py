"""Importance of every weight at each task boundary, and the gate that protects it while the next task is learned."""

import math
import time
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from agcl.attribution.artefact import check_importance
from agcl.attribution.directions import Control
from agcl.attribution.estimators import LRP, Estimator, PerSampleGradient
from agcl.attribution.importance import ImportanceConfig
from agcl.attribution.levels import Bits
from agcl.attribution.merging import How
from agcl.attribution.passes import Sample
from agcl.callbacks.directions import Directions, DirectionsSoFar, directions_problem
from agcl.callbacks.earlier import EarlierRun, read_earlier
from agcl.callbacks.gathering import Gatherer
from agcl.callbacks.importance_so_far import ImportanceSoFar, Place
from agcl.callbacks.progress import activity
from agcl.callbacks.single_task import InitialModel, check_single_task, gather_from_single_task
from agcl.data.samples import resolve_seed
from agcl.data.sequence import Regime
from agcl.errors import AgclError, check_choice
from agcl.gating import GradientGate, UpdateGate, cancels_gradient_gate, choose_gate, flattened, shuffled
from agcl.gating.choice import GateKind
from agcl.own_text import text_samples, write_text
from agcl.shards import has_shards
from agcl.task_pairs import (
    activate,
    add_pairs,
    has_learned_pairs,
    has_pairs,
    pairs_problem,
    past_bytes,
    set_aside,
    unfit_pairs,
)

Source = Literal["running", "single_task"]


class AttributionCallback(Callback):
    """Attribution-guided continual learning (arXiv 2605.05285) on a ``ContinualLM`` and a ``ContinualDataModule``.

    At each task boundary every weight is scored on correctly answered training rows; the scores become the task's
    importance in [0, 1], which is written to ``importance/`` in the run's folder and merged with the earlier
    tasks'. While the next task is learned, each weight moves by ``(1 - importance) ** strength`` of what it would
    have.

    Kept between steps, in bytes per weight of 8 bits: 1 for the merged importance, which the gate shares (``merge:
    mean`` and ``probabilistic_or``: 2, and 1 for the gate; ``control: shuffled``: 1 more); `extra_bytes` counts. At a
    boundary the scores of one task take 4 more, ``importance.top_k`` twice as many as K.

    With ``reestimate``, **rows of old tasks are kept, so that the method is no longer data-free**. At each boundary,
    every old task's importance is computed anew on the present model from its kept rows that are answered correctly,
    and the merge is made anew. A task of which no kept row is answered correctly keeps the importance it had. No memory
    is taken for that: it is read from the task's file, a tensor at a time. On disk, each old task leaves a file more at
    each boundary, ``T (T + 1) / 2`` bytes per weight after T tasks, since an earlier checkpoint may be resumed from.

    Weight matrices are gated by the directions of their inputs instead of entry by entry (see
    :mod:`agcl.attribution.directions`), which protects far better: inputs are no unit vectors. Embeddings,
    normalisations, biases and experts are gated entry by entry as before; the matrices' importance is computed and
    written, too, but not gated by. For a matrix of shape (out, in) of which ``held`` directions are held back,
    4 (out + in + held) in bytes are held between steps, 2 held in less under ``bf16-mixed``.

    Of a LoRA adapter that ``ContinualLM`` makes, each task then learns a pair of its own: with ``W`` the weights that
    it is beside, ``A`` begins and moves by the directions of ``W``'s inputs, so that inputs that are held hardly reach
    ``B``, which is free. When a task ends, its pair is frozen. The saved adapter holds the pairs of all tasks.

    Args:
        gate: ``gradient`` rescales gradients by backward hooks (the paper; cancelled by Adam-like optimizers),
            ``update`` rescales the optimizer's whole step, ``auto`` picks what protects under the optimizer in use.
        estimator: What scores the weights, from ``agcl.attribution.estimators``: ``LRP`` (by its ``sensitivity`` the
            default, by its ``relevance`` the paper's), ``GradientWeight``, ``Fisher``, ``EmpiricalFisher``, ``MAS``,
            ``SPG``, ``Wanda``, ``Magnitude``, ``Change``, ``Random``, or one's own.
        source: The model that importance is computed on: ``running``, the one that learns all tasks, or
            ``single_task``, a model trained for it from the initial one on that task alone (one more training of each
            task, and memory for a second model meanwhile; on one device).
        num_samples: Rows, answered correctly, that each task's importance is computed from. What others rest on is not
            protected, so the more the better.
        batch_size: Rows that are run together; None means as many as in training.
        per_sample: Whether each row counts as one draw, or the sum over a batch does, which is cheaper.
        importance: How scores over samples become importance: sign, normalisation and its scope, K, alpha.
        importance_bits: Of importance in files, merge and gate: 8, or 16, which take twice the memory.
        importance_on: ``device``: beside the weights. ``host``: in host memory, from where each parameter's is copied
            over at each step, which takes time; what directions are found from is then held there too, and copied at
            task boundaries alone.
        merge: Over tasks: ``maximum`` (the paper), ``mean`` or ``probabilistic_or``.
        reestimate: Training rows kept of each old task to re-estimate its importance; 0 keeps none.
        strength: Exponent of the plasticity; 1 is the paper's linear gate, 0 no gate. Under ``directions`` it is of
            what is gated entry by entry.
        parameters: Regular expression; only parameters whose name it is found in are attributed and gated.
        control: ``shuffled`` permutes the importance within each tensor, ``flattened`` makes it uniform: gates of equal
            mean without attribution, to compare with. Under ``directions``, ``shuffled`` takes random directions.
        directions: Gate weight matrices by direction: ``plasticity``, the mean share that a matrix may go of its way,
            the same for each task; ``sharpness`` of the shares; ``every``, how many steps pass between two products
            with the gate's map; ``own_text``, how many pieces of text the model writes before the first task, so that
            what it could do then is held as well; ``weighted: false`` counts all inputs alike, a control. For
            estimators made of gradients, ``source: running`` without ``reestimate``, in one process or under DDP.
            ``auto``: with the default of these options where that is so and the selected parameters have a weight
            matrix, else as None: every weight is gated on its own, as in the paper.
        earlier: A run that has ended, by its folder or a checkpoint of it: what it has learned is protected as well,
            from the first task on, and no text is written before it. The model to begin with is the one that it left
            (``model_name_or_path: .../model``), an adapter merged into its weights.
        seed: Choice of the rows; permutation of the shuffled control; the data module's if left out.

    Raises:
        AgclError: On set-up or at the start of fitting, before any training: settings that cannot work, or a model that
            attribution cannot see into.
    """

    def __init__(
        self,
        gate: GateKind = "auto",
        estimator: Estimator | None = None,
        source: Source = "running",
        num_samples: int = 32,
        batch_size: int | None = None,
        per_sample: bool = True,
        importance: ImportanceConfig = ImportanceConfig(quantile=0.1),  # noqa: B008 (immutable)
        importance_bits: Bits = 8,
        importance_on: Place = "device",
        merge: How = "maximum",
        reestimate: int = 0,
        strength: float = 1.0,
        parameters: str = "",
        control: Control = "none",
        directions: Directions | Literal["auto"] | None = "auto",
        earlier: str | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise AgclError(f"`strength` is {strength}; choose a finite number, 0 (no gate) or more.")
        check_choice("gate", gate, GateKind)
        check_choice("source", source, Source)
        check_choice("importance_on", importance_on, Place)
        check_choice("control", control, Control)
        estimator = LRP(score="sensitivity") if estimator is None else estimator
        _check_reestimate(reestimate, source, estimator, earlier)
        self.gate = gate
        self.source = source
        self.num_samples, self.batch_size, self.per_sample = num_samples, batch_size, per_sample
        self.importance_bits, self.merge = importance_bits, merge
        self.parameters = parameters
        self.estimator = estimator
        self.importance_on = importance_on
        self.reestimate = reestimate
        self.strength = strength
        self.control = control
        self.earlier = earlier
        self.seed = seed
        self._gatherer = Gatherer(
            estimator, num_samples, batch_size, per_sample, importance, importance_bits, parameters, seed
        )
        self._is_auto = directions == "auto"
        problem = directions_problem(type(estimator), source, reestimate, strength)
        if problem and directions is not None and not self._is_auto:
            raise AgclError(problem)
        self.directions: Directions | None = None
        """Options of the gate by direction; None: each weight is gated on its own."""
        if directions is not None and problem is None:
            self.directions = Directions() if isinstance(directions, str) else directions
        self._begin_anew()

    def _begin_anew(self) -> None:
        """As if no task had been learned."""
        self._directions: DirectionsSoFar | None = None
        if self.directions is not None:
            estimator = cast(PerSampleGradient, self.estimator)
            on_host = self.importance_on == "host"
            self._directions = DirectionsSoFar(self.directions, estimator, self.control, on_host=on_host)
        needs_files = self.reestimate > 0
        self._so_far = ImportanceSoFar(self.merge, self.importance_bits, self.importance_on, needs_files=needs_files)
        self._initial: InitialModel | None = None
        self.num_boundaries = 0
        """Number of task boundaries passed, those included where nothing was answered correctly."""
        self._attached: GradientGate | UpdateGate | None = None
        self._task_begun: int | None = None
        self._earlier_run: EarlierRun | None = None  # until it is taken in, or a checkpoint in which it was
        self._kept_bytes = 0  # of old tasks' rows or pairs, of which there are never both

    @property
    def importance(self) -> dict[str, Tensor]:
        """Merged importance of the tasks learned: parameter name -> fixed point (uint8 / 255 or uint16 / 65535)."""
        return self._so_far.merged()

    @property
    def files(self) -> dict[str, str]:
        """Task name -> file with that task's own importance, the latest if it was re-estimated."""
        return self._so_far.files

    def extra_bytes(self) -> int:
        """Bytes of tensors, old rows and pairs kept beyond plain fine-tuning; shared memory counts once."""
        held = [*_tensors(self.state_dict()), *(self._attached.held_importance() if self._attached else ())]
        held += self._directions.held() if self._directions else []
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        return sum(storages.values()) + self._kept_bytes

    # --------------------------------------------------------------- life cycle

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier run (what is resumed is loaded after this); check what models would be made from."""
        if stage == "fit" and not trainer.global_step:  # a Trainer that has trained goes on
            self._begin_anew()
            if self.earlier is not None:
                self._earlier_run = read_earlier(self.earlier)
        if stage == "fit" and self.source == "single_task" and pl_module.model is not None:
            raise AgclError(
                "`source: single_task` trains a model for each task from `model_name_or_path`, but this ContinualLM "
                "holds a model already, which may be another; make a new ContinualLM, or take `source: running`."
            )
        if self._is_auto and isinstance(trainer.strategy, ModelParallelStrategy):
            self._directions = None
        self.check_adapter(pl_module.adapter)
        model = pl_module.model
        if model is None:
            pl_module.model_changes.append(lambda: self._make_pairs(pl_module))
        elif has_learned_pairs(model) and stage == "fit" and not trainer.ckpt_path:
            raise AgclError("This ContinualLM has learned tasks before, each with a pair of its own; make a new one.")
        elif hasattr(model, "peft_config") and not has_pairs(model):
            self._drop_directions("this ContinualLM holds an adapter already, which may have learned; make a new one")

    def check_adapter(self, adapter: dict[str, Any] | None) -> None:
        """Raise if an adapter cannot be gated by direction as asked for; by entry it can.

        Args:
            adapter: ``model.adapter`` of the ``ContinualLM``.
        """
        if problem := pairs_problem(adapter):
            self._drop_directions(problem)

    def _make_pairs(self, pl_module: Any) -> None:
        """As soon as the model is there, whose checkpoint may then be loaded."""
        self._check_pairs(pl_module.model)
        if self._gates_pairs(pl_module) and not has_pairs(pl_module.model):
            add_pairs(pl_module.model, len(pl_module.tasks))

    def _check_pairs(self, model: torch.nn.Module) -> None:
        if self._directions and (problem := unfit_pairs(model, self._gatherer.names(model))):
            self._drop_directions(problem)

    def _drop_directions(self, problem: str) -> None:
        if self._directions and not self._is_auto:
            raise AgclError(
                f"`directions` gives each task a LoRA pair of its own, but {problem}. Or give `directions: null`."
            )
        self._directions = None

    def _gates_pairs(self, pl_module: Any) -> bool:
        return self._directions is not None and pl_module.adapter is not None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check regime, optimizer, parameters and architecture before anything is trained."""
        self.check_regime(pl_module.tasks.regime)
        if self._gates_pairs(pl_module):
            activate(pl_module.model)  # on resuming, the pairs loaded
            self._kept_bytes = past_bytes(pl_module.model)
        if self.source == "single_task":
            check_single_task(trainer)
            self._initial = self._initial or InitialModel.of(pl_module)
        if warning := self.gate_warning(self._optimizer(trainer)):
            rank_zero_warn(warning)
        if has_shards(pl_module.model):
            self._check_gate_on_shards()
        with trainer.precision_plugin.forward_context():
            self.check_model(pl_module.model, next(self._gatherer.samples(trainer, pl_module, 0)))

    def check_regime(self, regime: Regime) -> None:
        """Raise if there are no old tasks to protect."""
        if regime == "joint":
            raise AgclError(
                "AttributionCallback protects old tasks from new ones; `regime: joint` has neither. Leave it out."
            )

    def gate_warning(self, optimizer: torch.optim.Optimizer) -> str | None:
        """What to be told where the gate has no effect under an optimizer."""
        if self.gate != "gradient" or not cancels_gradient_gate(optimizer):
            return None
        return (
            f"gate: gradient protects nothing under {type(optimizer).__name__}, whose step does not change when a "
            "gradient entry is scaled by a constant. Use gate: update (or auto), or SGD."
        )

    def check_model(self, model: torch.nn.Module, sample: Sample) -> None:
        """Raise if no parameter is to be scored, or the estimator cannot see into the model.

        Args:
            model: The model, or one of the same architecture.
            sample: A row of the first task, answered right or wrong.
        """
        self._gatherer.check(model, sample)
        self._check_pairs(model)
        if self._directions and not self._directions.find(model, self._gatherer.names(model), sample):
            if not self._is_auto:
                raise AgclError(
                    "`directions` gates weight matrices of linear maps, but none of the selected parameters is one; "
                    "give `directions: null`."
                )
            self._directions = None

    def _check_gate_on_shards(self) -> None:
        if self.earlier is not None:
            raise AgclError(
                "`earlier` is read whole, which weights that are split over processes (ModelParallelStrategy) are not; "
                "take `strategy: ddp`."
            )
        if self._directions:
            raise AgclError(
                "`directions` looks at whole weight matrices, which are split over processes here "
                "(ModelParallelStrategy); give `directions: null`, or take `strategy: ddp`."
            )
        if self.control != "none":
            raise AgclError(
                f"`control: {self.control}` looks at whole tensors of importance, which weights that are split over "
                "processes (ModelParallelStrategy) do not have; take `strategy: ddp` for controls."
            )
        if self.gate == "gradient":
            raise AgclError(
                "`gate: gradient` works by gradient hooks, which weights that are split over processes "
                "(ModelParallelStrategy) do not run; take `gate: update`, or `strategy: ddp`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Hold what the model can do. On resuming: bring along the tasks' files, make up for a task boundary."""
        begins = self._begin_with_earlier(pl_module)
        self._so_far.bring_along(trainer, pl_module.model)
        check_importance(self.importance, pl_module.model.named_parameters())
        if self._directions:
            self._directions.to(pl_module.device)
            self._directions.dtype = _dtype_of_products(trainer)
        completed = pl_module.tasks.num_completed(trainer.current_epoch)
        if completed:
            # From a checkpoint of an epoch's last batch, Lightning goes on without that epoch's end.
            self._pass_boundary(trainer, pl_module, completed - 1)
            return
        if self._directions and self._directions.options.own_text and not self._directions.moments.sums:
            self._hold_own_text(trainer, pl_module)
            begins = True
        self._attach_gate(trainer, pl_module, is_last=False, begins=begins)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At a task's first batch (resuming, Lightning may leave out an epoch's start): let the estimator see it."""
        if batch_idx == 0:  # resuming after an epoch's last batch, Lightning leaves out its end
            self._close_directions()
        if self._task_begun != pl_module.task_index:
            self._task_begun = pl_module.task_index
            if self.source == "running":
                self._gatherer.begin_task(pl_module.model)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """At a task boundary: importance of the task just learned, merge, new gate."""
        if not trainer.is_last_batch:  # a limit has cut the epoch short; a resumed run goes on within it
            return
        self._close_directions()  # before weights are saved
        if pl_module.ends_task:
            self._pass_boundary(trainer, pl_module, pl_module.tasks.index_at(trainer.current_epoch))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Score the weights as the gate leaves them."""
        self._close_directions()
        if self._gates_pairs(pl_module) and trainer.state.fn != TrainerFn.FITTING:  # a checkpoint may have been loaded
            activate(pl_module.model)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the weights as the gate has them, also where a limit has ended the training within an epoch."""
        self._close_directions()

    def _close_directions(self) -> None:
        if self._directions:
            self._directions.close()

    def _begin_with_earlier(self, pl_module: Any) -> bool:
        """Protect what an earlier run has learned, and say whether there is one that was not yet taken in."""
        run, self._earlier_run = self._earlier_run, None
        if run is None:
            return False
        by_direction, is_adapted = run.state["directions"], pl_module.adapter is not None
        if run.is_adapted and not is_adapted:
            raise AgclError(
                f"`earlier`: {run.path} has trained an adapter, so that it does not know what embeddings and "
                "normalisations are needed for, which are trained here: train an adapter again (`model.adapter`)."
            )
        if is_adapted and not self._directions:
            raise AgclError("`earlier` protects an adapter's tasks by `directions`; without, the adapter begins anew.")
        self._check_kind(by_direction, f"`earlier`: {run.path} is of a run")
        run.check_model(pl_module.model.state_dict())
        if self._directions:
            self._directions.begin_with(by_direction)
        if not is_adapted:  # whose pairs are others
            self._so_far.begin_with(run.state["so_far"])
        rank_zero_info(f"Protected from the first task on: {', '.join(run.tasks)} ({run.path}).")
        return True

    def _hold_own_text(self, trainer: Trainer, pl_module: Any) -> None:
        """Take in the directions of what the model writes by itself."""
        assert self._directions is not None
        options, seed = self._directions.options, self._resolved_seed(trainer)
        start = time.perf_counter()
        shown = activity(trainer, "Attribution of what the model writes itself", options.own_text, "pieces")
        with shown as advance, trainer.precision_plugin.forward_context():
            pieces = write_text(pl_module.model, pl_module.tokenizer, options.own_text, options.own_tokens, seed)
            pieces = trainer.strategy.broadcast(pieces)  # drawn by one process: rounding may decide what is drawn
            samples = text_samples(pieces.to(pl_module.device))
            self._directions.learn(self._gatherer.text_evidence(trainer, pl_module, samples, advance))
        rank_zero_info(
            f"Before the first task: {len(pieces)} pieces of {pieces.shape[1]} tokens, which the model wrote "
            f"itself, in {time.perf_counter() - start:.0f} s; what they rest on is held from the start."
        )

    def _pass_boundary(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        # On resuming, Lightning may run an epoch's end again, or never have run it: what is there is kept.
        is_last, begins = index + 1 == len(pl_module.tasks), self.num_boundaries <= index
        if begins:
            if self._directions:
                self._directions.make_up(self._optimizer(trainer), pl_module.model, self._resolved_seed(trainer))
            if self.reestimate:
                self._reestimate(trainer, pl_module, index)
            self._learn_importance(trainer, pl_module, index)
            self.num_boundaries = index + 1
            if self._gates_pairs(pl_module) and not is_last:
                set_aside(pl_module.model, index, self._resolved_seed(trainer) + index)
        self._attach_gate(trainer, pl_module, is_last=is_last, begins=begins)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave no hook behind."""
        self._detach_gate()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind; Lightning does not call the end-of-fit hooks on errors."""
        self._detach_gate()

    def state_dict(self) -> dict[str, Any]:
        """Merged importance, task counter, the tasks' files and an adapter's first weights: what resuming needs."""
        return {
            "source": self.source,
            "initial": None if self._initial is None else vars(self._initial),
            "so_far": self._so_far.state_dict(),
            "estimator": self.estimator.state_dict(),
            "directions": None if self._directions is None else self._directions.state_dict(),
            "num_boundaries": self.num_boundaries,
            "task_begun": self._task_begun,
            "kept_bytes": self._kept_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            AgclError: If its importance comes from another source, or was merged in another way, or only one of the
                two gates by direction.
        """
        if state_dict["source"] != self.source:
            raise AgclError(
                f"The importance so far has `source: {state_dict['source']}`, not `{self.source}`; keep to it."
            )
        directions = state_dict.get("directions")
        if self._is_auto and directions is None:
            self._directions = None  # as it began
        self._check_kind(directions, "The importance so far was computed")
        self._earlier_run = None
        if self._directions and directions:
            self._directions.load_state_dict(directions)
        self._initial = None if state_dict["initial"] is None else InitialModel(**state_dict["initial"])
        self._so_far.load_state_dict(state_dict["so_far"])
        self.estimator.load_state_dict(state_dict["estimator"])
        self.num_boundaries = state_dict["num_boundaries"]
        self._task_begun = state_dict["task_begun"]
        self._kept_bytes = state_dict["kept_bytes"]

    def _check_kind(self, directions: dict[str, Any] | None, what: str) -> None:
        """Raise unless what was gated by direction is to be so, and only that."""
        if (directions is None) != (self._directions is None):
            said = "without" if directions is None else "with"
            raise AgclError(f"{what} {said} `directions`; keep to it.")

    # --------------------------------------------------------------- importance

    def _learn_importance(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        """Importance of the task just learned."""
        task = pl_module.tasks[index].name
        start = time.perf_counter()
        observed = self._directions.observer() if self._directions else None
        if self._initial is None:
            observe = None if observed is None else observed.observe
            gathered = self._gatherer.gather(trainer, pl_module, index, observe=observe)
        else:
            rank_zero_info(f"Training a model on task `{task}` alone for its importance (source: single_task).")
            gathered = gather_from_single_task(trainer, pl_module, index, self._gatherer, self._initial)
        if gathered is None:
            rank_zero_warn(
                f"Task `{task}`: no training row is answered correctly, so it has no importance and the following "
                "tasks are free to overwrite it. Train it longer or with a higher learning rate."
            )
            return
        gathered.metadata["source"] = self.source
        self._so_far.take_in(trainer, f"{index:02d}_{task}", gathered)
        if self._directions:
            with trainer.precision_plugin.forward_context():
                self._directions.learn(self._gatherer.evidence(trainer, pl_module, index), observed)
        seconds = time.perf_counter() - start
        for logger in trainer.loggers:  # not self.log, which the start of a resumed run does not allow
            values = {"attribution/seconds": seconds, "attribution/samples": float(gathered.num_used)}
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(
            f"Importance of task `{task}` from {gathered.num_used} rows in {seconds:.0f} s: {self.files[task]}"
        )

    def _reestimate(self, trainer: Trainer, pl_module: Any, index: int) -> None:
        """Make the merge of the tasks before this one anew, on the present model."""
        self._detach_gate()  # which holds the merge so far
        self._so_far.merge_anew()
        num_tasks = num_rows = self._kept_bytes = 0
        for old in range(index):
            task = pl_module.tasks[old].name
            kept = trainer.datamodule.kept_rows(old, self.reestimate)  # type: ignore[attr-defined]
            self._kept_bytes += kept.with_format("arrow")[:].nbytes
            gathered = self._gatherer.gather(trainer, pl_module, old, kept)
            if gathered is None:
                self._so_far.take_in_again(trainer, task)
                continue
            num_tasks, num_rows = num_tasks + 1, num_rows + gathered.num_used
            gathered.metadata |= {"source": self.source, "reestimated_after": pl_module.tasks[index].name}
            self._so_far.take_in(trainer, f"{old:02d}_{task}_after_{index:02d}", gathered)
        if index:
            rank_zero_info(
                f"Importance of {num_tasks} of {index} earlier tasks re-estimated from {num_rows} kept rows."
            )

    # --------------------------------------------------------------------- gate

    def _attach_gate(self, trainer: Trainer, pl_module: Any, *, is_last: bool, begins: bool) -> None:
        self._detach_gate()
        seed, optimizer = self._resolved_seed(trainer), self._optimizer(trainer)
        importance, is_sharded = self.importance, has_shards(pl_module.model)
        if self._directions:
            self._directions.attach(optimizer, pl_module.model, seed, is_last=is_last, begins=begins)
            importance = {name: t for name, t in importance.items() if not self._directions.leaves_out(name)}
        if not importance:
            return
        if self.control == "shuffled":
            importance = shuffled(importance, seed)
        elif self.control == "flattened":  # to the mean of what is gated like this
            importance = flattened(importance)
        kind = self.gate
        if kind == "auto":
            kind = "update" if is_sharded else choose_gate(optimizer)
        gate_class = GradientGate if kind == "gradient" else UpdateGate
        moves = self.importance_on == "device"
        gate = gate_class(pl_module.model.named_parameters(), importance, self.strength, moves_importance=moves)
        self._attached = gate.attach(optimizer)

    def _detach_gate(self) -> None:
        if self._directions:
            self._directions.detach()
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    def plasticity(self) -> dict[str, float]:
        """Mean remaining plasticity of each gated parameter, in [0, 1]; empty where nothing is gated."""
        by_entry = {} if self._attached is None else self._attached.plasticity()
        return by_entry | (self._directions.plasticity() if self._directions else {})

    def _resolved_seed(self, trainer: Trainer) -> int:
        return resolve_seed(self.seed, trainer.datamodule)  # type: ignore[attr-defined]

    @staticmethod
    def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
        if len(trainer.optimizers) != 1:
            raise AgclError(
                f"AttributionCallback gates exactly one optimizer; the module has {len(trainer.optimizers)}."
            )
        return trainer.optimizers[0]


def _check_reestimate(reestimate: int, source: Source, estimator: Estimator, earlier: str | None) -> None:
    if reestimate < 0:
        raise AgclError(f"`reestimate` is {reestimate}; give a number of rows, or 0 to keep none.")
    if reestimate and source == "single_task":
        raise AgclError(
            "`reestimate` scores old tasks on the running model, `source: single_task` every task on a model of its "
            "own; choose one of them."
        )
    if reestimate and not estimator.uses_samples:
        name = type(estimator).__name__
        raise AgclError(f"`reestimate` keeps rows, but the estimator {name} looks at none; leave `reestimate` out.")
    if reestimate and earlier is not None:
        raise AgclError("`reestimate` makes the merge anew from rows, which `earlier` has none of; leave one out.")


def _dtype_of_products(trainer: Trainer) -> torch.dtype:
    """As the model's own products: bfloat16 under ``bf16-mixed``, whose range suits steps."""
    kind = trainer.strategy.root_device.type
    with trainer.precision_plugin.forward_context():
        is_narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if is_narrow else torch.float32


def _tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
