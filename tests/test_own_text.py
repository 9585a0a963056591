"""What a model writes by itself: drawn from its own distribution, and nothing else is touched."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.attribution import compute_input_moments
from agcl.errors import AgclError
from agcl.own_text import own_text_moments, text_samples, write_text

PIECES, TOKENS = 6, 12


@pytest.fixture
def writer(gpt2_folder):
    """GPT-2 has dropout: the mode must be right."""
    return AutoModelForCausalLM.from_pretrained(gpt2_folder).train(), AutoTokenizer.from_pretrained(gpt2_folder)


def test_every_token_but_the_first_is_an_answer(writer):
    model, tokenizer = writer
    pieces = write_text(model, tokenizer, PIECES, TOKENS, seed=0)
    assert pieces.shape == (PIECES, TOKENS)
    assert (pieces[:, 0] == tokenizer.eos_token_id).all()
    for piece, sample in zip(pieces, text_samples(pieces), strict=True):
        sample.check()
        assert torch.equal(sample.input_ids, piece)
        assert sample.positions.tolist() == list(range(TOKENS - 1))
        assert torch.equal(sample.targets, sample.input_ids[1:])


def test_only_the_seed_decides(writer):
    model, tokenizer = writer
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = write_text(model, tokenizer, PIECES, TOKENS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(write_text(model, tokenizer, PIECES, TOKENS, seed=1), first)
    assert not torch.equal(write_text(model, tokenizer, PIECES, TOKENS, seed=2), first)
    assert all(module.training for module in model.modules())


def test_it_is_drawn_from_the_models_own_distribution(writer):
    """Neither the likeliest tokens, nor what the model's settings for generation would make of it."""
    model, tokenizer = writer
    model.generation_config.update(temperature=0.01, top_k=1, repetition_penalty=9.0)
    begin = torch.tensor([[tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model.eval()(begin).logits[0, -1].softmax(-1)
    expected[tokenizer.eos_token_id] = 0  # which would end a piece
    drawn = write_text(model, tokenizer, 4000, 2, seed=0)[:, 1]
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected / expected.sum()).abs() < 5 * deviation + 1e-6).all()


def test_pieces_fit_into_the_context(writer):
    model, tokenizer = writer
    assert write_text(model, tokenizer, 2, 1000, seed=0).shape == (2, model.config.max_position_embeddings)


def test_its_directions_are_those_of_its_own_pieces(writer):
    model, tokenizer = writer
    found = own_text_moments(model, tokenizer, num_pieces=3, num_tokens=8, batch_size=2, seed=4)
    rows = [{"input_ids": piece, "labels": piece} for piece in write_text(model, tokenizer, 3, 8, seed=4)]
    expected = compute_input_moments(model, rows, only_correct=False)
    assert found.transposed == expected.transposed
    assert found.sums
    for name, moment in expected.sums.items():
        assert torch.allclose(found.sums[name], moment, rtol=1e-3, atol=1e-5 * float(moment.max())), name


@pytest.mark.parametrize("options", [{"num_pieces": 0}, {"num_tokens": 1}])
def test_no_text_is_refused(writer, options):
    with pytest.raises(AgclError, match="choose"):
        own_text_moments(*writer, **options)
