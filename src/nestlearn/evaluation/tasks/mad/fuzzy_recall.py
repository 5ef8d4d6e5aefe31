"""Recall where a key, and a value, is several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.mad.recall import ask, draw_one, first_alike
from nestlearn.evaluation.tasks.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """As `InContextRecall`, but keys and values are runs of tokens; all tokens of a returning key's value are asked.

    Each run is of a random size and has no token twice. As keys and values share no token, a run's end shows when the
    next begins. The last pair always has a key that was there before. Tokens: first those of keys, half of all but one
    (rounded down), then those of values, then one for padding, which stands before the first pair.

    Attributes:
        vocab_size: V, the padding included.
        length: T.
        key_sizes: fewest and most tokens of a key. MAD trains with (1, 3), and tests with the longest keys alone.
        value_sizes: the same of a value.
        every_token: whether each token is to be followed by the next one, whatever it is. MAD trains so, and tests the
            values of returning keys alone.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 16
    length: int = 128
    key_sizes: tuple[int, int] = (3, 3)
    value_sizes: tuple[int, int] = (1, 3)
    every_token: bool = False

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 3)
        for name, available in (("key_sizes", self._key_tokens), ("value_sizes", self._value_tokens)):
            sizes = getattr(self, name)
            if not isinstance(sizes, Sequence) or len(sizes) != 2:
                raise ValueError(f"{name}: expected the fewest and the most tokens, for example (1, 3); got {sizes!r}")
            object.__setattr__(self, name, tuple(sizes))
            for size in sizes:
                check_whole(name, size, 1)
            if not sizes[0] <= sizes[1] <= available:
                raise ValueError(
                    f"{name}: expected the fewest tokens, then the most, which can be {available} with vocab_size "
                    f"{self.vocab_size}, as no token comes twice; got {sizes!r}"
                )
        if (self._key_tokens + 1) ** self.key_sizes[1] >= 2**63:
            raise ValueError(f"key_sizes: too many possible keys of {self.key_sizes[1]} tokens; take fewer tokens")
        check_whole("length", self.length, 2 * self._longest)

    @property
    def _key_tokens(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def _value_tokens(self) -> int:
        return self.vocab_size - 1 - self._key_tokens

    @property
    def _longest(self) -> int:
        """Most tokens of a pair."""
        return self.key_sizes[1] + self.value_sizes[1]

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        shape = (count, self.length // (self.key_sizes[0] + self.value_sizes[0]))
        places = torch.arange(shape[1])
        keys, key_sizes = draw_runs(shape, self.key_sizes, self._key_tokens, generator)
        values, value_sizes = draw_runs(shape, self.value_sizes, self._value_tokens, generator)
        first = first_alike(names_of(keys, key_sizes, self._key_tokens))
        # As many pairs as leave room for a last one of any size, which then asks for the key of one of them.
        ends = (key_sizes + value_sizes.gather(1, first)).cumsum(1)
        last = (ends <= self.length - self._longest).sum(1, keepdim=True)
        key_of = torch.arange(shape[1]).expand(shape).clone()
        asked_last = draw_one((first == places) & (places < last), generator)
        key_of.scatter_(1, last, asked_last)
        first.scatter_(1, last, asked_last)

        key_sizes, value_sizes = key_sizes.gather(1, key_of), value_sizes.gather(1, first)
        keys = keys.gather(1, key_of[..., None].expand_as(keys))
        values = self._key_tokens + values.gather(1, first[..., None].expand_as(values))
        ends = (key_sizes + value_sizes).cumsum(1)
        ends = ends + self.length - ends.gather(1, last)  # the padding comes first
        value_starts = ends - value_sizes
        # What is not part of a sequence is written at one place more, which is cut off.
        spare = self.length
        in_keys, in_values = torch.arange(keys.shape[2]), torch.arange(values.shape[2])
        used = (places <= last)[..., None]
        key_places = (value_starts - key_sizes)[..., None] + in_keys
        key_places = torch.where(used & (in_keys < key_sizes[..., None]), key_places, spare)
        value_places = value_starts[..., None] + in_values
        value_places = torch.where(used & (in_values < value_sizes[..., None]), value_places, spare)
        tokens = torch.full((count, self.length + 1), self.vocab_size - 1)
        tokens.scatter_(1, key_places.flatten(1), keys.flatten(1))
        tokens.scatter_(1, value_places.flatten(1), values.flatten(1))
        is_answer = torch.zeros(tokens.shape, dtype=torch.bool)
        returns = (first != places)[..., None].expand_as(values)
        is_answer.scatter_(1, value_places.flatten(1), returns.flatten(1))
        return ask(tokens[:, :spare], is_answer[:, :spare], self.every_token)


def draw_runs(
    shape: tuple[int, int], sizes: tuple[int, int], tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Runs of different numbers below `tokens`, and how many of them count.

    Args:
        shape: (B, P), of the runs.
        sizes: fewest and most numbers of a run.

    Returns:
        runs (B, P, most), and sizes (B, P), with equal chances from the fewest to the most.
    """
    fewest, most = sizes
    drawn: list[Tensor] = []
    for taken in range(most):
        new = torch.randint(tokens - taken, shape, generator=generator)
        # Stepping over what is taken, from the smallest up, makes the new one any of the others with equal chances.
        for old in torch.stack(drawn).sort(0).values if drawn else ():
            new = new + (new >= old)
        drawn.append(new)
    return torch.stack(drawn, 2), torch.randint(fewest, most + 1, shape, generator=generator)


def names_of(runs: Tensor, sizes: Tensor, tokens: int) -> Tensor:
    """One number for each run (B, P, S) of `sizes` (B, P) numbers below `tokens`, the same for equal runs alone."""
    names = torch.zeros_like(sizes)
    for place, digit in enumerate(runs.unbind(2)):
        names = names * (tokens + 1) + torch.where(place < sizes, digit + 1, 0)
    return names
