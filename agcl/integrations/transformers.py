"""Attribution and gate as callbacks of Hugging Face's ``Trainer``, and thus of TRL's ``SFTTrainer``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agcl.attribution.computing import (
    check_computable,
    check_options,
    compute_importance,
    compute_input_moments,
    name_of,
)
from agcl.attribution.directions import InputMoments, base_name, is_of_pair, up_of
from agcl.attribution.estimators import LRP, Estimator, PerSampleGradient
from agcl.attribution.importance import ImportanceConfig
from agcl.attribution.levels import Bits
from agcl.attribution.moments_files import load_input_moments, save_input_moments
from agcl.attribution.naming import matching_parameters
from agcl.errors import AgclError, check_choice
from agcl.files import check_writable
from agcl.gating import DirectionalGate, GradientGate, UpdateGate
from agcl.gating.choice import GateKind
from agcl.gating.directional import Map
from agcl.integrations.pytorch import Importance, gate, importance_from, innermost_optimizer, maps_for_adapter
from agcl.shards import has_shards

__all__ = ["DirectionsGate", "ImportanceGate", "TaskDirections", "TaskImportance"]

Moments = InputMoments | str | Path
"""Second moments of inputs, or a file of them."""


class ImportanceGate(TrainerCallback):
    """Protects what earlier tasks need while the ``Trainer`` learns another.

    It gates from the beginning of ``train()`` to its end, by the optimizer inside of accelerate's wrapper, so that
    accumulation, clipping, mixed precision, adapters and data parallelism need nothing. Resuming from a checkpoint
    needs the same importance again, which the ``Trainer`` does not keep.

    Args:
        importance: As `agcl.compute_importance` gives it, or an importance file; of several tasks their list, of which
            the largest value counts.
        strength: Exponent of the plasticity; 1 is the paper's linear gate, 0 no gate.
        kind: ``gradient`` rescales gradients (the paper), ``update`` the optimizer's whole step, ``auto`` picks what
            protects under the optimizer in use: for the Trainer's AdamW, ``update``.
        on_host: Whether importance stays in host memory, from where it is copied over at each step.

    Raises:
        AgclError: If importance cannot be read; at the beginning of training, if it does not fit the model, or under
            DeepSpeed, whose optimizer holds no parameters of the model.
    """

    def __init__(
        self,
        importance: Importance | Sequence[Importance],
        *,
        strength: float = 1.0,
        kind: GateKind = "auto",
        on_host: bool = False,
    ) -> None:
        self.importance = importance_from(importance)
        self.strength = strength
        check_choice("kind", kind, GateKind)
        self.kind: GateKind = kind
        self.on_host = on_host
        self._attached: GradientGate | UpdateGate | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the gate; one that an earlier, interrupted ``train()`` left behind is removed."""
        self._detach()
        _refuse_deepspeed(self, args)
        self._attached = gate(
            kwargs["optimizer"],
            kwargs["model"],
            self.importance,
            strength=self.strength,
            kind=self.kind,
            on_host=self.on_host,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind."""
        self._detach()

    def plasticity(self) -> dict[str, float]:
        """Mean remaining plasticity of each gated parameter, in [0, 1]; empty while nothing is trained."""
        return {} if self._attached is None else self._attached.plasticity()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.detach()
            self._attached = None


class DirectionsGate(TrainerCallback):
    """Protects what earlier tasks need by the directions of each weight matrix's inputs, while another is learned.

    It protects far better than the gate entry by entry (`ImportanceGate`), and takes more memory: see
    :class:`agcl.gating.DirectionalGate`. Where several steps pass between two products with the map, what has moved
    since is mapped before the Trainer scores or saves by its own schedule, at each epoch's end, and at the end; a
    callback that asks for more is to come before this one. Resuming from a checkpoint needs the same moments again.
    A LoRA adapter is gated as by `agcl.maps_for_adapter`: a fresh one for each task.

    Args:
        moments: As `agcl.compute_input_moments` gives them, or a file of `TaskDirections`; of several tasks, and the
            model's own text (`agcl.own_text_moments`), their list, in which each counts alike.
        importance: As for `ImportanceGate`: gates what is no weight matrix entry by entry. Without it, embeddings,
            normalisations and biases are not gated.
        plasticity: Mean share of its way that a matrix may go; see :func:`agcl.attribution.directions.shares_kept`.
        sharpness: See there.
        every: Steps from one product to the next; more than 1 saves time where batches are small.

    Raises:
        AgclError: If a file cannot be read; at the beginning of training, if moments or importance do not fit the
            model, for values that cannot be, and under DeepSpeed or FSDP, where no process has a whole matrix.
    """

    def __init__(
        self,
        moments: Moments | Sequence[Moments],
        importance: Importance | Sequence[Importance] | None = None,
        *,
        plasticity: float = 0.8,
        sharpness: float = 4.0,
        every: int = 1,
    ) -> None:
        parts = [moments] if isinstance(moments, (InputMoments, str, Path)) else moments
        self.moments = InputMoments()
        for part in parts:
            found = part if isinstance(part, InputMoments) else load_input_moments(part)
            self.moments += found.to("cpu").normalised()
        self.importance = None if importance is None else importance_from(importance)
        self.every = every
        self._shares = plasticity, sharpness
        self._attached: list[DirectionalGate | GradientGate | UpdateGate] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the gates; those that an earlier, interrupted ``train()`` left behind are removed."""
        self._detach(closes=False)  # from a checkpoint, other weights have been loaded since
        _refuse_deepspeed(self, args)
        model, optimizer = kwargs["model"], innermost_optimizer(kwargs["optimizer"])
        if has_shards(model):
            raise AgclError(
                "DirectionsGate looks at whole weight matrices, which FSDP splits over processes; take ImportanceGate, "
                "or data parallelism without sharding."
            )
        places = {base_name(name): parameter.device for name, parameter in model.named_parameters()}
        home = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
        maps: dict[str, Map] = {}
        for name, moment in self.moments.sums.items():  # which are large: one at a time is on the device
            one = InputMoments({name: moment}, {name: self.moments.transposed[name]})
            maps |= one.maps(*self._shares, device=places.get(name, home))
        dtype = torch.bfloat16 if args.bf16 else torch.float32  # as the model's own products
        if any(is_of_pair(name) for name, parameter in model.named_parameters() if parameter.requires_grad):
            begins = state.global_step == 0
            if not begins and len(getattr(model, "peft_config", ())) > 1:
                raise AgclError(
                    "The Trainer goes on from a checkpoint with one adapter alone: begin this task anew, without "
                    "`resume_from_checkpoint`, or merge the adapters of earlier tasks."
                )
            maps = maps_for_adapter(model, maps, begins=begins)
        narrow = {name: (held.to(dtype), is_transposed) for name, (held, is_transposed) in maps.items()}
        self._attached = [DirectionalGate(model.named_parameters(), narrow, self.every).attach(optimizer)]
        by_direction = {*maps, *(up_of(name) for name in maps)}  # a pair learns freely else
        rest = {name: values for name, values in (self.importance or {}).items() if name not in by_direction}
        if rest:
            self._attached.append(gate(optimizer, model, rest))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the Trainer scores or saves."""
        if control.should_evaluate or control.should_save:
            self._close()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same."""
        self._close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind."""
        self._detach()

    def plasticity(self) -> dict[str, float]:
        """Mean remaining plasticity of each gated parameter, in [0, 1]; empty while nothing is trained."""
        return {name: value for attached in self._attached for name, value in attached.plasticity().items()}

    def _close(self) -> None:
        for attached in self._attached:
            if isinstance(attached, DirectionalGate):
                attached.close()

    def _detach(self, *, closes: bool = True) -> None:
        for attached in self._attached:
            if isinstance(attached, DirectionalGate):
                attached.detach(closes=closes)
            else:
                attached.detach()
        self._attached = []


class TaskImportance(TrainerCallback):
    """Computes the importance of the task that the ``Trainer`` has learned, from its own training rows.

    The rows go through the Trainer's collator one by one, in a random order of their own, the same on all processes;
    the Trainer's random numbers and data loader are not touched. Where the best model is loaded at the end, it is of
    that.

    Args:
        save_to: ``.safetensors`` file to write, which the next task's `ImportanceGate` can be given.
        task: The task's name, for the file.
        num_samples: Rows, answered correctly, to use.
        batch_size: Rows that are run together.
        estimator: What scores the weights; ``LRP()``, the paper's, if left out.
        config: How scores over samples become importance.
        only_correct: Leave out rows of which the model does not predict every answer token. Set it to False for plain
            text.
        parameters: Regular expression; only parameters that require a gradient and whose name it is found in are
            scored.
        bits: Of the importance, 8 or 16.
        seed: Of the rows' order, and for estimators that draw random numbers.

    Attributes:
        importance: Parameter name to uint8 or uint16 tensor; empty before the end of training.

    Raises:
        AgclError: For options that cannot be used; at the beginning of training, for rows that cannot; at the end, if
            no row is answered correctly.
        UnsupportedModelError: At the beginning of training, if the estimator cannot see into the model.
    """

    def __init__(
        self,
        save_to: str | Path | None = None,
        task: str | None = None,
        *,
        num_samples: int = 16,
        batch_size: int = 1,
        estimator: Estimator | None = None,
        config: ImportanceConfig = ImportanceConfig(),  # noqa: B008 (immutable)
        only_correct: bool = True,
        parameters: str = "",
        bits: Bits = 8,
        seed: int = 0,
    ) -> None:
        check_options(num_samples, batch_size, bits, parameters)
        self.importance: dict[str, Tensor] = {}
        self._save_to = save_to
        self._estimator = LRP() if estimator is None else estimator
        self._parameters = parameters
        self._seed = seed
        self._options: dict[str, Any] = {  # of `compute_importance`
            "task": task,
            "num_samples": num_samples,
            "batch_size": batch_size,
            "config": config,
            "only_correct": only_correct,
            "bits": bits,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check rows and model before anything is trained; let the estimator see where the task starts."""
        model = kwargs["model"]
        if self._save_to is not None and state.is_world_process_zero:
            check_writable(self._save_to)
        rows = training_rows(kwargs["train_dataloader"], self._seed)
        check_computable(model, rows, estimator=self._estimator, parameters=self._parameters)
        self._estimator.begin_task(model, matching_parameters(model, self._parameters))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the importance; one process writes the file."""
        self.importance = compute_importance(
            kwargs["model"],
            training_rows(kwargs["train_dataloader"], self._seed),
            estimator=self._estimator,
            parameters=self._parameters,
            seed=self._seed,
            save_to=self._save_to if state.is_world_process_zero else None,
            **self._options,
        )


class TaskDirections(TrainerCallback):
    """Finds what the task that the ``Trainer`` has learned asks of the directions of each weight matrix's inputs.

    For `DirectionsGate`, which protects it while the next task is learned. Rows are taken as by `TaskImportance`.

    Args:
        save_to: ``.safetensors`` file to write (:mod:`agcl.attribution.moments_files`), 4 bytes times the squared
            input width of each matrix.
        num_samples: Rows, answered correctly, to use.
        batch_size: Rows that are run together.
        estimator: Whose gradient weights the inputs; ``LRP()`` if left out.
        only_correct: As for `TaskImportance`.
        parameters: Regular expression; only matrices whose name it is found in are looked at.
        seed: Of the rows' order.

    Attributes:
        moments: Empty before the end of training.

    Raises:
        AgclError: For options that cannot be used; at the beginning of training, for rows that cannot; at the end, if
            no row is answered correctly, or the file cannot be written.
        UnsupportedModelError: At the beginning of training, if the estimator cannot see into the model.
    """

    def __init__(
        self,
        save_to: str | Path | None = None,
        *,
        num_samples: int = 16,
        batch_size: int = 1,
        estimator: PerSampleGradient | None = None,
        only_correct: bool = True,
        parameters: str = "",
        seed: int = 0,
    ) -> None:
        check_options(num_samples, batch_size, 8, parameters)
        self.moments = InputMoments()
        self._save_to = save_to
        self._estimator = LRP() if estimator is None else estimator
        self._parameters = parameters
        self._seed = seed
        self._options: dict[str, Any] = {  # of `compute_input_moments`
            "num_samples": num_samples,
            "batch_size": batch_size,
            "only_correct": only_correct,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check rows and model before anything is trained."""
        if self._save_to is not None and state.is_world_process_zero:
            check_writable(self._save_to)
        rows = training_rows(kwargs["train_dataloader"], self._seed)
        check_computable(
            kwargs["model"], rows, estimator=self._estimator, parameters=self._parameters, by_direction=True
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the moments; one process writes the file."""
        model = kwargs["model"]
        self.moments = compute_input_moments(
            model,
            training_rows(kwargs["train_dataloader"], self._seed),
            estimator=self._estimator,
            parameters=self._parameters,
            **self._options,
        )
        if self._save_to is not None and state.is_world_process_zero:
            save_input_moments(self._save_to, self.moments, {"model": name_of(model)})


def _refuse_deepspeed(callback: TrainerCallback, args: TrainingArguments) -> None:
    if args.deepspeed is not None:
        raise AgclError(
            f"{type(callback).__name__} cannot act under DeepSpeed, whose optimizer steps flat copies of the "
            "parameters; leave `deepspeed` out."
        )


def training_rows(dataloader: Any, seed: int) -> Iterator[Any]:
    """Batches of one row each: those of a data loader's data set in a random order, through its collator.

    Args:
        dataloader: The Trainer's, whose sampler (and share of the rows, where there are several processes) is not used.
        seed: Of the order. Rows of a data set without a length come as they are.

    Yields:
        What the collator makes of each row.
    """
    data = rows = dataloader.dataset
    if hasattr(data, "__len__"):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        rows = (data[index] for index in order.tolist())
    for row in rows:
        yield dataloader.collate_fn([row])
