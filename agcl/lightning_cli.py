"""``agcl fit --config ...``: LightningCLI with the continual loop's settings filled in."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from timeit import Timer
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from agcl.callbacks import ContinualMonitor, ContinualReport, TaskProgressBar
from agcl.data.datamodule import ContinualDataModule
from agcl.data.sequence import Regime
from agcl.errors import AgclError
from agcl.module import ContinualLM


class AgclCLI(LightningCLI):
    """LightningCLI for one model class and one data module class, with what both must agree on linked.

    The Trainer's ``max_epochs`` follows from the tasks' epochs, the tokenizer from the model. ``trainer.precision`` is
    chosen by the machine unless given (:func:`choose_precision`).
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what would otherwise have to be written twice."""
        for name in ("model_name_or_path", "gguf_file", "trust_remote_code"):
            parser.link_arguments(f"model.{name}", f"data.{name}")
        parser.link_arguments(("data.tasks", "data.regime"), "trainer.max_epochs", compute_fn=_total_epochs)
        parser.set_defaults({"trainer.reload_dataloaders_every_n_epochs": 1, "trainer.num_sanity_val_steps": -1})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take the words as given: Lightning warns if they come beside ``sys.argv``, from where `agcl.cli` has them."""
        if isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Check the checkpoint's file; choose precision and progress bar where none is given."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        _check_checkpoint_file(config.get("ckpt_path"))
        trainer = config.trainer
        configured = [callback.class_path for callback in trainer.callbacks or []]
        if trainer.enable_progress_bar is False or any(path.endswith("ProgressBar") for path in configured):
            defaults = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in defaults if not isinstance(c, TaskProgressBar)]
        if trainer.precision is None:
            trainer.precision = choose_precision(trainer.accelerator)
            rank_zero_info(
                f"Precision: {trainer.precision}, the faster one on this machine (set trainer.precision to change it)."
            )

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given: a checkpoint of another model is to be refused, not trained silently."""


def _check_checkpoint_file(path: str | None) -> None:
    """Refuse, before anything is loaded, a checkpoint that is not there or not whole."""
    if path is None or path in ("last", "best", "hpc"):
        return
    if not Path(path).exists():
        raise AgclError(f"The checkpoint {path} does not exist.")
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise AgclError(f"{path} is not a checkpoint, or not a whole one: take an earlier one.")


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


def run(args: Sequence[str], epilog: str) -> None:
    """Parse the arguments, and train, validate or test accordingly."""
    AgclCLI(
        ContinualLM,
        ContinualDataModule,
        args=list(args),
        seed_everything_default=0,
        trainer_defaults={"callbacks": [TaskProgressBar(), ContinualReport(), ContinualMonitor()]},
        parser_kwargs={"prog": "agcl", "epilog": epilog, "fit": {"prog": "agcl fit"}},
    )
