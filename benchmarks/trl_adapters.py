"""Two tasks in TRL's SFTTrainer on a real model, a LoRA adapter each: is the first still known after the second?

    OMP_NUM_THREADS=1 python benchmarks/trl_adapters.py

SmolLM2-135M-Instruct learns 32 Welsh names, the model's own text held, and, the adapter merged, 32 Finnish ones: by
direction, and without a gate at the rate that plain LoRA is tuned to in the quick start's comparison.
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import agcl
from agcl.integrations.transformers import DirectionsGate, TaskDirections
from agcl.models import load_model, load_tokenizer

MODEL = "builtin:smollm2-135m-instruct"
LORA = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
GATED, PLAIN = 2e-3, 1e-3  # learning rates


def rows_of(language, first):
    lines = (files("agcl") / "data" / "builtin" / "cldr" / f"{language}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[first : first + 32]]
    return [{"prompt": f"{row['english']} in {language.title()}:", "completion": f" {row['answer']}"} for row in rows]


def trainer_for(model, tokenizer, rows, folder, learning_rate, callbacks, seed):
    set_seed(seed)
    arguments = SFTConfig(
        output_dir=folder,
        learning_rate=learning_rate,
        warmup_steps=12,
        per_device_train_batch_size=8,
        num_train_epochs=12,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        seed=seed,
    )
    data = Dataset.from_list(rows)
    return SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=LORA, callbacks=callbacks
    )


@torch.no_grad()
def share_known(model, tokenizer, rows):
    model.eval()
    known = 0
    for row in rows:
        prompt = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        known += answer.strip() == row["completion"].strip()
    return known / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    tokenizer = load_tokenizer(MODEL)
    welsh, finnish = rows_of("welsh", 0), rows_of("finnish", 32)
    model = load_model(MODEL, dtype=torch.float32)
    own_text = agcl.own_text_moments(model, tokenizer)
    recorder = TaskDirections(num_samples=32, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        first = trainer_for(model, tokenizer, welsh, folder, GATED, [DirectionsGate(own_text, every=4), recorder], seed)
        first.train()
        first.model.merge_and_unload().save_pretrained(Path(folder) / "merged")
        for name, learning_rate, callbacks in (
            ("by direction", GATED, [DirectionsGate([own_text, recorder.moments], every=4)]),
            ("without a gate", PLAIN, []),
        ):
            model = load_model(str(Path(folder) / "merged"), dtype=torch.float32)
            trainer = trainer_for(model, tokenizer, finnish, folder, learning_rate, callbacks, seed)
            trainer.train()
            known = [share_known(trainer.model, tokenizer, rows) for rows in (welsh, finnish)]
            print(f"{name}: Welsh {known[0]:.3f}, Finnish {known[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
