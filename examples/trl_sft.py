"""agcl in TRL's SFTTrainer: ``python examples/trl_sft.py`` (``pip install 'agcl[trl]'``)."""

import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from two_tasks import StopWhenLearned, encoded, loss, print_comparison, texts, tiny_model, tiny_tokenizer, twin_of

from agcl import ImportanceConfig
from agcl.attribution.estimators import LRP
from agcl.integrations.transformers import DirectionsGate, ImportanceGate, TaskDirections, TaskImportance

LORA = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def trainer_for(model, tokenizer, language, folder, adapter=None):
    """It trains until the rows are learned."""
    arguments = SFTConfig(
        output_dir=folder,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        num_train_epochs=300,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(texts(language)),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[StopWhenLearned(encoded(tokenizer, language))],
    )


def run(folder, seed=0):
    """Loss on the old and on the new task after the new one was learned, without and with the gates."""
    tokenizer = tiny_tokenizer()
    old_rows, new_rows = encoded(tokenizer, "welsh"), encoded(tokenizer, "finnish")
    model = tiny_model(tokenizer, seed)
    importance_file, directions_file = Path(folder) / "welsh.safetensors", Path(folder) / "welsh_directions.safetensors"
    estimator = LRP(score="sensitivity")  # suits AdamW
    config = ImportanceConfig(quantile=0.2)  # a strong gate
    trainer = trainer_for(model, tokenizer, "welsh", folder)
    trainer.add_callback(TaskImportance(save_to=importance_file, estimator=estimator, config=config))
    trainer.add_callback(TaskDirections(save_to=directions_file))
    trainer.train()
    results = {}
    for name, adapter in (
        ("without the gate", None),
        ("with the gate", None),
        ("adapter, without the gate", LORA),
        ("adapter, by direction", LORA),
    ):
        trainer = trainer_for(twin_of(model), tokenizer, "finnish", folder, adapter)
        if name == "with the gate":
            trainer.add_callback(ImportanceGate(importance_file))
        elif name == "adapter, by direction":
            trainer.add_callback(DirectionsGate(directions_file, plasticity=0.5))
        trainer.train()
        results[name] = loss(trainer.model, old_rows), loss(trainer.model, new_rows)
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print_comparison(run(temporary))
