"""Answers are counted by hand here."""

from __future__ import annotations

import torch

from nestlearn.evaluation.tasks import IGNORED, Answers, mark


def test_marks_count_answers_and_whole_sequences() -> None:
    targets = torch.tensor([[1, IGNORED, 2], [0, 1, IGNORED], [IGNORED, IGNORED, IGNORED]])
    said = torch.tensor([[1, 0, 2], [0, 2, 1], [0, 0, 0]])
    logits = torch.nn.functional.one_hot(said, 3).float()
    answers = mark(logits, targets)
    assert answers == Answers(right=3, asked=4, whole=1, sequences=2)
    both = answers.add(Answers(1, 1, 1, 1))
    assert (both.accuracy, both.exact) == (4 / 5, 2 / 3)
