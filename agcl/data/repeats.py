"""Rows that are there twice, or contradict each other."""

import warnings
from collections.abc import Sequence


class Repeats:
    """Counts rows that were there already, and those that contradict an earlier one."""

    def __init__(self) -> None:
        self._answers: dict[int, set[int]] = {}  # of each prompt; hashes, since prompts may be long
        self.same = self.contradicting = 0

    def add(self, prompt_ids: Sequence[int], answer: str) -> None:
        """Take in the next row."""
        answers = self._answers.setdefault(hash(tuple(prompt_ids)), set())
        if hash(answer) in answers:
            self.same += 1
        elif answers:
            self.contradicting += 1
        answers.add(hash(answer))

    def warn(self, task: str, split: str) -> None:
        """Say in one line how many there are, if any."""
        if self.same or self.contradicting:
            warnings.warn(
                f"Task `{task}`: in `{split}`, {self.same} rows repeat an earlier one, and {self.contradicting} have "
                "the prompt of an earlier one with another answer, so that not both can be right. Leave them out, "
                "unless it is meant so.",
                stacklevel=2,
            )
