"""How near a generated answer comes to the right one: scores of one row in [0, 1], whose mean is a task's score."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rapidfuzz import fuzz
from torchmetrics.functional.text import rouge_score

_MAX_ORDER = 4
# Symbols, full stops and commas not inside a number, and hyphens after a digit stand by themselves (mteval-v13a).
_SYMBOLS = re.compile(r"[!-&(-+/:-@\[-`{-~]|(?<![0-9])[.,]|[.,](?![0-9])|(?<=[0-9])-")


def first_character(answer: str, right: str) -> float:
    """1 if both begin with the same character, else 0; an empty answer is wrong."""
    return float(answer[:1] == right[:1] != "")


def edit_similarity(answer: str, right: str) -> float:
    """1 - d / (length of both), where d counts insertions and deletions of characters.

    Example:
        >>> round(edit_similarity("a = b", "a = c"), 2)
        0.8
    """
    return fuzz.ratio(answer, right) / 100


def rouge_l(answer: str, right: str) -> float:
    """F measure of the longest common subsequence of words (Lin, 2004), in lower case, letters a-z and digits alone.

    Example:
        >>> round(rouge_l("The cat sat.", "the cat sat down"), 4)
        0.8571
    """
    return float(rouge_score(answer, right, rouge_keys="rougeL")["rougeL_fmeasure"])


def sari(answer: str, source: str, references: Sequence[str]) -> float:
    """Were the right words added, kept and deleted in simplifying a text (Xu et al., TACL 2016)?

    The mean over n-grams of order 1 to 4 of (F of additions + F of keeping + precision of deletions) / 3. Additions
    count distinct n-grams; for the other two, each n-gram of source and answer counts once per reference. Where the
    paper leaves room, this follows what the field computes, which is the authors' program with recall of keeping over
    counts and 0/0 taken as 1: precision of keeping and deleting is a mean over distinct n-grams, F is taken of each
    order. Text is in lower case, cut into words as in mteval-v13a.

    Args:
        answer: The simplification.
        source: The text that was to be simplified.
        references: Good simplifications, at least one.

    Returns:
        A value in [0, 1].

    Example:
        >>> round(sari("a cat sat", "a cat sat down there", ["a cat sat"]), 2)
        1.0
    """
    source_words, answer_words = _words(source), _words(answer)
    reference_words = [_words(reference) for reference in references]
    total = 0.0
    for order in range(1, _MAX_ORDER + 1):
        wanted = Counter(ngram for words in reference_words for ngram in _ngrams(words, order))
        total += _sari_of_order(
            Counter(_ngrams(answer_words, order)), Counter(_ngrams(source_words, order)), wanted, len(references)
        )
    return total / _MAX_ORDER


def _sari_of_order(answer: Counter, source: Counter, wanted: Counter, num_references: int) -> float:
    source, answer = _times(source, num_references), _times(answer, num_references)
    kept, to_keep = source & answer, source & wanted
    kept_well = kept & wanted
    keep = _f_measure(_mean_share(kept_well, kept), _share(kept_well.total(), to_keep.total()))
    deleted = source - answer
    delete = _mean_share(deleted - wanted, deleted)
    added, to_add = answer.keys() - source.keys(), wanted.keys() - source.keys()
    added_well = len(added & to_add)
    add = _f_measure(_share(added_well, len(added)), _share(added_well, len(to_add)))
    return (add + keep + delete) / 3


def _words(text: str) -> list[str]:
    return _SYMBOLS.sub(r" \g<0> ", text.lower()).split()


def _ngrams(words: Sequence[str], order: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(order)), strict=False)


def _times(counts: Counter, factor: int) -> Counter:
    return Counter({ngram: count * factor for ngram, count in counts.items()})


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _mean_share(part: Counter, whole: Counter) -> float:
    return _share(sum(part[ngram] / count for ngram, count in whole.items()), len(whole))


def _f_measure(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
