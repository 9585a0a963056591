"""What the examples share: a tiny random model, two tasks to learn one after the other, and how both are measured.

The tasks are names of countries and languages in Welsh and in Finnish, spelled out letter by letter by a model of 50
thousand random weights, so that everything runs on a CPU in seconds.
"""

import json
from importlib.resources import files

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

LANGUAGES = ["welsh", "finnish"]
NUM_ROWS = 8
LEARNED = 0.1  # nats per answer token: every answer is right


def texts(language):
    """Rows of one task, other words in each language: a prompt and the answer that completes it."""
    lines = (files("agcl") / "data" / "builtin" / "cldr" / f"{language}.jsonl").read_text("utf-8").splitlines()
    first = LANGUAGES.index(language) * NUM_ROWS
    rows = [json.loads(line) for line in lines[first : first + NUM_ROWS]]
    return [{"prompt": f"{row['english']} in {language.title()}:", "completion": f" {row['answer']}"} for row in rows]


def tiny_tokenizer():
    """A token for each character."""
    rows = [row for language in LANGUAGES for row in texts(language)]
    characters = sorted(set("".join(row["prompt"] + row["completion"] for row in rows)))
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def tiny_model(tokenizer, seed=0):
    """A Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def twin_of(model):
    """Another model with the same weights."""
    # A deep copy would not do: TRL ties a model's forward pass to the object.
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def encoded(tokenizer, language):
    """Rows as token ids; the labels are -100 on the prompt, so that only the answer is learned."""
    rows = []
    for text in texts(language):
        prompt = tokenizer(text["prompt"])["input_ids"]
        answer = [*tokenizer(text["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def collate(rows):
    """A batch, padded on the right."""

    def padded(key, value):
        return pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)

    mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True).long()
    return {"input_ids": padded("input_ids", 1), "labels": padded("labels", -100), "attention_mask": mask}


@torch.no_grad()
def loss(model, rows):
    """Mean negative log-likelihood of the answers' tokens, in nats."""
    training = model.training
    model.eval()
    value = model(**collate(rows)).loss.item()
    model.train(training)
    return value


class StopWhenLearned(TrainerCallback):
    """Ends training as soon as the rows are learned, so that runs are compared at the same learning."""

    def __init__(self, rows):
        self.rows = rows

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Stop once the loss is low enough."""
        control.should_training_stop = loss(model, self.rows) < LEARNED


def print_comparison(results):
    """The losses on both tasks after the second was learned, without and with the gate."""
    print(f"{'nats per answer token':26}{'Welsh, learned before':>24}{'Finnish, just learned':>24}")
    for name, (before, now) in results.items():
        print(f"{name:26}{before:24.3f}{now:24.3f}")
