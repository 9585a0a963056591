from functools import partial

import torch
from helpers import build, trainer_for, weights
from lightning.pytorch import Callback

from agcl.data.tasks import collate
from agcl.methods import SingleTask


class AtEnds(Callback):
    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.tasks.ends_at(trainer.current_epoch):
            self.weights.append(weights(pl_module.model))


def in_order(data):
    """Rows in their order in each epoch: otherwise it depends on the epoch's number, which the sequence shifts."""

    def loader():
        index = data.tasks.index_at(data.trainer.current_epoch)
        padded = partial(collate, pad_token_id=data.tokenizer.pad_token_id)
        return torch.utils.data.DataLoader(data.training_rows(index), batch_size=2, collate_fn=padded)

    data.train_dataloader = loader
    return data


def test_each_task_is_learned_as_in_a_run_of_its_own(llama_folder, task_files, tmp_path):
    sequence, callback = AtEnds(), SingleTask()
    model, data = build(llama_folder, task_files)
    trainer_for(data, tmp_path, [callback, sequence]).fit(model, datamodule=in_order(data))
    for index, file in enumerate(task_files):
        alone = AtEnds()
        model, data = build(llama_folder, [file])
        trainer_for(data, tmp_path, [alone]).fit(model, datamodule=in_order(data))
        for name, parameter in alone.weights[0].items():
            assert torch.equal(parameter, sequence.weights[index][name]), (index, name)
    assert callback.extra_bytes() == 4 * sum(parameter.numel() for parameter in model.parameters())
