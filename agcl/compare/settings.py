"""What a comparison's YAML file says, checked before anything runs."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from agcl.errors import AgclError, one_line

RESERVED = ("seed_everything", "data.seed", "data.order", "trainer.logger")
"""Keys that the comparison gives each run itself."""

Values = dict[str, Any]
"""Dotted keys of ``agcl fit`` and their values, such as ``{"model.optimizer.init_args.lr": 1.0e-4}``."""


@dataclass
class Method:
    """One method: what is laid over the base, and what is tried to find its best settings.

    Args:
        configs: Configurations laid over the base, in this order; paths as for ``agcl fit``.
        settings: Dotted keys that all runs of the method get.
        grid: Dotted key -> values to try; a trial is one combination, the first key varying slowest. A step of the key
            into a list is an item's number or class: ``trainer.callbacks.AttributionCallback.init_args.strength``.
        trials: The trials one by one, in place of a grid.
    """

    configs: list[str] = field(default_factory=list)
    settings: Values = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    trials: list[Values] = field(default_factory=list)

    def all_trials(self) -> list[Values]:
        """The combinations to choose from; a method without any has a single, empty one."""
        return self.trials or [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass
class Comparison:
    """Methods x seeds (x orders), each method with its own settings, chosen on one seed.

    Args:
        base: Configurations of every run, in this order; paths are relative to the working directory, or names of
            built-in ones, as for ``agcl fit``.
        methods: Name -> method.
        seeds: Seeds of the runs that the table is made of.
        output: Folder of the runs and tables.
        settings: Dotted keys that every run gets.
        tuning_seed: Seed of the trials; the first of ``seeds`` if left out.
        trial_configs: Configurations laid over everything else in trials alone.
        trial_settings: Dotted keys of trials alone: what makes them score validation rows, or shortens them.
        selection: The metric, at the end of a trial, that the largest value of is chosen by.
        allow_unequal_trials: Let methods have different numbers of trials (a bound such as joint training).
        orders: Name -> order of the tasks' names; every method runs in each. Trials use the first.
        reference: Method that the others are compared with, pair by pair; the first if left out.
        learning_accuracy_tolerance: How much lower than the reference's a method's learning accuracy may be before its
            better backward transfer is called bought. The default is one answer in a hundred.
        confidence: Level of the bootstrap intervals.
        runner: ``processes`` of this machine, or tasks of a Ray cluster whose machines share the file system.
        parallel: Runs at a time; one for each entry of ``devices`` if left out, else one. Ray decides by itself.
        threads: CPU threads of each run (with Ray: its CPUs); the libraries' own choice if left out.
        devices: GPUs of the runs at a time, as in ``CUDA_VISIBLE_DEVICES``: ``[0, 1]``, or ``["0,1", "2,3"]``.
        gpus_per_run: GPUs that Ray gives each run.
        keep_models: Keep each run's model, checkpoints and importance files, which are large.
    """

    base: list[str]
    methods: dict[str, Method]
    seeds: list[int]
    output: str
    settings: Values = field(default_factory=dict)
    tuning_seed: int | None = None
    trial_configs: list[str] = field(default_factory=list)
    trial_settings: Values = field(default_factory=dict)
    selection: Literal["average_performance", "learning_accuracy", "backward_transfer"] = "average_performance"
    allow_unequal_trials: bool = False
    orders: dict[str, list[str]] = field(default_factory=dict)
    reference: str | None = None
    learning_accuracy_tolerance: float = 0.01
    confidence: float = 0.95
    runner: Literal["processes", "ray"] = "processes"
    parallel: int | None = None
    threads: int | None = None
    devices: list[int | str] = field(default_factory=list)
    gpus_per_run: float = 0
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds:
            raise AgclError("A comparison needs at least one method and one seed.")
        for name in ("seeds", "devices"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise AgclError(f"`{name}` {values} names one twice.")
        if self.tuning_seed is None:
            self.tuning_seed = self.seeds[0]
        if self.reference is None:
            self.reference = next(iter(self.methods))
        if self.reference not in self.methods:
            raise AgclError(f"`reference` is `{self.reference}`, which is none of the methods {_list(self.methods)}.")
        if self.parallel is None:
            self.parallel = max(1, len(self.devices))
        if self.parallel < 1 or (self.devices and self.parallel > len(self.devices)):
            raise AgclError(f"`parallel` is {self.parallel}; give at least 1, and at most one for each of `devices`.")
        if not 0 < self.confidence < 1:
            raise AgclError(f"`confidence` is {self.confidence:g}; give a level between 0 and 1, such as 0.95.")
        for owner, keys in self._all_keys():
            for key in keys:
                _check_key(owner, key)
        self._check_trials()

    def _all_keys(self) -> list[tuple[str, list[str]]]:
        shared = [("settings", list(self.settings)), ("trial_settings", list(self.trial_settings))]
        return shared + [
            (name, [*method.settings, *(key for trial in [method.grid, *method.trials] for key in trial)])
            for name, method in self.methods.items()
        ]

    def _check_trials(self) -> None:
        numbers = {}
        for name, method in self.methods.items():
            if not name or name.strip(".") == "" or "/" in name or "\\" in name:
                raise AgclError(f"A method is named {name!r}; its runs lie in a folder of that name.")
            if method.grid and method.trials:
                raise AgclError(f"Method `{name}` has both a `grid` and `trials`; give one of them.")
            for key, values in method.grid.items():
                if not values:
                    raise AgclError(f"Method `{name}`: the grid has no value of `{key}`; give at least one.")
            trials = method.all_trials()
            if any(trials.count(trial) > 1 for trial in trials):
                raise AgclError(f"Method `{name}` has a trial twice; a repeated value would give it fewer trials.")
            numbers[name] = len(trials)
        if len(set(numbers.values())) > 1 and not self.allow_unequal_trials:
            raise AgclError(
                "The methods have different numbers of trials, which favours those with more: "
                f"{', '.join(f'{name} {number}' for name, number in numbers.items())}. "
                "Give each as many, or set `allow_unequal_trials: true`."
            )


def read_comparison(path: Path) -> Comparison:
    """Read and check a comparison's YAML file.

    Raises:
        AgclError: In one line, if the file cannot be read, or what it says cannot work.
    """
    if not path.is_file():
        raise AgclError(f"The file {path} does not exist.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison)
    try:
        return Comparison(**vars(parser.instantiate(parser.parse_path(path))))
    except ArgumentError as error:
        raise AgclError(f"{path}: {one_line(error, None)}") from error


def _check_key(owner: str, key: str) -> None:
    if not all(key.split(".")):
        raise AgclError(f"`{owner}`: {key!r} is no dotted key of `agcl fit`, such as model.optimizer.init_args.lr.")
    for reserved in RESERVED:
        if f"{key}.".startswith(f"{reserved}."):
            raise AgclError(f"`{owner}` sets `{key}`, which the comparison gives each run itself.")


def _list(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
