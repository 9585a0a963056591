"""Serving a sequence of tasks to one ``Trainer.fit``."""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from agcl.architectures import context_tokens
from agcl.data.chat import ChatTurns
from agcl.data.replay import Replay, draw
from agcl.data.sequence import Regime, TaskSequence, in_order
from agcl.data.sources import in_folder
from agcl.data.tasks import IGNORED_LABEL, AnswerEncoder, ScoredSplit, Task, Truncation, collate
from agcl.errors import AgclError, check_choice, raise_any
from agcl.models import load_config, load_tokenizer


class ResumableDataLoader(DataLoader):
    """A data loader whose position within an epoch is saved in Lightning's checkpoints and found again on resuming."""

    _served = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._served, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self._served, None):
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches served of the present epoch; 0 after its end."""
        return {"served": self._served % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin where the saved one stopped."""
        self._skip = state["served"]


class ContinualDataModule(LightningDataModule):
    """A sequence of tasks for one ``Trainer.fit``: each task is a contiguous range of epochs.

    With ``regime: joint`` all tasks are learned together instead, the upper bound that methods are compared with. Rows
    of all tasks are mixed in every epoch, a task with ``epochs: e`` takes part in the first ``e`` epochs, and one
    optimizer and one learning-rate schedule run through. Scores are taken before training and at its end alone.

    The Trainer must run with :meth:`trainer_arguments`; the command line sets them by itself. Training rows come in an
    order that depends on ``seed`` and the epoch alone, so that a resumed run sees the same batches. Loaders have random
    generators of their own: from torch's global one they would draw at other moments in a resumed run.

    Args:
        tasks: The tasks, in the order of learning unless ``order`` gives another.
        model_name_or_path: Where the tokenizer and the context length come from (linked to the model's by the CLI).
        gguf_file: GGUF file in that folder or repository, if any.
        batch_size: Rows in a training batch, per device.
        eval_batch_size: Rows in a scoring batch, per device.
        max_length: Longest row in tokens; the model's context if left out.
        truncation: ``error`` refuses a longer row before training; ``left`` cuts the beginning of its prompt.
        num_workers: Worker processes of each data loader.
        seed: Order of the training rows, choice of kept and replayed rows.
        regime: ``sequential``: one task after another; ``joint``: all together.
        order: Names of all tasks in the order of learning.
        replay: Rows of old tasks that are trained on again beside each new task's; none if left out.
        evaluate_on: ``validation`` scores each task on its ``validation_split`` in place of its ``test_split``, to
            choose hyper-parameters by. Probes that name a split of their own keep it.
        data_dir: Folder that the tasks' relative files are taken from; the working directory if left out.
        trust_remote_code: Run tokenizer code that comes with the checkpoint.
        chat_template: Make each prompt the user's turn and each answer the assistant's, by the chat template of the
            model's tokenizer. White space around an answer is left out.
        system_prompt: The turn before the user's, in chats that do not begin with one of their own; without it, the
            template's, if it has any.

    Raises:
        AgclError: If the options do not go together; on set-up, if a task's data or the Trainer's settings cannot work.
            Nothing is trained before.
    """

    def __init__(
        self,
        tasks: list[Task],
        model_name_or_path: str = "builtin:smollm2-135m-instruct",
        gguf_file: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int | None = None,
        truncation: Truncation = "error",
        num_workers: int = 0,
        seed: int = 0,
        regime: Regime = "sequential",
        order: list[str] | None = None,
        replay: Replay | None = None,
        evaluate_on: ScoredSplit = "test",
        data_dir: str | None = None,
        trust_remote_code: bool = False,
        chat_template: bool = False,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("truncation", truncation, Truncation)
        check_choice("evaluate_on", evaluate_on, ScoredSplit)
        for task in tasks:
            if not isinstance(task, Task):
                raise AgclError(f"`tasks` holds a {type(task).__name__}; make each an agcl.Task(name=..., source=...).")
        if data_dir is not None:
            tasks = [in_folder(task, data_dir) for task in tasks]
        self.tasks = TaskSequence(tasks if order is None else in_order(tasks, order), regime)
        self.model_name_or_path = str(model_name_or_path)
        self.gguf_file = gguf_file
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.num_workers = num_workers
        self.seed = seed
        self.replay = replay
        self.evaluate_on: ScoredSplit = evaluate_on
        self.trust_remote_code = trust_remote_code
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self._train_rows: list[Dataset] = []
        self._evaluations: list[tuple[int, str | None, Dataset]] = []
        raise_any(self._problems())

    def _problems(self) -> Iterator[str]:
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("max_length", 2), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"`{name}` is {value}; give at least {least}."
        if self.chat_template and self.truncation == "left":
            yield "`truncation: left` would cut the beginning of the chat; leave it or `chat_template` out."
        if self.system_prompt is not None and not self.chat_template:
            yield "`system_prompt` is a turn of a chat: set `chat_template: true`, or leave it out."
        for task in self.tasks:
            if task.messages is not None and not self.chat_template:
                yield (
                    f"Task `{task.name}`: its `messages` are chats, so set `chat_template: true` for the whole `data`, "
                    "or make them prompts and answers."
                )
            if self.chat_template and task.metric == "sari":
                yield f"Task `{task.name}`: `sari` compares with the prompt alone, so it cannot have `chat_template`."
            try:
                next(task.evaluations(self.evaluate_on))
            except AgclError as error:  # there is no such split
                yield from error.problems
        if self.replay is None:
            return
        if self.tasks.regime == "joint":
            yield "`replay` has no meaning with `regime: joint`, which trains on all rows anyway: leave it out."
        num_old = len(self.tasks) - 1
        if self.replay.buffer_size is not None and self.replay.buffer_size < num_old:
            yield (
                f"`replay.buffer_size` is {self.replay.buffer_size}, but {num_old} old tasks come to share it: give at "
                f"least {num_old}, so that each keeps a row."
            )

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the Trainer needs to run all tasks: ``Trainer(**data.trainer_arguments(), ...)``."""
        return {
            "max_epochs": self.tasks.total_epochs,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": -1,
        }

    def setup(self, stage: str | None = None) -> None:
        """Load, check and encode all tasks; check that the Trainer runs all of them."""
        if self.trainer is not None and stage == "fit":
            self.check_trainer(self.trainer)
        if self._train_rows:
            return
        self.load_encoder()
        train_rows, evaluations = [], []
        for index, task in enumerate(self.tasks):
            train_rows.append(self.encoder.encode_rows(task, task.train_split, task.prompt))
            for name, probe in task.evaluations(self.evaluate_on):
                rows = self.encoder.encode_rows(task, str(probe.split), str(probe.prompt))  # both are filled in
                evaluations.append((index, name, rows))
        self._train_rows, self._evaluations = train_rows, evaluations

    def load_encoder(self) -> None:
        """Load the tokenizer, and make of it what turns rows into tokens; no row is looked at.

        Raises:
            AgclError: If there is no such model, ``max_length`` exceeds its context, or its tokenizer's chat template
                is asked for and missing or of no use.
        """
        self.tokenizer = load_tokenizer(
            self.model_name_or_path, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
        )
        config = self._text_config()
        context = context_tokens(config)
        if self.max_length is not None and context is not None and self.max_length > context:
            raise AgclError(f"`max_length` is {self.max_length}, but the model's context has {context} tokens.")
        limit = self.max_length or context or int(self.tokenizer.model_max_length)
        chat = ChatTurns(self.tokenizer, self.system_prompt) if self.chat_template else None
        size = getattr(config, "vocab_size", None)
        self.encoder = AnswerEncoder(self.tokenizer, limit, self.truncation, size, chat)

    def _text_config(self) -> Any:
        return load_config(
            self.model_name_or_path, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
        ).get_text_config()

    def check_trainer(self, trainer: Any) -> None:
        """Raise if a Trainer would not run all tasks, or not score them on all rows."""
        if not trainer.fast_dev_run:
            raise_any(self._trainer_problems(trainer))

    def _trainer_problems(self, trainer: Any) -> Iterator[str]:
        if trainer.val_check_interval != 1.0 or trainer.limit_val_batches == 0:
            yield (
                "Tasks are scored at their end, on all rows: leave the Trainer's `val_check_interval` at 1.0 and give "
                "`limit_val_batches` a value above 0."
            )
        if trainer.check_val_every_n_epoch != 1 and not trainer.global_step:  # later the model sets it
            yield "Tasks are scored at their end: leave the Trainer's `check_val_every_n_epoch` out."
        for name, wanted in self.trainer_arguments().items():
            value = getattr(trainer, name)
            if wanted == -1:  # the Trainer keeps "all" as infinity
                wanted = float("inf")
            if value != wanted:
                yield (
                    f"The Trainer's `{name}` is {value}, but learning these tasks needs {wanted}: "
                    "build it as `Trainer(**data.trainer_arguments(), ...)`, or leave it out on the command line."
                )

    @property
    def evaluations(self) -> Sequence[tuple[int, str | None]]:
        """What each validation data loader holds: task index, and the probe's name (``None``: the task's own rows)."""
        return [(index, name) for index, name, _ in self._evaluations]

    @property
    def end_token_id(self) -> int:
        """The token that closes every answer."""
        return self.encoder.end_token_id

    def max_answer_tokens(self, evaluation: int) -> int:
        """Length of the longest answer of an evaluation set, end-of-sequence token included."""
        rows = self._evaluations[evaluation][2]
        return max(sum(label != IGNORED_LABEL for label in row) for row in rows["labels"])

    def label_candidates(self, task_index: int) -> list[list[int]]:
        """Token ids of a task's labels as answers; empty where it declares none."""
        task: Task = self.tasks[task_index]
        return [self.encoder.encode_answer(task.label_answer(label)) for label in task.labels or ()]

    def training_rows(self, task_index: int) -> Dataset:
        """Encoded training rows of a task (columns as :meth:`AnswerEncoder.encode_rows` gives them)."""
        return self._train_rows[task_index]

    def scored_rows(self, task_index: int) -> Dataset:
        """Encoded rows that a task itself, not one of its probes, is scored on.

        Args:
            task_index: 0-based.
        """
        return next(rows for index, probe, rows in self._evaluations if (index, probe) == (task_index, None))

    def kept_rows(self, task_index: int, count: int) -> Dataset:
        """A few training rows of a task, for methods that keep some of the old tasks'.

        Args:
            task_index: 0-based.
            count: At most so many rows; the first ``n`` are the same for every ``count >= n``.

        Returns:
            Encoded rows, drawn without replacement by ``seed`` and task, in the order drawn.
        """
        rows = self._train_rows[task_index]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + task_index)
        return rows.select(torch.randperm(len(rows), generator=generator)[:count].tolist())

    def single_task(self, task_index: int) -> "ContinualDataModule":
        """A data module of one task's training rows alone, set up already; nothing is scored.

        Args:
            task_index: 0-based.
        """
        single = copy(self)
        single.trainer, single.replay = None, None
        single.tasks = TaskSequence([self.tasks[task_index]])
        single._train_rows, single._evaluations = [self._train_rows[task_index]], []
        return single

    def rows_at(self, epoch: int) -> Dataset:
        """Rows that a training epoch serves: those of its task (under ``joint``, tasks), then those it replays."""
        return concatenate_datasets(self._parts_at(epoch))

    def _parts_at(self, epoch: int) -> list[Dataset]:
        """The rows of :meth:`rows_at`, by task; none is empty."""
        indices = self.tasks.indices_at(epoch)
        parts = [self._train_rows[index] for index in indices]
        if self.replay is not None and indices[0] > 0:
            kept = self._replay_buffer(indices[0])
            # Another stream of chance than the one that the order of the rows is drawn from.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_000 + epoch)
            drawn = draw([len(rows) for rows in kept], self.replay.num_replayed(len(parts[0])), generator)
            parts += [rows.select(places.tolist()) for rows, places in zip(kept, drawn, strict=True) if len(places)]
        return parts

    def _replay_buffer(self, task_index: int) -> list[Dataset]:
        """The rows kept of each old task while task ``task_index`` is learned."""
        if self.replay is None or task_index == 0:
            return []
        num_kept = self.replay.num_kept([len(rows) for rows in self._train_rows[:task_index]])
        return [self.kept_rows(old, count) for old, count in enumerate(num_kept)]

    def extra_bytes(self) -> int:
        """Size of the rows kept of old tasks at present, in bytes as Arrow stores them."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return sum(rows.with_format("arrow")[:].nbytes for rows in self._replay_buffer(self.tasks.index_at(epoch)))

    def results(self) -> dict[str, Any]:
        """What the scores of a run are of, for ``scores.json``."""
        return {"evaluate_on": self.evaluate_on, "replay": None if self.replay is None else asdict(self.replay)}

    def num_batches(self, epoch: int) -> int:
        """Training batches of any epoch on each device, ``limit_train_batches`` of the Trainer included."""
        trainer = self.trainer
        world_size, limit = (1, 1.0) if trainer is None else (trainer.world_size, trainer.limit_train_batches)
        num_rows = sum(map(len, self._parts_at(epoch)))
        batches = math.ceil(math.ceil(num_rows / world_size) / self.batch_size)
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def train_dataloader(self) -> DataLoader:
        """Batches of the present epoch's rows: one task's with rows of like length together, several tasks' mixed."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        parts = self._parts_at(epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        sampler: Sampler
        if len(parts) == 1:
            (rows,) = parts
            lengths = [len(ids) for ids in rows["input_ids"]]
            sampler = LengthGroupedSampler(self.batch_size, lengths=lengths, generator=generator)
        else:
            rows = concatenate_datasets(parts)
            # Tasks differ in length: grouped by it, a batch would hold rows of one task alone.
            sampler = SubsetRandomSampler(range(len(rows)), generator)
        return ResumableDataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=partial(collate, pad_token_id=self.tokenizer.pad_token_id),
            num_workers=self.num_workers,
            generator=generator,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each task's own rows to be scored and each of its probes, in the order of :attr:`evaluations`.

        Over several processes each row is scored once: the usual sampler would repeat some to make the shares equal.
        Where processes need each other for every forward pass (weights that are split over them), or there are fewer
        rows than processes, rows are repeated to make the shares equal, and do not count.
        """
        world_size = 1 if self.trainer is None else self.trainer.world_size
        is_sharded = self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        return [
            DataLoader(
                rows,
                batch_size=self.eval_batch_size,
                sampler=UnrepeatedDistributedSampler(rows, shuffle=False) if world_size > 1 else None,
                collate_fn=partial(collate, pad_token_id=self.tokenizer.pad_token_id),
                num_workers=self.num_workers,
                generator=torch.Generator(),
            )
            for rows in (
                filled_up(rows, world_size) if is_sharded or len(rows) < world_size else rows
                for _, _, rows in self._evaluations
            )
        ]


def filled_up(rows: Dataset, multiple: int) -> Dataset:
    """Rows and, to make their number a multiple, the first ones again, with False in a column ``counts``."""
    places = [*range(len(rows)), *(place % len(rows) for place in range(-len(rows) % multiple))]
    counts = [True] * len(rows) + [False] * (len(places) - len(rows))
    return rows.select(places).add_column("counts", counts)
