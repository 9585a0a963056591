"""``agcl fit --resume auto``: the newest good checkpoint that an earlier run of the same configuration left."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from agcl.callbacks.run_folder import run_folder
from agcl.checkpoints import look_into, newest
from agcl.configurations import all_callbacks, as_list
from agcl.errors import AgclError

Config = dict[str, Any]

RECORD = "agcl_run"
"""Key in a checkpoint: configuration (JSON), run folder and precision of the run that wrote it."""

# What a run may be gone on with differently: where, how and how far it runs, not what it learns.
_INCIDENTAL = ("resume", "ckpt_path", "weights_only", "config")
_INCIDENTAL_TO_TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "plugins", "logger", "default_root_dir", "profiler"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "detect_anomaly"),
    *("max_steps", "max_time"),  # no learning rate depends on them: schedules are by the tasks' epochs
)
_INCIDENTAL_CALLBACKS = ("Checkpoint", "ProgressBar", "Monitor", "Summary")


class RunRecord(SaveConfigCallback):
    """LightningCLI's ``config.yaml``, and in each checkpoint what run it is of.

    The file is in the run's own folder also where Lightning knows only one that all runs share.
    """

    def __init__(self, *args: Any, record: Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record = record or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``."""
        self._folder = run_folder(trainer)
        self.save_to_log_dir = trainer.log_dir is not None and self._folder == Path(trainer.log_dir)
        super().setup(trainer, pl_module, stage)
        self.record["folder"] = str(self._folder)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, unless that was done in the usual place."""
        if not self.save_to_log_dir:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = str(self._folder / self.config_filename)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Config) -> None:
        """Add the record."""
        checkpoint[RECORD] = dict(self.record)


def configuration(parser: ArgumentParser, config: Namespace) -> Config:
    """What a run learns, and how, as plain values: what must be the same for it to be gone on with.

    Args:
        parser: The parser of the command line.
        config: What it parsed, with its subcommand.
    """
    content = yaml.safe_load(parser.dump(config, skip_unset=False))[config.subcommand]
    content = {key: value for key, value in content.items() if key not in _INCIDENTAL}
    trainer = {**content["trainer"], "callbacks": _essential(content["trainer"].get("callbacks"))}
    return {**content, "trainer": trainer, "extra_callbacks": _essential(content.get("extra_callbacks"))}


def _essential(callbacks: Any) -> list[Any]:
    return [c for c in as_list(callbacks) if not c["class_path"].endswith(_INCIDENTAL_CALLBACKS)]


def resume_auto(config: Namespace, wanted: Config) -> tuple[Config, bool]:
    """Fill in ``ckpt_path`` and, for TensorBoard's logger, the folder of the run to go on with.

    Broken checkpoints, and those of other configurations, are passed over with a warning. If none is left, the run
    starts afresh and says so.

    Args:
        config: The subcommand's, changed in place.
        wanted: As :func:`configuration` gives it.

    Returns:
        The checkpoint's record, empty if there is none to go on from; and whether ``config.yaml`` may be written over,
        since no checkpoint of another configuration was found.
    """
    root, folders = run_folders(config.trainer)
    dirpaths = [Path(path) for path in _dirpaths(all_callbacks(config))]
    candidates = newest([*(folder / "checkpoints" for folder in folders), *dirpaths])
    others = 0
    for path in candidates:
        try:
            record = look_into(path).get(RECORD) or {}
        except AgclError as error:
            rank_zero_warn(f"--resume auto passes over a checkpoint: {error}")
            continue
        if problem := _problem(record, wanted):
            rank_zero_warn(f"--resume auto passes over {path}: {problem}. (--ckpt_path takes it all the same.)")
            others += 1
            continue
        rank_zero_info(f"Resuming from {path}.")
        config.ckpt_path = str(path)
        _stay_in_folder(config.trainer, root, Path(record["folder"]))
        return record, True
    where = ", ".join(dict.fromkeys(map(str, (root, *dirpaths))))
    rank_zero_info(f"--resume auto: no checkpoint to go on from in {where}; starting afresh.")
    return {}, others == 0


def _problem(record: Config, wanted: Config) -> str | None:
    """Why a checkpoint is not of the wanted configuration; None if it is."""
    if not record:
        return "it does not say of which configuration it is"
    found, expected = (_compared(content) for content in (json.loads(record["configuration"]), wanted))
    differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if not differing:
        return None
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"it is of another configuration, which differs in {', '.join(differing[:3])}{more}"


def _compared(content: Config) -> Config:
    """Dotted key and value of all that must be the same."""
    trainer = {key: value for key, value in content["trainer"].items() if key not in _INCIDENTAL_TO_TRAINER}
    return dict(_flat({**content, "trainer": trainer}))


def _flat(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each leaf."""
    children = content.items() if isinstance(content, Mapping) else enumerate(content) if _is_list(content) else ()
    if not children:
        yield key, content
    for name, value in children:
        yield from _flat(value, f"{key}.{name}" if key else str(name))


def _is_list(content: Any) -> bool:
    return isinstance(content, list) and bool(content)


# ------------------------------------------------------------------ folders


def run_folders(trainer: Namespace) -> tuple[Path, list[Path]]:
    """Where the logger makes the runs' folders, and those that are there (or the one that it is told to use)."""
    default_root = trainer.default_root_dir or os.getcwd()
    logger = _logger(trainer)
    if logger is False:
        return Path(default_root), [Path(default_root)]
    options = logger.get("init_args") or {} if isinstance(logger, Namespace) else {}
    names = [options[key] for key in ("name", "project") if options.get(key) is not None]
    root = Path(os.path.expanduser(os.path.expandvars(options.get("save_dir") or default_root)))
    root /= names[0] if names else "lightning_logs"
    version = options.get("version")
    if version is not None:
        return root, [root / (version if isinstance(version, str) else f"version_{version}")]
    return root, [folder for folder in root.glob("*") if folder.is_dir()]


def _dirpaths(callbacks: list[Any]) -> list[str]:
    """Folders that checkpoint callbacks were given."""
    options = [callback.get("init_args") or {} for callback in callbacks]
    return [option["dirpath"] for option in options if option.get("dirpath")]


def _logger(trainer: Namespace) -> Any:
    """The logger whose folder is the run's."""
    return trainer.logger[0] if isinstance(trainer.logger, list) and trainer.logger else trainer.logger


def _stay_in_folder(trainer: Namespace, root: Path, folder: Path) -> None:
    """Let TensorBoard's logger go on in an earlier run's folder; the others would delete or refuse what is there."""
    if root.resolve() not in folder.resolve().parents:
        return
    version = folder.resolve().relative_to(root.resolve()).parts[0]
    logger = _logger(trainer)
    if logger is None or logger is True:  # Lightning's default, with TensorBoard installed
        options = Namespace(save_dir=str(root.parent), name=root.name, version=version)
        trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=options)
    elif isinstance(logger, Namespace) and logger.class_path.endswith("TensorBoardLogger"):
        logger.init_args.version = version
