"""Recall of what a sequence itself says: keys and their values, which differ from sequence to sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """Pairs of a key and a value; where a key comes again, the model is to say the value that it had before.

    A key is drawn anew for each pair, with equal chances; its value stays the same throughout the sequence. The last
    pair always has a key that was there before. A noise pair is two tokens of noise in place of a key and a value, and
    asks nothing. Tokens: first the keys, half of what is not noise (rounded down), then the values, then the noise.

    Attributes:
        vocab_size: V, noise included.
        length: T, even.
        noise_vocab_size: how many of the tokens are noise.
        noise_fraction: chance that a pair is noise, below 1. One pair before the last, and the last, never are.
        every_token: whether each token is to be followed by the next one, whatever it is. MAD trains so, and tests the
            values of returning keys alone.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 16
    length: int = 128
    noise_vocab_size: int = 0
    noise_fraction: float = 0.0
    every_token: bool = False

    def __post_init__(self) -> None:
        check_whole("noise_vocab_size", self.noise_vocab_size, 0)
        check_whole("length", self.length, 4)
        if self.length % 2:
            raise ValueError(f"length: expected an even number, for pairs; got {self.length}; take {self.length + 1}")
        check_whole("vocab_size", self.vocab_size, 2)
        if self.vocab_size - self.noise_vocab_size < 2:
            raise ValueError(
                f"vocab_size: expected a key and a value beside the noise, at least {self.noise_vocab_size + 2} with "
                f"noise_vocab_size {self.noise_vocab_size}; got {self.vocab_size}"
            )
        if not 0 <= self.noise_fraction < 1:
            raise ValueError(f"noise_fraction: expected a number from 0 to below 1, got {self.noise_fraction}")
        if self.noise_fraction and not self.noise_vocab_size:
            raise ValueError(f"noise_fraction {self.noise_fraction} needs noise_vocab_size of at least 1, got 0")

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        shape = (count, self.length // 2)
        places = torch.arange(shape[1])
        key_count = (self.vocab_size - self.noise_vocab_size) // 2
        value_count = self.vocab_size - self.noise_vocab_size - key_count
        keys = torch.randint(key_count, shape, generator=generator)
        is_noise = torch.rand(shape, generator=generator) < self.noise_fraction
        is_noise[torch.arange(count), torch.randint(shape[1] - 1, (count,), generator=generator)] = False
        is_noise[:, -1] = False
        # Every noise pair counts as a key of its own, so that none comes again.
        first = first_alike(torch.where(is_noise, key_count + places, keys))
        asked_last = draw_one((first == places) & ~is_noise & (places < shape[1] - 1), generator)
        keys[:, -1:] = keys.gather(1, asked_last)
        first[:, -1:] = asked_last
        values = key_count + torch.randint(value_count, shape, generator=generator).gather(1, first)
        tokens = torch.stack([keys, values], 2)
        if self.noise_fraction:
            noise = torch.randint(self.noise_vocab_size, tokens.shape, generator=generator)
            tokens = torch.where(is_noise[..., None], self.vocab_size - self.noise_vocab_size + noise, tokens)
        returns = first != places
        is_answer = torch.stack([torch.zeros_like(returns), returns], 2)
        return ask(tokens.flatten(1), is_answer.flatten(1), self.every_token)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """`InContextRecall` with pairs of noise in between, by default with as many keys and values as without."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise_fraction: float = 0.2


def ask(tokens: Tensor, is_answer: Tensor, every_token: bool) -> Examples:
    """Asks for a token, where it is an answer or every token is one, at the token before it. All are (B, T)."""
    targets = torch.full_like(tokens, IGNORED)
    asked = is_answer[:, 1:] | every_token
    targets[:, :-1] = torch.where(asked, tokens[:, 1:], IGNORED)
    return Examples(tokens, targets)


def first_alike(names: Tensor) -> Tensor:
    """For each name in (B, P) the index of the first one in its row that is the same, (B, P)."""
    ordered, order = names.sort(dim=1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = torch.where(is_new, torch.arange(names.shape[1]), 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, starts))


def draw_one(allowed: Tensor, generator: torch.Generator) -> Tensor:
    """Draws from each row of (B, P) the index of a true entry, all with equal chances; (B, 1)."""
    draws = torch.rand(allowed.shape, generator=generator)
    return draws.masked_fill(~allowed, -1.0).argmax(1, keepdim=True)
