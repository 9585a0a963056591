"""Tiny random models with a character tokenizer, on disk as users have them, and a sequence of tiny tasks."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from helpers import write_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + " ?.,:"


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """A test's random numbers do not depend on which tests its worker ran before it."""
    torch.manual_seed(0)


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(family: str):
    size = len(CHARACTERS) + 2
    if family == "gpt2":
        return GPT2Config(
            vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
        )
    return LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
    )


def save_tiny_model(folder: Path, family: str, **changes) -> Path:
    config = tiny_config(family)
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory):
    """A tiny model with the context that a benchmark's prompts need, in characters."""
    folder = tmp_path_factory.mktemp("roomy")
    config = tiny_config("llama")
    config.max_position_embeddings = 2048
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def task_files(tmp_path_factory) -> list[Path]:
    """Three tasks of four rows: the same keys, other answers in each task."""
    folder = tmp_path_factory.mktemp("tasks")
    keys = ["cat", "dog", "owl", "eel"]
    answers = [["a", "b", "c", "d"], ["c", "a", "d", "b"], ["d", "c", "b", "a"]]
    return [
        write_rows(
            folder / f"task{i}.jsonl", [{"prompt": f"{k} {i}?", "answer": a} for k, a in zip(keys, column, strict=True)]
        )
        for i, column in enumerate(answers)
    ]


@pytest.fixture
def knowing(monkeypatch):
    """Let every row count as answered correctly: a tiny model seldom knows one by heart."""
    from agcl.attribution import relevance
    from agcl.attribution.estimators import wanda

    for module in (relevance, wanda):
        monkeypatch.setattr(module, "is_correct", lambda logits, targets: True)


@pytest.fixture(scope="session")
def finished_run(llama_folder, task_files, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    path = write_config(llama_folder, task_files, run_dir)
    output = subprocess.run(
        [sys.executable, "-m", "agcl", "fit", "--config", str(path)], capture_output=True, text=True, check=True
    )
    return run_dir / "run" / "version_0", output.stdout + output.stderr
