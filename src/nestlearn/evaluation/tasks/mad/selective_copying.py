"""Tokens to be told from blanks, and said in their order at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Tokens with blanks strewn between them, the copy token, and as many blanks as there are tokens to say in order.

    Each blank falls before one of the tokens, with equal chances for all of them, so the last token stands right before
    the copy token. Tokens: first those to copy, then the blank, then the copy token.

    Attributes:
        vocab_size: V, the blank and the copy token included.
        length: T, at least 2 * copied + 1.
        copied: how many tokens are to be copied.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 16
    length: int = 256
    copied: int = 16

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 3)
        check_whole("copied", self.copied, 1)
        check_whole("length", self.length, 1)
        if self.length < 2 * self.copied + 1:
            raise ValueError(
                f"length: expected at least {2 * self.copied + 1} to read and say {self.copied} tokens and one to ask, "
                f"got {self.length}; or copy at most {(self.length - 1) // 2}"
            )

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        copied = self.copied
        copy_token, blank = self.vocab_size - 1, self.vocab_size - 2
        said = torch.randint(blank, (count, copied), generator=generator)
        falls = torch.randint(copied, (count, self.length - 2 * copied - 1), generator=generator)
        blanks = torch.zeros_like(said).scatter_add_(1, falls, torch.ones_like(falls))
        tokens = torch.full((count, self.length), blank)
        tokens.scatter_(1, torch.arange(copied) + blanks.cumsum(1), said)
        tokens[:, -copied - 1] = copy_token
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -copied:] = said
        return Examples(tokens, targets)
