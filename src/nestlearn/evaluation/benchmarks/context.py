"""The state of a long context, made cheaply for decoding.

A memory reads one row of random tokens in pieces, and the row is repeated: exactly the state of a prompt. A cache that
grows with the tokens is filled with random numbers instead, because attention would need hours to read what it holds;
the time of a step does not depend on the numbers. Room for the tokens of a turn is kept free, so no step that is timed
has to enlarge the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.models import HopeLM

State = dict[str, Tensor]

PIECE = 1024  # tokens that are read at once


@dataclass(frozen=True, kw_only=True)
class Context:
    """A state that has seen a number of tokens.

    Attributes:
        state: named tensors (B, ...).
        tokens: how many it has seen.
        growing: those tensors whose size grows with the tokens, and the dimension that does.
        made_by: "reading" or "random numbers".
        cache_megabytes: what the growing ones hold, spare room left out.
    """

    state: State
    tokens: int
    growing: Mapping[str, int]
    made_by: str
    cache_megabytes: float

    def rewound(self, state: State) -> State:
        """A state that went on, set back to `tokens` if its cache grows; other states cost the same anywhere."""
        if not self.growing:
            return state
        return {name: torch.full_like(x, self.tokens) if _counts(name) else x for name, x in state.items()}


@torch.no_grad()
def context_of(model: HopeLM, batch: int, tokens: int, *, room: int = 1) -> Context:
    """A context of random tokens.

    Args:
        model: reads them.
        batch: B, rows.
        tokens: T, at least 1.
        room: tokens that will be decoded from here before it is rewound.
    """
    growing = growing_tensors(model)
    if not growing:
        state = model.init_state(1)
        for piece in _random_tokens(model, tokens).split(PIECE, dim=1):
            _, state = model(piece, state)
        whole = {name: x.repeat_interleave(batch, dim=0) for name, x in state.items()}
        return Context(state=whole, tokens=tokens, growing={}, made_by="reading", cache_megabytes=0.0)
    _, state = model(_random_tokens(model, 8), model.init_state(1))
    held = 0.0
    for name, x in state.items():
        shape = [batch, *x.shape[1:]]
        if name in growing:
            shape[growing[name]] = tokens
            held += torch.Size(shape).numel() * x.element_size() / 1e6
            shape[growing[name]] += room + 1
            state[name] = x.new_empty(shape).normal_()
        else:
            state[name] = x.new_full(shape, tokens) if _counts(name) else x.repeat_interleave(batch, dim=0)
    return Context(state=state, tokens=tokens, growing=growing, made_by="random numbers", cache_megabytes=held)


def growing_tensors(model: HopeLM) -> dict[str, int]:
    """Tensors of the state whose size depends on the tokens read: name -> the dimension that grows."""
    with torch.no_grad():
        before, (_, after) = model.init_state(1), model(_random_tokens(model, 8))
    return {
        name: next(i for i, (a, b) in enumerate(zip(x.shape, before[name].shape, strict=True)) if a != b)
        for name, x in after.items()
        if x.shape != before[name].shape
    }


def megabytes(tensors: Mapping[str, Tensor]) -> float:
    """Size of the tensors, in units of 1e6 bytes."""
    return sum(x.numel() * x.element_size() for x in tensors.values()) / 1e6


def _counts(name: str) -> bool:
    """Whether a tensor of the state counts the tokens that its cache holds."""
    return name.endswith(".position")


def _random_tokens(model: HopeLM, tokens: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, tokens)).to(model.embedding.weight.device)
