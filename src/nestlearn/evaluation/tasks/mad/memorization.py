"""Facts that no sequence tells: they must be learnt in training and kept in the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Keys, each followed by a blank; at the blank the model is to say the key's value, which is the same everywhere.

    Tokens: first the keys, half of all but one (rounded down), then the values, then the blank. No two keys share a
    value.

    Attributes:
        vocab_size: V, the blank included.
        length: T, even.
        map_seed: which keys have which values. Training and test need the same.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 256
    length: int = 32
    map_seed: int = 0

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 3)
        check_whole("map_seed", self.map_seed, 0)
        check_whole("length", self.length, 2)
        if self.length % 2:
            raise ValueError(f"length: expected an even number, for pairs; got {self.length}; take {self.length + 1}")

    @property
    def values(self) -> Tensor:
        """The value of every key, (keys,) int64."""
        keys = (self.vocab_size - 1) // 2
        generator = torch.Generator().manual_seed(self.map_seed)
        return keys + torch.randperm(self.vocab_size - 1 - keys, generator=generator)[:keys]

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        values = self.values
        keys = torch.randint(len(values), (count, self.length // 2), generator=generator)
        tokens = torch.full((count, self.length), self.vocab_size - 1)
        tokens[:, 0::2] = keys
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 1::2] = values[keys]
        return Examples(tokens, targets)
