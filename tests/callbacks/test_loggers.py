"""One run, seen by several loggers at once: none may be taken for TensorBoard's."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import attribution, build, trainer_for
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from agcl.callbacks import ContinualMonitor, ContinualReport
from agcl.callbacks.monitor import custom_charts, score_figure
from agcl.callbacks.run_folder import run_folder
from agcl.data.sequence import TaskSequence
from agcl.data.tasks import Probe, Task


class PlainLogger(Logger):
    """As little as Lightning asks of a logger: no ``experiment``, and one folder for all its runs."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.metrics, self.rows = folder, [], []

    name, version = "project", "abc123"

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params):
        self.rows.append(params)


@pytest.fixture(scope="module")
def logged(llama_folder, task_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    loggers = [PlainLogger(str(folder / "plain")), CSVLogger(folder / "csv"), TensorBoardLogger(folder / "board")]
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    callbacks = [attribution(), ContinualMonitor(), ContinualReport(save_model=False)]
    with pytest.MonkeyPatch.context() as patch:
        from agcl.attribution import relevance

        patch.setattr(relevance, "is_correct", lambda logits, targets: True)
        trainer_for(data, folder, callbacks, logger=loggers, log_every_n_steps=1).fit(model, datamodule=data)
    return loggers


def test_files_are_in_the_runs_own_folder(logged):
    folder = logged[0].folder + "/project/abc123/"
    assert sorted(os.listdir(logged[0].folder)) == ["project"]
    assert {"scores.json", "answers.json", "importance"} <= set(os.listdir(folder))


def test_all_loggers_get_one_row_of_hyperparameters(logged):
    plain, in_csv, _ = logged
    (row,) = plain.rows
    assert row["method"] == "AttributionCallback"
    assert (row["strength"], row["estimator"], row["learning_rate"], row["tasks"]) == (1.0, "LRP", 0.02, "task0, task1")
    assert yaml.safe_load(Path(in_csv.log_dir, "hparams.yaml").read_text()) == row


def test_metrics_and_plasticity_reach_other_loggers(logged):
    plain, in_csv, _ = logged
    tags = {tag for _, metrics in plain.metrics for tag in metrics}
    assert {"eval/task1/exact_match", "transfer/average_performance", "plasticity/layer_00"} <= tags
    with open(os.path.join(in_csv.log_dir, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    last = [row["plasticity/layer_01"] for row in rows if row["plasticity/layer_01"]]
    noted = json.loads(Path(plain.folder, "project/abc123/scores.json").read_text())["plasticity"]
    assert [float(value) for value in last] == pytest.approx([noted[task]["layer 01"] for task in ("task0", "task1")])
    assert 0 < float(last[-1]) < float(last[0]) < 1


def test_a_run_resumed_at_its_very_end_has_the_plasticity_of_all_tasks(llama_folder, task_files, tmp_path, knowing):
    def run(name, checkpoint=None):
        model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
        saving = ModelCheckpoint(tmp_path / name, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        callbacks = [attribution(), ContinualMonitor(), ContinualReport(save_model=False), saving]
        trainer = trainer_for(data, tmp_path / name, callbacks, enable_checkpointing=True)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        return json.loads((tmp_path / name / "scores.json").read_text())["plasticity"]

    straight = run("straight")
    assert straight["task1"]
    assert run("resumed", tmp_path / "straight" / "epoch=1.ckpt") == straight


def test_tensorboard_compares_runs_in_its_own_tables(logged):
    board = EventAccumulator(logged[2].log_dir).Reload()
    start = metadata.parse_session_start_info_plugin_data(
        board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert values.keys() == logged[0].rows[0].keys()
    assert (values["learning_rate"], values["optimizer"]) == (0.02, "AdamW")
    experiment = metadata.parse_experiment_plugin_data(
        board.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    columns = {info.name.tag for info in experiment.metric_infos}
    assert columns == {tag for tag in board.Tags()["scalars"] if tag.startswith("transfer/")}
    assert len(columns) == 5
    final = dict(logged[0].metrics[-1][1]) | {k: v for _, m in logged[0].metrics for k, v in m.items()}
    assert board.Scalars("transfer/backward_transfer")[-1].value == pytest.approx(final["transfer/backward_transfer"])


def test_each_chart_has_what_it_names(logged):
    board = EventAccumulator(logged[2].log_dir).Reload()
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    tags = board.Tags()["scalars"]
    shown = {title: sum(bool(re.match(p, tag)) for p in patterns for tag in tags) for title, patterns in charts.items()}
    assert shown == {
        "score of each task": 2,
        "loss on each task's answers": 2,
        "continual metrics": 5,
        "plasticity left in each layer": 4,  # two layers, the embedding, the last norm
        "loss": 2,
        "learning rate": 2,
    }


def test_pictures_of_later_tasks_are_no_larger(logged):
    board = EventAccumulator(logged[2].log_dir).Reload()
    for tag in ("score_matrix", "importance", "plasticity"):
        first, last = board.Images(tag)
        assert (first.width, first.height) == (last.width, last.height), tag


@pytest.mark.parametrize(("num_tasks", "num_texts"), [(10, 110), (11, 0)])
def test_a_score_matrix_of_many_tasks_has_no_numbers(num_tasks, num_texts):
    figure = score_figure(torch.zeros(num_tasks + 1, num_tasks), [f"t{i}" for i in range(num_tasks)])
    assert len(figure.axes[0].texts) == num_texts


def test_charts_of_probes_and_odd_names():
    tasks = [Task(name="c++", source="x", probes={"heldout": Probe(split="test")}), Task(name="plain", source="x")]
    charts = custom_charts(TaskSequence(tasks))["Continual learning"]
    assert charts["score of each task on heldout"] == ["Multiline", [r"^eval/c\+\+/heldout/exact_match$"]]


def test_logger_without_a_folder(tmp_path):
    logger = PlainLogger(None)
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False}
    assert run_folder(Trainer(logger=logger, **options)) == tmp_path


@pytest.mark.slow
def test_weights_and_biases_offline(llama_folder, task_files, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=tmp_path, project="agcl", offline=True)
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    callbacks = [attribution(), ContinualMonitor(), ContinualReport(save_model=False)]
    try:
        trainer_for(data, tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(model, datamodule=data)
        config, summary = dict(logger.experiment.config), dict(logger.experiment.summary)
    finally:
        wandb.finish()
    results = json.loads((tmp_path / "agcl" / logger.version / "scores.json").read_text())
    assert config["method"] == "AttributionCallback"
    assert summary["transfer/average_performance"] == pytest.approx(results["metrics"]["average_performance"])
