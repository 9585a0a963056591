"""Scores of generated answers: cases counted by hand, and an example whose value others published."""

import pytest

from agcl.metrics.text import edit_similarity, first_character, rouge_l, sari


@pytest.mark.parametrize(
    ("answer", "right", "expected"), [("A", "A\nBecause", 1), ("B", "A", 0), ("", "A", 0), ("a", "A", 0), ("", "", 0)]
)
def test_first_character(answer, right, expected):
    assert first_character(answer, right) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    # One letter replaced is one deletion and one insertion, of 6 letters in all.
    [("abc", "abd", 1 - 2 / 6), ("", "abc", 0), ("abc", "abc", 1), ("ab", "abc", 1 - 1 / 5)],
)
def test_edit_similarity(answer, right, expected):
    assert edit_similarity(answer, right) == pytest.approx(expected)


def test_rouge_l():
    # Longest common subsequence "the cat on": precision 3/4, recall 3/5.
    assert rouge_l("The cat, on it!", "the cat sat on mat") == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert rouge_l("", "a b") == 0
    assert rouge_l("b a", "a b") == pytest.approx(0.5)  # order counts


def test_sari_agrees_with_the_published_example():
    # The value in the documentation of the `sari` metric on the Hugging Face hub, in percent.
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    source = "About 95 species are currently accepted."
    assert 100 * sari("About 95 you now get in.", source, references) == pytest.approx(26.953601953601954)


@pytest.mark.parametrize(
    ("answer", "source", "references", "expected"),
    [
        # All right: b gone, c there, a kept; orders without n-grams count as right too.
        ("a c", "a b", ["a c"], 1),
        # Words: nothing added where c was wanted 0, kept a and b where a was wanted 2/3, nothing deleted 1. Pairs: 0,
        # 0 (kept "a b" in vain), 1. Orders 3 and 4: 1.
        ("a b", "a b", ["a c"], ((0 + 2 / 3 + 1) / 3 + 1 / 3 + 1 + 1) / 4),
        # Each reference counts half: a, of which half was to stay, kept; b, of which half was to go, deleted.
        ("a", "a b", ["a", "b"], ((1 + 1 / 2 + 1 / 2) / 3 + 1 + 1 + 1) / 4),
        # As in the authors' program, a repeated word that is deleted once counts as wrongly deleted.
        ("a", "a a", ["a"], ((1 + 1 + 0) / 3 + 1 + 1 + 1) / 4),
    ],
)
def test_sari_by_hand(answer, source, references, expected):
    assert sari(answer, source, references) == pytest.approx(expected)


def test_words_of_sari():
    # Case and the spaces around punctuation do not matter, the point in a number does.
    assert sari("It costs 3.5, IT SAID!", "it costs 3.5 , it said !", ["it costs 3.5 , it said !"]) == 1
    assert sari("3 . 5", "3.5", ["3.5"]) < 1
