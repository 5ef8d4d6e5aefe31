"""Small models of every mixer for the tests of `nestlearn.hub`, and text for them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from nestlearn.hub import HopeConfig, HopeForCausalLM
from nestlearn.models.config import Mixer

MIXERS = get_args(Mixer)
VOCABULARY = 48


def small_config(mixer: str, **settings: Any) -> HopeConfig:
    """Two blocks with chunks of four, so that a few tokens cross several."""
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "depth": 2, "heads": 2, "chunk_size": 4, "tie_embeddings": False}
    tnt = {"global_chunk_size": 8, "local_chunk_sizes": (4,), "shard_length": 8, "global_stride": 2}
    return HopeConfig(mixer=mixer, **{**sizes, **tnt, **settings})


def small_model(mixer: str, **settings: Any) -> HopeForCausalLM:
    """A model whose choices are clear: far from its first weights, where all tokens are nearly as likely."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = HopeForCausalLM(small_config(mixer, **settings)).eval()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask (B, T), filled up with zeros on one side."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, into, held in zip(rows, ids, mask, strict=True):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        into[place], held[place] = row, 1
    return ids, mask
