"""What the synthetic tables share: an endless, seeded source of sequences and the answers that are asked in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Examples(NamedTuple):
    """Sequences and what a model should say after reading each token.

    Attributes:
        tokens: (B, T) int64; what follows a row's last token is padding, 0.
        targets: (B, T) int64: the answer that is due at a token, `IGNORED` where nothing is asked and at padding.
        lengths: (B,) int64, tokens of each row; None if all have T.
    """

    tokens: Tensor
    targets: Tensor
    lengths: Tensor | None = None


class Task(ABC):
    """A task of given size and difficulty: a frozen dataclass whose fields say which.

    Attributes:
        vocab_size: V; tokens and answers are below it.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Examples:
        """`count` fresh sequences; a function of the generator's state alone.

        Args:
            count: B, at least 1.
            generator: the source of all randomness, on the CPU.
        """


class Answers(NamedTuple):
    """How much of what was asked is right, counted so that batches can be added up.

    Attributes:
        right: answers that are right.
        asked: answers.
        whole: sequences all of whose answers are right.
        sequences: sequences in which something is asked.
    """

    right: int
    asked: int
    whole: int
    sequences: int

    def add(self, other: Answers) -> Answers:
        return Answers(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def accuracy(self) -> float:
        """Fraction of answers that are right."""
        return self.right / self.asked

    @property
    def exact(self) -> float:
        """Fraction of sequences all of whose answers are right."""
        return self.whole / self.sequences


def mark(logits: Tensor, targets: Tensor) -> Answers:
    """Counts the right answers: the largest logit of (B, T, V) against targets (B, T)."""
    asked = targets != IGNORED
    right = (logits.argmax(-1) == targets) & asked
    some = asked.any(1)
    whole = (right == asked).all(1) & some
    return Answers(*(int(x.sum()) for x in (right, asked, whole, some)))
