"""The command that checks a model: what it prints, its exit status, and its one-line errors."""

import pytest
import torch
from conftest import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, T5Config

from agcl.commands.check_model import check_model
from agcl.errors import AgclError


def test_a_supported_model_returns_zero(llama_folder, gpt2_folder, capsys):
    for folder, name in ((llama_folder, "LlamaForCausalLM"), (gpt2_folder, "GPT2LMHeadModel")):
        assert check_model(str(folder)) == 0
        assert capsys.readouterr().out.startswith(f"{name} (float32): supported\n")


def test_a_model_that_is_not_supported_returns_one(tmp_path, capsys):
    BloomForCausalLM(BloomConfig(vocab_size=23, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    assert check_model(str(tmp_path)) == 1
    assert "GeLUFunctionBackward: 2 x" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_dtype_is_the_one_asked_for(llama_folder, capsys, dtype):
    assert check_model(str(llama_folder), dtype=dtype) == 0
    assert capsys.readouterr().out.startswith(f"LlamaForCausalLM ({dtype}): supported")


def target(output):
    return float(output.split("of f = ")[1].split()[0])


def test_prompt_and_answer_decide_what_is_attributed(llama_folder, capsys):
    assert check_model(str(llama_folder), prompt="a cat?", answer=" dog") == 0
    found = target(capsys.readouterr().out)
    tokenizer = character_tokenizer()
    ids = tokenizer("a cat? dog", return_tensors="pt")["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(llama_folder)(ids).logits[0]
    expected = sum(logits[len("a cat?") - 1 + k, ids[0, len("a cat?") + k]] for k in range(4))
    assert found == pytest.approx(expected.item(), rel=1e-3)
    assert check_model(str(llama_folder), prompt="a cat?") == 0
    ids = tokenizer("a cat?", return_tensors="pt")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(llama_folder)(ids).logits[0, -4:].max(-1).values.sum()
    assert target(capsys.readouterr().out) == pytest.approx(expected.item(), rel=1e-3)


FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2},
    "llama": {},
    "gemma2": {"head_dim": 8},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_need_no_checkpoint_and_layers_shrink_the_architecture(tmp_path, capsys, family):
    common = {"vocab_size": 40, "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = FAMILIES[family] | {"vocab_size": 40} if family == "gpt2" else common | heads | tokens | FAMILIES[family]
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    assert check_model(str(tmp_path), random_weights=True) == 0
    whole = capsys.readouterr().out
    assert check_model(str(tmp_path), random_weights=True, layers=2) == 0
    shrunk = capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    blocks = "transformer.h." if family == "gpt2" else "model.layers."
    assert whole.count(f"\n{blocks}") == 4
    assert shrunk.count(f"\n{blocks}") == 2
    assert check_model(str(tmp_path), random_weights=True, layers=2) == 0
    assert capsys.readouterr().out == shrunk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "a"}, "`answer` is given without `prompt`"),
        ({"layers": 2}, "add `random_weights`"),
        ({"layers": 0, "random_weights": True}, "`layers` is 0; give at least 1"),
        ({"prompt": ""}, "`prompt` is '', which has no tokens"),
        ({"prompt": "a", "answer": ""}, "`answer` is '', which has no tokens"),
    ],
)
def test_refuses_options_that_do_not_go_together(gpt2_folder, options, message):
    with pytest.raises(AgclError, match=message) as error:
        check_model(str(gpt2_folder), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("random_weights", [False, True])
def test_errors_of_loading_are_one_line(tmp_path, random_weights):
    def refused(name):
        with pytest.raises(AgclError) as error:
            check_model(str(name), random_weights=random_weights)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "No model could be loaded from" in refused(tmp_path / "nothing")
    assert "There is no built-in model `nothing`" in refused("builtin:nothing")
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    assert "is an encoder-decoder" in refused(tmp_path)
    GPT2Config(n_embd=10, n_head=3, vocab_size=11).save_pretrained(tmp_path)
    assert ("cannot be built" if random_weights else "No model could be loaded") in refused(tmp_path)
