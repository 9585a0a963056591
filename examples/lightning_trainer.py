"""agcl's task sequence in Lightning's Trainer, from Python: ``python examples/lightning_trainer.py``."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from two_tasks import LANGUAGES, NUM_ROWS, print_comparison, tiny_model, tiny_tokenizer

from agcl import AttributionCallback, ContinualDataModule, ContinualLM, Directions, Task


def names():
    """Names in one language after the other, scored on the rows that are learned."""
    found = []
    for index, language in enumerate(LANGUAGES):
        rows = f"train[{index * NUM_ROWS}:{(index + 1) * NUM_ROWS}]"
        prompt, source = f"{{english}} in {language.title()}:", f"builtin:cldr/{language}"
        found.append(Task(language, source, prompt, train_split=rows, test_split=rows, epochs=60))
    return found


def run(folder, seed=0):
    """Loss on the old and on the new task after the new one was learned, without a gate and by direction."""
    model_folder = Path(folder) / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model_folder)
    tiny_model(tokenizer, seed).save_pretrained(model_folder)
    tasks, results = names(), {}
    gate = AttributionCallback(num_samples=NUM_ROWS, directions=Directions(plasticity=0.7, own_text=0))
    for name, callbacks in (("without the gate", []), ("by direction", [gate])):
        seed_everything(seed, verbose=False)
        data = ContinualDataModule(tasks, model_folder, batch_size=4)
        model = ContinualLM(model_folder, optimizer=partial(torch.optim.AdamW, lr=5e-3))
        trainer = Trainer(**data.trainer_arguments(), callbacks=callbacks, default_root_dir=folder)
        trainer.fit(model, datamodule=data)
        results[name] = tuple(model.score_matrices["nll"].compute()[-1].tolist())
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print_comparison(run(temporary))
