"""``agcl fit --config ...``: LightningCLI with the continual loop's settings filled in."""

import inspect
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from timeit import Timer
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from agcl.callbacks import ContinualMonitor, ContinualReport, StopOnSignal, TaskProgressBar
from agcl.checkpoint_io import AtomicCheckpointIO
from agcl.checkpoints import last_whole, look_into
from agcl.configurations import all_callbacks
from agcl.data.datamodule import ContinualDataModule
from agcl.data.sequence import Regime
from agcl.errors import AgclError
from agcl.files import DISK_FULL, MAKE_ROOM
from agcl.module import ContinualLM
from agcl.resuming import RECORD, RunRecord, configuration, resume_auto
from agcl.trust import check_remote_code, check_sharded_checkpoint


class AgclCLI(LightningCLI):
    """LightningCLI for one model class and one data module class, with what both must agree on linked.

    The Trainer's ``max_epochs`` follows from the tasks' epochs, the tokenizer from the model. ``trainer.precision`` is
    chosen by the machine unless given (:func:`choose_precision`). ``extra_callbacks`` is a list beside
    ``trainer.callbacks``, for what is to stay when a method's overlay replaces that list: measurements.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Of Lightning's commands those that tasks have rows for."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes the Trainer's `limit_train_batches: 1` for one batch, not for all."""
        hints = inspect.unwrap(Trainer.__init__).__annotations__
        for name, hint in hints.items():
            # `typing` takes Union[float, int] for the same as Union[int, float] and gives whichever was made first.
            if hint == int | float | None:
                hints[name] = int | float | None
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what would otherwise have to be written twice."""
        for name in ("model_name_or_path", "gguf_file", "trust_remote_code"):
            parser.link_arguments(f"model.{name}", f"data.{name}")
        parser.link_arguments(("data.tasks", "data.regime"), "trainer.max_epochs", compute_fn=_total_epochs)
        parser.add_argument(
            "--extra_callbacks",
            type=list[Callback],
            default=[],
            help="Callbacks beside `trainer.callbacks`, which a method's overlay leaves as they are: measurements.",
        )
        parser.set_defaults({"trainer.reload_dataloaders_every_n_epochs": 1, "trainer.num_sanity_val_steps": -1})
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on from the newest good checkpoint of this configuration's runs, or start if there is none",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take the words as given, and remember them: what a file says is not what the user said.

        Lightning would warn that they come beside ``sys.argv``, from where `agcl.cli` has them.
        """
        self.words = args if isinstance(args, list) else sys.argv[1:]
        _refuse_linked(self.words)
        self.config = parser.parse_args(self.words)

    def before_instantiate_classes(self) -> None:
        """Check what may run code; find or check the checkpoint; choose precision and progress bar if not given."""
        config = self.config[self.subcommand]
        check_remote_code(config.model.trust_remote_code, self.words)
        _restrict_checkpoints(config)
        record = self._find_checkpoint(config)
        trainer = config.trainer
        configured = [callback.class_path for callback in all_callbacks(config)]
        if trainer.enable_progress_bar is False or any(path.endswith("ProgressBar") for path in configured):
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in defaults if not isinstance(c, TaskProgressBar)]
        if trainer.precision is None and record.get("precision"):
            trainer.precision = record["precision"]  # timing might choose another one this time
        elif trainer.precision is None:
            trainer.precision = choose_precision(trainer.accelerator, _is_alone(trainer))
            rank_zero_info(
                f"Precision: {trainer.precision}, the faster one on this machine (set trainer.precision to change it)."
            )
        self.save_config_kwargs["record"] |= {"precision": str(trainer.precision)}

    def _find_checkpoint(self, config: Namespace) -> dict[str, Any]:
        """What the checkpoint to resume from says of its run; empty if there is none.

        Raises:
            AgclError: Before anything is loaded, if it is not there, not whole or not agcl's.
        """
        wanted = configuration(self.parser, self.config)
        self.save_config_kwargs |= {"record": {"configuration": json.dumps(wanted)}}
        if config.resume is not None:
            if self.subcommand != "fit" or config.ckpt_path is not None:
                raise AgclError("`--resume auto` looks for a checkpoint to fit on from: leave out `--ckpt_path`.")
            record, self.save_config_kwargs["overwrite"] = resume_auto(config, wanted)
            check_sharded_checkpoint(config.ckpt_path, self.words)
            return record
        path = config.get("ckpt_path")
        if path is None or path in ("last", "best", "hpc") or "://" in path:
            return {}
        check_sharded_checkpoint(path, self.words)
        return look_into(Path(path)).get(RECORD) or {}

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given: a checkpoint of another model is to be refused, not trained silently."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with the extra callbacks, and with checkpoint files that a crash leaves whole."""
        config = self.config_init[self.subcommand]
        plugins = config.trainer.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**{"plugins": plugins, "callbacks": all_callbacks(config), **kwargs})

    def fit(self, model: ContinualLM, **kwargs: Any) -> None:
        """Train.

        Raises:
            AgclError: If the disk is full.
            SystemExit: With status 128 + signal, if a signal stopped it.
        """
        try:
            self.trainer.fit(model, **kwargs)
        except SystemExit:  # of Lightning's own, with other statuses
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, StopOnSignal) and callback.exit_status:
                    raise SystemExit(callback.exit_status) from None
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise AgclError(_disk_full(self.trainer, error)) from error


def _refuse_linked(words: Sequence[str]) -> None:
    """Say in words what the parser would say of an option that follows from others."""
    if any(word.partition("=")[0] == "--trainer.max_epochs" for word in words):
        raise AgclError("`trainer.max_epochs` follows from the tasks: set the `epochs` of each.")


def _restrict_checkpoints(config: Any) -> None:
    """Let checkpoints be read as tensors and plain values, never as objects, whose loading runs code."""
    if config.get("weights_only") is False:
        raise AgclError(
            "`weights_only: false` lets a checkpoint run code; agcl's checkpoints do without, so leave it out."
        )
    if "weights_only" in config:
        config.weights_only = True


def _disk_full(trainer: Trainer, error: OSError) -> str:
    # Not asked of the Trainer now: it would wait for the other processes, which know nothing of this.
    known = [c.path.parent for c in trainer.callbacks if isinstance(c, StopOnSignal) and c.path]  # type: ignore[attr-defined]
    last = last_whole(known)
    found = "There is no checkpoint yet" if last is None else f"The last good checkpoint is {last}"
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}. {found}. {MAKE_ROOM.capitalize()}, then go on with `--resume auto`."


def _total_epochs(tasks: Sequence[Any], regime: Regime) -> int:
    # During parsing a dataclass is a namespace of its class path and arguments.
    epochs = [getattr(task, "init_args", task).epochs for task in tasks]
    return max(epochs) if regime == "joint" else sum(epochs)


def choose_precision(accelerator: str = "auto", is_alone: bool = True) -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices faster, else ``32-true``.

    A CPU is timed, for some milliseconds: what its instruction set promises (AVX512-BF16) can be slower than float32,
    and without such instructions bfloat16 is emulated.

    Args:
        accelerator: The Trainer's.
        is_alone: Whether one process trains. Several would each time their CPU, and might not choose the same.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if not is_alone:
        return "32-true"
    # Mixed precision casts the weights at each step: only clearly faster products pay for that.
    is_faster = _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)
    return "bf16-mixed" if is_faster else "32-true"


def _is_alone(trainer: Namespace) -> bool:
    """Whether the Trainer's options ask for one process; on a CPU `devices: auto` does."""
    return trainer.num_nodes == 1 and str(trainer.devices) in ("auto", "1")


def _product_seconds(dtype: torch.dtype) -> float:
    """Time of a matrix product of the size of a small model's layer; the smallest of a few."""
    rows, weights = torch.ones(256, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    timer = Timer("rows @ weights", globals={"rows": rows, "weights": weights})
    return min(timer.repeat(repeat=5, number=1))


def run(args: Sequence[str], epilog: str) -> None:
    """Parse the arguments, and train or validate accordingly.

    Raises:
        ArgumentError: If the arguments, or the files they name, do not fit the options.
        AgclError: If what they ask for cannot work.
    """
    no_exit = {"exit_on_error": False}
    # Lightning's use of torch, several times a run, of which its users can mend nothing.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        AgclCLI(
            ContinualLM,
            ContinualDataModule,
            args=list(args),
            seed_everything_default=0,
            # The report comes after the monitor: it writes down what the others have found.
            trainer_defaults={"callbacks": [TaskProgressBar(), ContinualMonitor(), ContinualReport(), StopOnSignal()]},
            save_config_callback=RunRecord,
            parser_kwargs={
                "prog": "agcl",
                "epilog": epilog,
                **no_exit,
                **{name: {"prog": f"agcl {name}", **no_exit} for name in AgclCLI.subcommands()},
            },
        )
    except MisconfigurationException as error:
        raise AgclError(str(error)) from error


class FitConfiguration(AgclCLI):
    """Reads what ``agcl fit`` would be given into ``config``, and builds nothing of it.

    Args:
        args: Words of the command line: ``--config FILE`` and single options.
        prog: The command's name, for its help.
        description: What the command does, for its help.
        options: A dataclass of further options that the command takes; its docstring is their help.
    """

    def __init__(self, args: Sequence[str], *, prog: str, description: str, options: type | None = None) -> None:
        self._args, self._options = list(args), options
        super().__init__(
            ContinualLM,
            ContinualDataModule,
            run=False,
            save_config_callback=None,
            parser_kwargs={"prog": prog, "description": description, "exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The command's own options, and those that ``fit`` has beside the constructors' (configurations hold them)."""
        super().add_arguments_to_parser(parser)
        # A run's `config.yaml` holds these.
        parser.add_method_arguments(
            Trainer, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        )
        if self._options is not None:
            parser.add_class_arguments(self._options)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and leave the random state alone."""
        _refuse_linked(self._args)
        self.config = parser.parse_args(self._args)  # Lightning's own method warns of arguments that are given
        self.config.seed_everything = False

    def before_instantiate_classes(self) -> None:
        """Check what may run code: building a model without weights runs what comes with it all the same.

        Raises:
            AgclError: If a file alone asks for it.
        """
        check_remote_code(self.config.model.trust_remote_code, self._args)

    def instantiate_classes(self) -> None:
        """Build nothing."""
