"""What loggers show of a run: hyper-parameters for every logger, pictures and distributions for TensorBoard."""

import re
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor, nn

from agcl.attribution.levels import dequantise
from agcl.blocks import layer_of, mean_by_layer
from agcl.callbacks.attribution import AttributionCallback
from agcl.callbacks.hyperparameters import run_hyperparameters
from agcl.data.sequence import TaskSequence
from agcl.metrics import plot_score_matrix
from agcl.module import SCORE
from agcl.plots import plot_importance_map, plot_plasticity
from agcl.shards import local_part

_HISTOGRAM_ENTRIES = 100_000  # a sample that shows the distribution and keeps the event file small
_TASKS_WITH_NUMBERS = 10  # of more, the score matrix has colours alone: thousands of numbers would be drawn in a run


class ContinualMonitor(Callback):
    """Shows the run and each task's outcome in its loggers.

    Any logger gets the run's hyper-parameters, the same keys for every method, and the remaining plasticity
    ``mean((1 - importance) ** strength)`` of each layer after each task, where there is an ``AttributionCallback``;
    ``scores.json`` has the plasticity too. TensorBoard also gets a row for the run in its HParams table, with the
    continual metrics, charts with one line for each task (its Custom Scalars), the score matrix, and histograms and
    pictures of the running importance by layer. Losses, scores and continual metrics are logged by ``ContinualLM``.
    """

    def __init__(self) -> None:
        self._plasticity: dict[str, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Remaining plasticity by layer after each task so far."""
        return {"plasticity": self._plasticity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._plasticity = state_dict["plasticity"]

    def results(self) -> dict[str, Any]:
        """``plasticity`` for ``scores.json``: task learned -> layer -> mean; empty layers where nothing is gated."""
        return {"plasticity": self._plasticity}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier run (what is resumed is loaded after this)."""
        self._plasticity = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Log what the run is made with; a table shows it from here on, with metrics that become defined later."""
        values = run_hyperparameters(trainer, pl_module)
        metrics = {f"transfer/{name}": value.item() for name, value in pl_module.transfer().items()}  # on all ranks
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(values)
                continue
            logger.log_hyperparams(values, metrics, step=trainer.global_step)
            if trainer.is_global_zero:
                logger.experiment.add_custom_scalars(custom_charts(pl_module.tasks))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A task begins (resuming, Lightning may leave an epoch's start out): show what the one before left."""
        index = pl_module.task_index
        if index > 0 and (before := pl_module.tasks[index - 1].name) not in self._plasticity:
            self._log(trainer, pl_module, before)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last task is learned: keep what there is to show in the checkpoint of its last epoch."""
        attribution, num_tasks = _attribution(trainer), len(pl_module.tasks)
        is_behind = attribution is not None and attribution.num_boundaries < num_tasks  # its turn is yet to come
        if pl_module.ends_task and trainer.current_epoch + 1 == trainer.max_epochs and not is_behind:
            self._log(trainer, pl_module, pl_module.tasks[-1].name)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last task is learned, unless a limit has ended the training before."""
        if (last := pl_module.tasks[-1].name) not in self._plasticity and not pl_module.unlearned:
            self._log(trainer, pl_module, last)

    def _log(self, trainer: Trainer, pl_module: Any, task: str) -> None:
        scores = pl_module.score_matrices[SCORE].compute()  # on all ranks
        attribution = _attribution(trainer)
        plasticity = layer_plasticity(attribution, pl_module.model) if attribution else {}
        self._plasticity[task] = plasticity
        for logger in trainer.loggers:
            if plasticity:
                logger.log_metrics({f"plasticity/{tag(k)}": v for k, v in plasticity.items()}, step=trainer.global_step)
            if not isinstance(logger, TensorBoardLogger) or not trainer.is_global_zero:
                continue
            board, step = logger.experiment, trainer.global_step
            tasks = [each.name for each in pl_module.tasks]
            board.add_figure("score_matrix", score_figure(scores, tasks), step)
            importance = _shown(attribution) if attribution else {}
            if importance:
                board.add_figure("importance", plot_importance_map(importance)[0], step)
                left = {each: self._plasticity.get(each, {}) for each in tasks}  # blank are those to come
                board.add_figure("plasticity", plot_plasticity(left)[0], step)
                for layer, values in layer_samples(importance).items():
                    board.add_histogram(f"importance/{tag(layer)}", values, step)


def _attribution(trainer: Trainer) -> AttributionCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, AttributionCallback)), None)  # type: ignore[attr-defined]


def score_figure(scores: Tensor, tasks: list[str]) -> Figure:
    """The score matrix as TensorBoard gets it after each task."""
    return plot_score_matrix(scores, tasks, numbers=len(tasks) <= _TASKS_WITH_NUMBERS)[0]


def _shown(attribution: AttributionCallback) -> dict[str, Tensor]:
    """The importance that is here: of weights that are split over processes, this one's rows."""
    parts = {name: local_part(levels) for name, levels in attribution.importance.items()}
    return {name: levels for name, levels in parts.items() if levels.numel()}


def custom_charts(tasks: TaskSequence) -> dict[str, dict[str, list[Any]]]:
    """Layout of TensorBoard's Custom Scalars: what a run is judged by, with a line for each task, metric or layer.

    Args:
        tasks: The run's tasks.

    Returns:
        Category to chart to regular expressions of tags, as ``SummaryWriter.add_custom_scalars`` takes them.
    """
    probes = dict.fromkeys(probe for task in tasks for probe in task.probes)

    def chart(*patterns: str) -> list[Any]:
        return ["Multiline", [f"^{pattern}$" for pattern in patterns]]

    def scores(probe: str | None) -> list[Any]:
        parts = [(t.name, *([probe] if probe else []), t.metric) for t in tasks if probe is None or probe in t.probes]
        return chart(*("/".join(map(re.escape, ("eval", *names))) for names in parts))

    return {
        "Continual learning": {
            "score of each task": scores(None),
            **{f"score of each task on {probe}": scores(probe) for probe in probes},
            "loss on each task's answers": chart(*(f"eval/{re.escape(task.name)}/nll" for task in tasks)),
            "continual metrics": chart("transfer/[^/]+"),
            "plasticity left in each layer": chart("plasticity/[^/]+"),
        },
        "Training": {
            "loss": chart("train/[^/]+/loss"),
            "learning rate": chart("train/[^/]+/learning_rate"),
        },
    }


def tag(layer: str) -> str:
    """A layer's name as part of a TensorBoard tag."""
    return layer.replace(" ", "_")


def layer_plasticity(attribution: AttributionCallback, model: nn.Module) -> dict[str, float]:
    """Mean remaining plasticity of the weights of each layer, in [0, 1]."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    means = {name: (mean, sizes[name]) for name, mean in attribution.plasticity().items()}
    return {layer: mean for layer, (mean, _) in mean_by_layer(means).items()}


def layer_samples(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Evenly spaced importance values of each layer, float in [0, 1]."""
    groups: dict[str, list[Tensor]] = {}
    for name, levels in importance.items():
        groups.setdefault(layer_of(name), []).append(levels.flatten())
    samples = {}
    for layer, group in groups.items():
        stride = max(1, sum(levels.numel() for levels in group) // _HISTOGRAM_ENTRIES)
        samples[layer] = dequantise(torch.cat([levels[::stride] for levels in group]).cpu())
    return samples
