"""Text from a model: the prompt is read in one call, then one token after another with the state carried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.models.hope import HopeLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: choose among the k likeliest tokens; 0 for all.
        top_p: choose among the fewest tokens whose probabilities sum to at least this much, in (0, 1]; 1 for all.
        seed: of the random choice; the same seed and prompt give the same text on the same machine.

    Raises:
        ValueError: for a number out of its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 (always the likeliest token) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected a number of tokens, or 0 for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1 (all tokens), got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `sampling` draws from: logits (..., V) -> probabilities (..., V) that sum to 1.

    Temperature first, then top_k, then top_p. Of equally likely tokens at a border those with smaller numbers stay.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    ordered, order = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[..., sampling.top_k :] = -torch.inf
    p = ordered.softmax(-1)
    p = p * (p.cumsum(-1) - p < sampling.top_p)  # the token that crosses the border still belongs
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


@torch.no_grad()
def generate(model: HopeLM, prompt: Tensor, max_tokens: int, sampling: Sampling | None = None) -> Iterator[Tensor]:
    """Continues a prompt, a token at a time.

    Args:
        model: in evaluation mode, on the prompt's device.
        prompt: (B, T) int64, T at least 1.
        max_tokens: how many to generate, at least 0.
        sampling: `Sampling()` by default.

    Yields:
        (B,) int64, the next token of each row.

    Raises:
        ValueError: if the prompt is empty or max_tokens is negative (when the first token is asked for).
    """
    sampling = sampling or Sampling()
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"prompt: expected at least one token, as (B, T), got shape {tuple(prompt.shape)}; "
            "the model continues a text and cannot begin one"
        )
    if max_tokens < 0:
        raise ValueError(f"max_tokens: expected 0 or more, got {max_tokens}")
    # The choice is made on the CPU, so that a seed means the same on every device.
    random = torch.Generator().manual_seed(sampling.seed)
    logits, state = model(prompt)
    logits = logits[:, -1]
    for made in range(max_tokens):
        token = torch.multinomial(probabilities(logits.cpu(), sampling), 1, generator=random)[:, 0].to(prompt.device)
        yield token
        if made + 1 < max_tokens:
            logits, state = model.decode_step(token, state)


class TextStream:
    """Turns tokens into text as they come, never showing half a character.

    A token may hold a part of a character (bytes do), and some tokenizers write a token differently after another one;
    so each piece is decoded together with the one before it, and one that ends in a half character waits.

    Args:
        decode: ids -> text, where a half character becomes U+FFFD.
    """

    # Longer than any UTF-8 character in bytes: what is no text by then never will be.
    LONGEST_WAIT = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that the token completes, perhaps empty."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._waiting) < self.LONGEST_WAIT:
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """What is still waiting."""
        text = self._new_text()
        self._context, self._waiting = [], []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._waiting)[len(before) :] if self._waiting else ""
