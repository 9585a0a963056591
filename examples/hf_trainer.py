"""agcl in Hugging Face's Trainer: ``python examples/hf_trainer.py``."""

import tempfile
from pathlib import Path

from transformers import Trainer, TrainingArguments
from two_tasks import StopWhenLearned, collate, encoded, loss, print_comparison, tiny_model, tiny_tokenizer, twin_of

from agcl import ImportanceConfig
from agcl.attribution.estimators import LRP
from agcl.integrations.transformers import DirectionsGate, ImportanceGate, TaskDirections, TaskImportance


def trainer_for(model, rows, folder):
    """It trains until the rows are learned."""
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        num_train_epochs=300,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stop = StopWhenLearned(rows)
    return Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[stop])


def run(folder, seed=0):
    """Loss on the old and on the new task after the new one was learned, without a gate, by entry, by direction."""
    tokenizer = tiny_tokenizer()
    old_rows, new_rows = encoded(tokenizer, "welsh"), encoded(tokenizer, "finnish")
    model = tiny_model(tokenizer, seed)
    importance_file, directions_file = Path(folder) / "welsh.safetensors", Path(folder) / "welsh_directions.safetensors"
    estimator = LRP(score="sensitivity")  # suits AdamW
    config = ImportanceConfig(quantile=0.2)  # a strong gate
    trainer = trainer_for(model, old_rows, folder)
    trainer.add_callback(TaskImportance(save_to=importance_file, estimator=estimator, config=config))
    trainer.add_callback(TaskDirections(save_to=directions_file))
    trainer.train()
    results = {}
    for name in ("without the gate", "with the gate", "by direction"):
        twin = twin_of(model)
        trainer = trainer_for(twin, new_rows, folder)
        if name == "with the gate":
            trainer.add_callback(ImportanceGate(importance_file))
        elif name == "by direction":
            trainer.add_callback(DirectionsGate(directions_file, importance_file, plasticity=0.5))
        trainer.train()
        results[name] = loss(twin, old_rows), loss(twin, new_rows)
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print_comparison(run(temporary))
