"""Compression: a whole sequence in one vector. The task, and the model that reads the sequence back from the vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task
from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.models import HopeLM
from nestlearn.models.hope import State


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Random tokens, then the compression token, the last of the vocabulary: from what the model makes of that one
    alone, all others are to be said. The target at a place is its own token, so the task needs a `Compressor`.

    Attributes:
        vocab_size: V, the compression token included.
        length: T.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 2)
        check_whole("length", self.length, 2)

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        tokens = torch.randint(self.vocab_size - 1, (count, self.length), generator=generator)
        tokens[:, -1] = self.vocab_size - 1
        targets = tokens.clone()
        targets[:, -1] = IGNORED
        return Examples(tokens, targets)


class Compressor(nn.Module):
    """Reads a sequence with a model, and says the token of every place from the vector at the last one.

        logits, state = compressor(tokens)

    The vector plus a fixed sinusoidal embedding of a place goes through an MLP of two layers as wide as the model, with
    a norm before each and before the output layer, as in MAD; nothing else reaches the logits.

    Args:
        base: gives the vectors. Its head goes, for good: it becomes the identity.
    """

    def __init__(self, base: HopeLM) -> None:
        super().__init__()
        dim = base.config.dim
        base.head = nn.Identity()  # type: ignore[assignment]
        self.base = base
        self.decoder = nn.Sequential(
            RMSNorm(dim, eps=1e-5),
            nn.Linear(dim, dim),
            nn.GELU(),
            RMSNorm(dim, eps=1e-5),
            nn.Linear(dim, dim),
            nn.GELU(),
            RMSNorm(dim, eps=1e-5),
            nn.Linear(dim, base.config.vocab_size),
        )

    def forward(self, tokens: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Says what stood at each place.

        Args:
            tokens: (B, T) int64.
            lengths: (B,) int64, tokens of right-padded rows, at least 1; a row's vector is that at its own last token.

        Returns:
            logits (B, T, vocab_size), at a place for its own token, and the base's state.

        Raises:
            ValueError: from the base, if it cannot read the tokens.
        """
        hidden, state = self.base(tokens, lengths=lengths)
        batch, length, dim = hidden.shape
        last = torch.full((batch,), length) if lengths is None else lengths
        vector = hidden[torch.arange(batch, device=hidden.device), last.to(hidden.device) - 1]
        logits: Tensor = self.decoder(vector[:, None] + sinusoids(length, dim).to(vector))
        return logits, state

    def level_parameters(self) -> dict[int, list[tuple[str, nn.Parameter]]]:
        """As the base's; the decoder trains at every step."""
        levels = {
            period: [(f"base.{name}", parameter) for name, parameter in members]
            for period, members in self.base.level_parameters().items()
        }
        levels[1] += [(f"decoder.{name}", parameter) for name, parameter in self.decoder.named_parameters()]
        return levels

    def num_parameters(self) -> int:
        """Learnt numbers, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())


def sinusoids(length: int, dim: int) -> Tensor:
    """Sines and cosines of places 0 .. length - 1 at wavelengths from 2 pi to 20,000 pi, (length, dim)."""
    rates = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim]
