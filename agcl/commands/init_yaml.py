"""The commented configuration that ``agcl init`` writes."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from agcl.version import __version__

if TYPE_CHECKING:
    from agcl.data.draft import Draft

_HEAD = """\
# Written by `agcl init {folder}` (agcl {version}), guessed from the files' names and contents. Read the tasks below and
# change what is wrong; `agcl check` shows the rows as the model will see them, and every problem, without training.
#
#   agcl check --config {file}
#   agcl fit --config {file}
#
# A checkpoint is written at the end of each task; `agcl fit --config {file} --resume auto` goes on from it.
# Relative paths are taken from the folder that you run this in.
seed_everything: 0
trainer:
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args:
      save_dir: runs  # results go to version_0, version_1, ... of the run's name there
      name: {name}
      default_hp_metric: false
  callbacks:
    # Protects the weights that earlier tasks need while a new one is learned. Without this entry: plain fine-tuning.
    - class_path: agcl.AttributionCallback
      init_args:
        estimator: {{class_path: agcl.attribution.estimators.LRP, init_args: {{score: sensitivity}}}}
        num_samples: 128  # rows of each task that are looked at; what only others rest on is not protected
        importance:
          quantile: 0.1  # of embeddings, norms, biases: lower protects more
        # Of weight matrices: less plasticity protects more; own_text, which the model writes first, keeps what it could
        # do before; null: less memory, but less protection, too.
        directions: {{plasticity: 0.8, sharpness: 4.0, every: 4, own_text: 16}}
model:
  model_name_or_path: {model}  # a hub name, a local folder, or builtin:NAME
  # Train a small adapter in place of all weights, a pair of its own for each task; it wants ten times the rate below.
  # adapter: {{peft_type: LORA, r: 16, lora_alpha: 32, target_modules: all-linear}}
  optimizer:
    class_path: torch.optim.AdamW
    init_args:
      lr: 2.0e-4  # for a small model under the gate above; larger models, and none of the gate, want less
data:
  data_dir: {folder_scalar}
  batch_size: 8
  # max_length: 512  # longest row in tokens; the model's context if left out
{chat_template}
  tasks:  # in the order of learning
"""
_CHATS = """\
  chat_template: true  # for a model that was trained to chat: prompt and answer become the turns of its template"""
_NO_CHATS = f"""\
  # truncation: left  # cut the beginning of longer prompts, which are refused otherwise
  # {_CHATS.strip()}"""


def configuration_text(drafts: Sequence["Draft"], folder: str, file: str, name: str, model_name_or_path: str) -> str:
    """The whole file.

    Args:
        drafts: The tasks.
        folder: Where their files are, as the user gave it.
        file: What the configuration will be called.
        name: The run's name.
        model_name_or_path: The model.
    """
    has_chats = any(draft.task.messages is not None for draft in drafts)
    head = _HEAD.format(
        folder=_one_line(folder),
        folder_scalar=_scalar(folder),
        file=_one_line(file),
        name=_scalar(name),
        model=_scalar(model_name_or_path),
        version=__version__,
        chat_template=_CHATS if has_chats else _NO_CHATS,
    )
    return head + "".join(_task_text(draft) for draft in drafts)


def _task_text(draft: "Draft") -> str:
    task = draft.task
    lines = [f"# {_one_line(column.name)}: {column.role} ({column.reason})" for column in draft.columns]
    lines += [f"# {_one_line(note)}" for note in draft.notes]
    if isinstance(task.source, str):
        lines.append(f"source: {_scalar(task.source)}")
    else:
        lines += ["source:", *(f"  {split}: {_scalar(file)}" for split, file in task.source.items())]
    if task.messages is not None:
        lines.append(f"messages: {_scalar(task.messages)}  # the last turn is the answer, those before it the prompt")
    else:
        lines += [
            f"prompt: {_quoted(task.prompt)}  # {{column}} stands for the row's value",
            f"answer: {_quoted(task.answer)}  # follows the prompt as it stands, so it begins with a space",
        ]
    lines += [
        *(["drop_empty: true"] if task.drop_empty else []),
        f"train_split: {_scalar(task.train_split)}",
        f"test_split: {_scalar(task.test_split)}  # for facts to be known by heart, the same as train_split",
    ]
    if task.validation_split is not None:
        lines.append(f"validation_split: {task.validation_split}  # scored instead with data.evaluate_on: validation")
    lines.append(f"metric: {task.metric}  # {_METRIC_NOTES[task.metric]}")
    if task.labels is not None:
        lines.append(f"labels: [{', '.join(_quoted(label) for label in task.labels)}]")
    lines.append(f"epochs: {task.epochs}  # passes over {draft.num_rows[task.train_split]} rows")
    return "".join(
        f"    {'- ' if i == 0 else '  '}{line}\n" for i, line in enumerate([f"name: {_scalar(task.name)}", *lines])
    )


_METRIC_NOTES = {
    "label_accuracy": "share of answers that are the right one of labels; or label_ranking",
    "exact_match": "share of answers that equal the row's; or rouge_l, edit_similarity, first_character, sari",
    "rouge_l": "F measure of the words in common, for long answers; or exact_match, edit_similarity, sari",
}


def _scalar(text: str) -> str:
    """Plain where every YAML reader takes it for that text."""
    is_plain = re.fullmatch(r"[A-Za-z][\w./+-]{2,}(:[\w.-]+)?", text) and yaml.safe_load(text) == text
    return text if is_plain else _quoted(text)


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _one_line(text: str) -> str:
    """For a comment."""
    return " ".join(text.split())
