"""Answers of a causal language model: likelihood, greedy generation, ranking of labels, and the score of a task."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from agcl.answers import Answer
from agcl.architectures import context_tokens
from agcl.data.tasks import IGNORED_LABEL, Task, collate
from agcl.metrics.text import edit_similarity, first_character, rouge_l, sari
from agcl.ranks import Ranks
from agcl.shards import has_shards

# Scores of a generated answer beside the right one; `sari` compares with the prompt too.
ANSWER_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda answer, right: float(answer == right),
    "first_character": first_character,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
}


def answer_logits(
    model: PreTrainedModel, batch: Mapping[str, Any], run: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits that predict the answer tokens of left-padded rows.

    The vocabulary projection, most of a small model's memory, is computed only on the trailing positions that hold some
    row's answer.

    Args:
        model: A causal language model, or a PEFT model around one.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (int64, shape ``(batch, length)``), padded on the left.
        run: What is called in the model's place: its compiled forward pass.

    Returns:
        Logits of shape ``(batch, answer_length, vocabulary)`` and targets of shape ``(batch, answer_length)``, -100
        where a row's answer is shorter.
    """
    labels = batch["labels"]
    has_answer = (labels != IGNORED_LABEL).any(dim=0)
    answer_length = int(labels.shape[1] - has_answer.nonzero()[0, 0])
    accepted = inspect.signature(_base_model(model).forward).parameters
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "position_ids" in accepted:
        # Rotary embeddings would not mind the padding's offset, learned position embeddings do.
        inputs["position_ids"] = (batch["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = answer_length + 1
    logits = (run or model)(**inputs).logits[:, -answer_length - 1 : -1]
    return logits, labels[:, -answer_length:]


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats and float32, shape of targets; 0 where that is -100."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view_as(targets)


class LeavesAnswer(StoppingCriteria):
    """Stops each row as soon as its text can no longer become the wanted answer.

    Args:
        tokenizer: To decode with.
        wanted: The rows' answers.
        prompt_length: Number of tokens before the generated ones, the same for all rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.wanted = [_without_spaces(answer) for answer in wanted]
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor, **kwargs: Any) -> Any:
        """Whether each row is done, shape ``(batch,)``, bool."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        # A character of several bytes decodes to the replacement character while it is not complete.
        begun = [_without_spaces(text).rstrip("\ufffd") for text in texts]
        done = [not answer.startswith(text) for answer, text in zip(self.wanted, begun, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def _without_spaces(text: str) -> str:
    """Some tokenizers take a space back when the next token comes (``do n't``)."""
    return "".join(text.split())


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    wanted: Sequence[str] | None = None,
    end_token_id: int | None = None,
) -> list[str]:
    """Greedy answers to prompts, special tokens and surrounding white space removed.

    Args:
        model: The language model.
        tokenizer: To decode with.
        prompts: Token ids.
        max_new_tokens: Length limit of an answer.
        wanted: The right answers: a row that has left its own is not finished, which saves most of the time where much
            is wrong. What is generated for it is its beginning, and certainly not the wanted answer.
        end_token_id: A token that ends an answer beside the tokenizer's end of sequence.

    Returns:
        One text for each prompt.
    """
    context, is_sharded = _context(model), has_shards(model)
    if not _any_process(max(map(len, prompts)) + max_new_tokens > context, model, is_sharded):
        return _generate(model, tokenizer, prompts, max_new_tokens, wanted, end_token_id)
    # Beside a long prompt a short one could not be given the room for its own answer.
    answers = [None] * len(prompts) if wanted is None else [[answer] for answer in wanted]
    return [
        _generate(model, tokenizer, [prompt], int(min(max_new_tokens, context - len(prompt))), answer, end_token_id)[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    wanted: Sequence[str] | None,
    end_token_id: int | None,
) -> list[str]:
    """As `generate_answers`, of prompts that leave room for so many tokens."""
    rows = [{"input_ids": ids, "labels": ids, "label": -1, "answer": ""} for ids in prompts]
    batch = collate(rows, int(tokenizer.pad_token_id))
    input_ids = batch["input_ids"].to(model.device)
    criteria = StoppingCriteriaList()
    if wanted is not None:
        criteria.append(LeavesAnswer(tokenizer, wanted, input_ids.shape[1]))
    output = model.generate(
        input_ids=input_ids,
        attention_mask=batch["attention_mask"].to(model.device),
        generation_config=plain_generation(tokenizer, end_token_id, max_new_tokens=max_new_tokens, do_sample=False),
        stopping_criteria=criteria,
        synced_gpus=has_shards(model),  # processes need each other for every token
    )
    texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def plain_generation(
    tokenizer: PreTrainedTokenizerBase, end_token_id: int | None = None, **settings: Any
) -> GenerationConfig:
    """Settings for ``generate``; what was left out of them would come from the model's own."""
    ends = dict.fromkeys((tokenizer.eos_token_id, end_token_id))
    return GenerationConfig(
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=[token for token in ends if token is not None],
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def _any_process(flag: bool, model: Any, is_sharded: bool) -> bool:
    """Whether the flag is set here or, where the processes must do the same, in any of them."""
    return any(map(any, Ranks.of_this_run().flags([flag], model.device))) if is_sharded else flag


def rank_labels(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]], pad_token_id: int
) -> Tensor:
    """Index of the most likely candidate answer for each prompt: log-likelihood summed over the candidate's tokens.

    A prompt loses its beginning where the model's context does not hold it beside the longest candidate.

    Args:
        model: The language model.
        prompts: Token ids of the prompts.
        candidates: Token ids of the possible answers, end-of-sequence token included.
        pad_token_id: For padding.

    Returns:
        int64 tensor of shape ``(len(prompts),)`` on the model's device.
    """
    room = _context(model) - max(map(len, candidates))
    prompts = [prompt if len(prompt) <= room else prompt[-int(room) :] for prompt in prompts]
    log_likelihoods = []
    for candidate in candidates:
        rows = [
            {
                "input_ids": [*prompt, *candidate],
                "labels": [IGNORED_LABEL] * len(prompt) + list(candidate),
                "label": -1,
                "answer": "",
            }
            for prompt in prompts
        ]
        batch = collate(rows, pad_token_id)
        tensors = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        log_likelihoods.append(-token_nll(*answer_logits(model, tensors)).sum(dim=-1))
    return torch.stack(log_likelihoods).argmax(dim=0)


class TaskScorer(nn.Module):
    """Accumulates one task's score and its answers' negative log-likelihood over batches, on any number of ranks.

    Args:
        task: The task; its ``metric`` decides what the score is.
        candidates: Token ids of ``task.labels`` as answers (empty where there are none).
        max_new_tokens: Length limit of generated answers, unless the task sets a lower one.
        num_answers: Of the first so many rows (on each rank), ``answers`` keeps what was answered.
        end_token_id: A token that ends an answer beside the tokenizer's end of sequence.
    """

    def __init__(
        self,
        task: Task,
        candidates: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_answers: int = 0,
        end_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.num_answers = num_answers
        self.end_token_id = end_token_id
        self.answers: list[Answer] = []
        self.candidates = candidates
        self.max_new_tokens = min(max_new_tokens, task.max_new_tokens or max_new_tokens)
        self.score: Metric
        if not task.metric.startswith("label"):
            self.score = MeanMetric(nan_strategy="disable")
        else:
            # One class more than labels: what is generated may be none of them.
            self.score = MulticlassAccuracy(num_classes=len(task.labels or ()) + 1, average="micro")
        self.nll = MeanMetric(nan_strategy="disable")  # a model that has diverged on some rows has diverged

    def update(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]) -> None:
        """Score one collated batch."""
        logits, targets = answer_logits(model, batch)
        is_answer = (targets != IGNORED_LABEL) & batch["counts"][:, None]
        self.nll.update(token_nll(logits, targets)[is_answer], torch.ones_like(targets)[is_answer])
        is_prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORED_LABEL)
        prompts = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], is_prompt, strict=True)]
        if self.task.metric == "label_ranking":
            ranked = rank_labels(model, prompts, self.candidates, int(tokenizer.pad_token_id))
            self._enter(ranked[batch["counts"]], batch["label"][batch["counts"]])
            labels = self._label_answers()
            answers = [labels[index] for index in ranked.tolist()]
            scores = (ranked == batch["label"]).float().tolist()
        elif self.task.metric == "label_accuracy":
            answers = self._generate(model, tokenizer, prompts)
            labels = self._label_answers()
            given = [labels.index(answer) if answer in labels else len(labels) for answer in answers]
            self._enter(torch.tensor(given, device=targets.device)[batch["counts"]], batch["label"][batch["counts"]])
            scores = [float(index == label) for index, label in zip(given, batch["label"].tolist(), strict=True)]
        else:
            answers, scores = self._scored_answers(model, tokenizer, prompts, batch["answer"])
            self._enter(torch.tensor(scores, device=targets.device)[batch["counts"]])
        counted = [index for index, counts in enumerate(batch["counts"].tolist()) if counts]
        self._keep(
            tokenizer, *([row[index] for index in counted] for row in (prompts, batch["answer"], answers, scores))
        )

    def _generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[str] | None = None,
    ) -> list[str]:
        return generate_answers(model, tokenizer, prompts, self.max_new_tokens, wanted, self.end_token_id)

    def _enter(self, *values: Tensor) -> None:
        if values[0].numel():  # a process may have nothing but rows that do not count
            self.score.update(*values)

    def _label_answers(self) -> list[str]:
        return [self.task.label_answer(label).strip() for label in self.task.labels or ()]

    def _keep(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        right: Sequence[str],
        given: Sequence[str],
        scores: Sequence[float],
    ) -> None:
        room = self.num_answers - len(self.answers)
        if room > 0:
            texts = tokenizer.batch_decode([list(ids) for ids in prompts[:room]], skip_special_tokens=True)
            self.answers += map(Answer, texts, right[:room], given[:room], scores[:room])

    def _scored_answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        right: Sequence[str],
    ) -> tuple[list[str], list[float]]:
        """Generate answers, and score each of them against the right one."""
        metric = self.task.metric
        decisive = {"exact_match": right, "first_character": [answer[:1] for answer in right]}.get(metric)
        if self.task.substitutions:  # which may yet make two texts equal
            decisive = None
        answers = self._generate(model, tokenizer, prompts, decisive)
        pairs = [
            (self.task.compared(answer), self.task.compared(wanted))
            for answer, wanted in zip(answers, right, strict=True)
        ]
        if metric == "sari":
            sources = tokenizer.batch_decode([list(ids) for ids in prompts], skip_special_tokens=True)
            return answers, [
                sari(given, source, [wanted]) for (given, wanted), source in zip(pairs, sources, strict=True)
            ]
        return answers, [ANSWER_SCORES[metric](given, wanted) for given, wanted in pairs]

    def compute(self) -> dict[str, Tensor]:
        """``score`` (in [0, 1]) and ``nll`` (nats per answer token) over all that was seen, scalars."""
        return {"score": self.score.compute(), "nll": self.nll.compute()}


def _context(model: Any) -> float:
    """Tokens that a model can look back on, as its configuration states it; else infinity."""
    return context_tokens(_base_model(model).config) or math.inf


def _base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
