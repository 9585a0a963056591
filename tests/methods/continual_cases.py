"""What the methods' tests share: a batch, and what of a finished run is loaded again."""

import torch
from helpers import build, trainer_for
from peft import PeftModel
from transformers import AutoModelForCausalLM

from agcl.data.tasks import collate


def batch_of(data, task_index=0):
    data.setup()
    return collate(list(data.training_rows(task_index)), pad_token_id=data.tokenizer.pad_token_id)


def assert_saved(model, data, folder, base_folder):
    """Plain PEFT loads the adapter in the folder, which computes what the model does, and not what its base did."""
    batch = batch_of(data)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    before = base(**inputs).logits
    loaded = PeftModel.from_pretrained(base, folder).eval()
    ours = model.model.eval()(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)


def assert_validates(folder, files, run_dir, method, **options):
    """A checkpoint of a finished run, loaded into a new ContinualLM, scores what the run did."""
    model, data = build(folder, files, **options)
    trainer = trainer_for(data, run_dir, [method()])
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(run_dir / "end.ckpt")
    wanted = trainer.callback_metrics["eval/task0/nll"]
    model, data = build(folder, files, **options)
    trainer = trainer_for(data, run_dir, [method()])
    trainer.validate(model, datamodule=data, ckpt_path=run_dir / "end.ckpt", weights_only=True, verbose=False)
    assert trainer.callback_metrics["eval/task0/nll"] == wanted
