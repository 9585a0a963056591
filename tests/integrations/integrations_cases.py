"""What the tests of other trainers share: rows, a model, Hugging Face's Trainer."""

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10, 11, 12], "labels": [-100, -100, 11, 12]},
    {"input_ids": [13, 14, 15, 16], "labels": [-100, 14, 15, 16]},
    {"input_ids": [17, 18, 19, 20], "labels": [-100, -100, -100, 20]},
]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def trainer_for(model, tmp_path, *callbacks, optimizer=None, rows=ROWS, **options):
    arguments = TrainingArguments(
        tmp_path,
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    optimizers = (None if optimizer is None else optimizer(model.parameters()), None)
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks), optimizers=optimizers
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
