"""MQAR, multi-query associative recall (Arora et al., 2312.04927): read pairs, then say the value of each key."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Sequences of `pairs` keys and values, then every key once more, at random places among filler.

    Tokens: 0 is filler, 1 .. symbols are keys, symbols + 1 .. 2 symbols are values. The target is the key's value where
    it is asked.

    Attributes:
        pairs: pairs of a sequence, at most `symbols`.
        length: T, at least 3 * pairs.
        symbols: number of keys, and of values.

    Raises:
        ValueError: if the pairs do not fit.
    """

    pairs: int = 8
    length: int = 64
    symbols: int = 64

    def __post_init__(self) -> None:
        if self.length < 3 * self.pairs or not 1 <= self.pairs <= self.symbols:
            raise ValueError(
                f"{self.pairs} pairs need a length of at least {3 * self.pairs} (got {self.length}) and at least "
                f"{self.pairs} symbols (got {self.symbols})"
            )

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.symbols

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        pairs, length = self.pairs, self.length
        draw = torch.rand(count, self.symbols, generator=generator)
        keys = 1 + draw.argsort(1)[:, :pairs]
        values = 1 + self.symbols + torch.randint(self.symbols, (count, pairs), generator=generator)
        tokens = torch.zeros(count, length, dtype=torch.long)
        targets = torch.full((count, length), IGNORED)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        order = torch.rand(count, length - 2 * pairs, generator=generator).argsort(1)
        places = 2 * pairs + order[:, :pairs]
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return Examples(tokens, targets)
