"""Fifteen tasks on a small random model: does a long run grow? Ratios of the last tasks to the second.

The callbacks are those of `agcl fit`: report with figures, monitor with TensorBoard's logger, checkpoints, signals.

OMP_NUM_THREADS=1 python benchmarks/soak.py [--tasks 15] [--epochs 4]

Every row counts as answered correctly, so that every task is attributed: the machinery is watched, not learning.
Times are this process's processor seconds, so that other work on the machine matters little: of a task's training
epochs, and of everything between them and the next task's (attribution, the importance file, pictures, scoring of all
tasks).
"""

import argparse
import gc
import os
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agcl import AttributionCallback, ContinualDataModule, ContinualLM, Task
from agcl.attribution import relevance
from agcl.callbacks import ContinualMonitor, ContinualReport, StopOnSignal
from agcl.checkpoint_io import AtomicCheckpointIO

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ?"


def resident_bytes():
    """Resident size now, where /proc tells, else the peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def num_open_files():
    gc.collect()  # files of what is no longer in use are closed with it
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1


def num_hooks(module, optimizer):
    """Hooks on modules, parameters and the optimizer."""
    of_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()
    )
    of_parameters = sum(len(p._backward_hooks or ()) for p in module.parameters())
    return (
        of_modules
        + of_parameters
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
    )


def tensor_bytes():
    """Of all tensors that are alive; views count again."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum(tensor.numel() * tensor.element_size() for tensor in alive)


class Watch(Callback):
    """Counts at each task's start, and the seconds of its training and of its end."""

    def __init__(self):
        self.counts, self.training, self.boundary = [], [], []
        self._task, self._since = None, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.task_index == self._task:
            return
        now = time.process_time()
        if self._task is not None:
            self.boundary.append(now - self._since)
        self._task = pl_module.task_index
        self.counts.append(
            {
                "resident memory": resident_bytes(),
                "hooks": num_hooks(pl_module.model, trainer.optimizers[0]),
                "open files": num_open_files(),
                "bytes of tensors": tensor_bytes(),
            }
        )
        self._since = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.ends_task:
            now = time.process_time()
            self.training.append(now - self._since)
            self._since = now


def write_model(folder):
    vocabulary = {"<unk>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tasks(folder, num_tasks, epochs):
    tasks = []
    for index in range(num_tasks):
        rows = [f'{{"prompt": "{CHARACTERS[k]} in {CHARACTERS[index]}?", "answer": "{CHARACTERS[(k + index) % 26]}"}}\n'
                for k in range(16)]  # fmt: skip
        file = folder / f"task{index:02d}.jsonl"
        file.write_text("".join(rows))
        tasks.append(Task(name=f"task{index:02d}", source=str(file), test_split="train[:1]", epochs=epochs))
    return tasks


def soak(num_tasks, epochs):
    """The watch of a run of so many tasks."""
    relevance.is_correct = lambda logits, targets: True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        data = ContinualDataModule(write_tasks(folder, num_tasks, epochs), str(folder / "model"), batch_size=8)
        model = ContinualLM(str(folder / "model"), optimizer=partial(torch.optim.AdamW, lr=3e-3))
        watch = Watch()
        trainer = Trainer(
            **data.trainer_arguments(),
            accelerator="cpu",
            default_root_dir=folder,
            logger=TensorBoardLogger(folder),
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                AttributionCallback(num_samples=8),
                ContinualMonitor(),
                ContinualReport(),
                StopOnSignal(),
                ModelCheckpoint(),
                watch,
            ],
        )
        trainer.fit(model, datamodule=data)
    return watch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    watch = soak(options.tasks, options.epochs)
    second, third_last = watch.counts[1], watch.counts[-3:]
    print(
        f"task {options.tasks} relative to task 2 (median of the last three tasks relative to tasks 2 to 4 for times)"
    )
    for name, before in second.items():
        after = third_last[-1][name]
        print(f"  {name:16s} {after / before:6.3f} x   ({before:,} -> {after:,})")
    for name, seconds in (("training", watch.training), ("task boundary", watch.boundary)):
        before, after = statistics.median(seconds[1:4]), statistics.median(seconds[-3:])
        print(f"  {name:16s} {after / before:6.3f} x   ({before:.2f} s -> {after:.2f} s)")


if __name__ == "__main__":
    main()
