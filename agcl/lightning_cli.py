"""``agcl fit --config ...``: LightningCLI with the continual loop's settings filled in."""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from timeit import Timer
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from agcl.callbacks import ContinualMonitor, ContinualReport, TaskProgressBar
from agcl.data.datamodule import ContinualDataModule
from agcl.data.sequence import Regime
from agcl.errors import AgclError
from agcl.module import ContinualLM
from agcl.trust import check_remote_code, check_sharded_checkpoint


class AgclCLI(LightningCLI):
    """LightningCLI for one model class and one data module class, with what both must agree on linked.

    The Trainer's ``max_epochs`` follows from the tasks' epochs, the tokenizer from the model. ``trainer.precision`` is
    chosen by the machine unless given (:func:`choose_precision`). ``extra_callbacks`` is a list beside
    ``trainer.callbacks``, for what is to stay when a method's overlay replaces that list: measurements.
    """

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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Remember what was said on the command line, other than in a file."""
        self.words = sys.argv[1:] if args is None else list(args)
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Check what may run code, and the checkpoint's file; choose precision and progress bar where none is given."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_remote_code(config.model.trust_remote_code, self.words)
        check_sharded_checkpoint(config.get("ckpt_path"), self.words)
        _restrict_checkpoints(config)
        _check_checkpoint_file(config.get("ckpt_path"))
        trainer = config.trainer
        configured = [callback.class_path for callback in _all_callbacks(config)]
        if trainer.enable_progress_bar is False or any(path.endswith("ProgressBar") for path in configured):
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in defaults if not isinstance(c, TaskProgressBar)]
        if trainer.precision is None:
            trainer.precision = choose_precision(trainer.accelerator)
            rank_zero_info(
                f"Precision: {trainer.precision}, the faster one on this machine (set trainer.precision to change it)."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the Trainer the extra callbacks too."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        return super().instantiate_trainer(callbacks=_all_callbacks(config), **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given: a checkpoint of another model is to be refused, not trained silently."""


def _restrict_checkpoints(config: Any) -> None:
    """Let checkpoints be read as tensors and plain values, never as objects, whose loading runs code."""
    if config.get("weights_only") is False:
        raise AgclError(
            "`weights_only: false` lets a checkpoint run code; agcl's checkpoints do without, so leave it out."
        )
    if "weights_only" in config:
        config.weights_only = True


def _all_callbacks(config: Any) -> list[Any]:
    """``trainer.callbacks``, which may be a single one, and ``extra_callbacks``."""
    callbacks = config.trainer.callbacks or []
    return [*(callbacks if isinstance(callbacks, list) else [callbacks]), *config.extra_callbacks]


def _check_checkpoint_file(path: str | None) -> None:
    """Refuse, before anything is loaded, a checkpoint that is not there, not whole, not agcl's, or would run code."""
    if path is None or path in ("last", "best", "hpc"):
        return
    if not Path(path).exists():
        raise AgclError(f"The checkpoint {path} does not exist.")
    if Path(path).is_dir():  # sharded
        return
    if not zipfile.is_zipfile(path):
        raise AgclError(f"{path} is not a checkpoint, or not a whole one: take an earlier one.")
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)  # reads no tensor
    except Exception as error:  # torch raises many types for what is not right
        reason = " ".join(str(error).split())[:300]
        raise AgclError(f"The checkpoint {path} cannot be read ({reason}): take an earlier one.") from error
    if not isinstance(content, dict) or "agcl" not in content:
        raise AgclError(f"{path} was not written by agcl: it holds no score matrix. Take a checkpoint of this run.")


def _total_epochs(tasks: Sequence[Any], regime: Regime) -> int:
    # During parsing a dataclass is a namespace of its class path and arguments.
    epochs = [getattr(task, "init_args", task).epochs for task in tasks]
    return max(epochs) if regime == "joint" else sum(epochs)


def choose_precision(accelerator: str = "auto") -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices faster, else ``32-true``.

    A CPU is timed, for some milliseconds: what its instruction set promises (AVX512-BF16) can be slower than float32,
    and without such instructions bfloat16 is emulated.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    # Mixed precision casts the weights at each step: only clearly faster products pay for that.
    is_faster = _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)
    return "bf16-mixed" if is_faster else "32-true"


def _product_seconds(dtype: torch.dtype) -> float:
    """Time of a matrix product of the size of a small model's layer; the smallest of a few."""
    rows, weights = torch.ones(256, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    timer = Timer("rows @ weights", globals={"rows": rows, "weights": weights})
    return min(timer.repeat(repeat=5, number=1))


def run(args: Sequence[str] | None, epilog: str) -> None:
    """Parse the arguments (None: the process's own), and train, validate or test accordingly.

    Raises:
        ArgumentError: If the arguments, or the files they name, do not fit the options.
        AgclError: If what they ask for cannot work.
    """
    no_exit = {"exit_on_error": False}
    try:
        AgclCLI(
            ContinualLM,
            ContinualDataModule,
            args=None if args is None else list(args),
            seed_everything_default=0,
            trainer_defaults={"callbacks": [TaskProgressBar(), ContinualReport(), ContinualMonitor()]},
            parser_kwargs={
                "prog": "agcl",
                "epilog": epilog,
                **no_exit,
                **{name: {"prog": f"agcl {name}", **no_exit} for name in AgclCLI.subcommands()},
            },
        )
    except MisconfigurationException as error:
        raise AgclError(str(error)) from error
