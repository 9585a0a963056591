import json

import pytest
from helpers import build, trainer_for
from lightning.pytorch import Callback

from agcl.callbacks import ContinualReport


class Keeper(Callback):
    """Keeps more with each task, and lets go of it at the end of training."""

    num_bytes = 0

    def extra_bytes(self):
        return self.num_bytes

    def on_train_epoch_end(self, trainer, pl_module):
        self.num_bytes += 1000

    def on_train_end(self, trainer, pl_module):
        self.num_bytes = 0


class FreezeEmbedding(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.model.get_input_embeddings().weight.requires_grad_(False)


@pytest.mark.parametrize("keepers", [0, 2])
def test_results_say_what_the_run_cost(llama_folder, task_files, tmp_path, keepers):
    model, data = build(llama_folder, task_files[:2], task_options={"epochs": 1})
    callbacks = [FreezeEmbedding(), *(Keeper() for _ in range(keepers)), ContinualReport(save_model=False)]
    trainer_for(data, tmp_path, callbacks).fit(model, datamodule=data)
    results = json.loads((tmp_path / "scores.json").read_text())
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    assert results["extra_bytes_per_weight"] == keepers * 2000 / weights
    assert results["trainable_weights"] == weights - model.model.get_input_embeddings().weight.numel()
    assert results["seed"] == 0
    assert 0 < results["processor_seconds"] < 3600
    assert 2**24 < results["peak_memory_bytes"] < 2**36
