"""Which runs a comparison consists of, and where each one's folder is."""

import re
from pathlib import Path

from agcl.compare.overlay import overlay
from agcl.compare.runs import Run, digest, read_config, values_text
from agcl.compare.settings import Comparison, Values


class Plan:
    """The runs of a comparison, with the configurations as they are when the plan is made.

    Raises:
        AgclError: If a configuration cannot be read, or a dotted key cannot be set in it.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        stacks = [comparison.base, comparison.trial_configs, *(m.configs for m in comparison.methods.values())]
        self._contents = {path: read_config(path) for stack in stacks for path in stack}
        for name, method in comparison.methods.items():
            for values in method.all_trials():
                self.final_runs(name, values)  # refuses what cannot be planned
            self.trial_runs(name)

    def trial_runs(self, method: str) -> list[Run]:
        """A method's trials, on the tuning seed and the first order; none where there is nothing to choose."""
        trials = self.comparison.methods[method].all_trials()
        if len(trials) == 1:
            return []
        order = next(iter(self.comparison.orders), None)
        assert self.comparison.tuning_seed is not None
        return [self._run(method, values, self.comparison.tuning_seed, order, trial=True) for values in trials]

    def final_runs(self, method: str, values: Values) -> list[Run]:
        """A method's runs that the table is made of."""
        orders: list[str | None] = [*self.comparison.orders] or [None]
        return [
            self._run(method, values, seed, order, trial=False) for order in orders for seed in self.comparison.seeds
        ]

    def _run(self, name: str, values: Values, seed: int, order: str | None, *, trial: bool) -> Run:
        comparison, method = self.comparison, self.comparison.methods[name]
        configs = [*comparison.base, *method.configs, *(comparison.trial_configs if trial else [])]
        layers = [self._contents[path] for path in configs]
        settings = {**comparison.settings, **method.settings, **values, **(comparison.trial_settings if trial else {})}
        settings |= {"seed_everything": seed, "data.seed": seed}
        if order is not None:
            settings["data.order"] = comparison.orders[order]
        config = overlay(layers, settings)
        place = f"seed-{seed}" if order is None else f"seed-{seed}-{order}"
        leaf = f"{_file_name(place)}-{digest([layers, config])}"
        folder = Path(comparison.output) / name / _file_name(values_text(values)) / leaf
        # A name and a version that are empty make the logger's folder the run's own.
        logger = {"save_dir": str(folder), "name": "", "version": "", "default_hp_metric": False}
        config.setdefault("trainer", {})["logger"] = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": logger,
        }
        return Run(name, values, seed, order, tuple(configs), config, folder, digest(layers))


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)[:80]
