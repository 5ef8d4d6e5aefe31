"""What training keeps for the backward pass, counted in numbers a token and layer."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.functional.kernels.native import elementwise, unavailable
from nestlearn.models import HopeConfig, HopeLM

DIM, HEADS, BATCH = 64, 2, 2


def kept(config: HopeConfig, tokens: int) -> float:
    """Numbers that autograd keeps of a batch, storages that are shared counted once, parameters not at all."""
    model = HopeLM(config)
    text = torch.randint(config.vocab_size, (BATCH, tokens))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[Tensor] = []
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(x)  # or its place could be taken by another
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits, _ = model(text)
        loss = F.cross_entropy(logits.flatten(0, 1), text.flatten())
    del loss
    return sum(sizes.values()) / 4


def per_token_and_layer(make: type[HopeConfig] | object) -> float:
    """Of the blocks alone, and of what grows with the text alone."""
    few, many = 128, 384
    grown = [
        kept(make(dim=DIM, heads=HEADS, depth=depth), many) - kept(make(dim=DIM, heads=HEADS, depth=depth), few)  # type: ignore[operator]
        for depth in (1, 2)
    ]
    return (grown[1] - grown[0]) / (BATCH * (many - few))


@pytest.mark.skipif(unavailable() is not None or not elementwise.available(), reason="no C++ compiler here")
def test_of_hope() -> None:
    # The layer's input and its norm, the streams before their convolution, what the heads read and its gate; of both
    # CMS levels the input and what goes into gelu.
    activations = (2 + 4 + 2 + 2 * (1 + 2)) * DIM
    config = HopeConfig(dim=DIM, heads=HEADS)
    hidden = HopeLM(config).blocks[0].mixer.memory.hidden  # type: ignore[union-attr]
    memories = HEADS * max(hidden) * len(hidden) * 2 * (DIM // HEADS) / config.chunk_size
    assert per_token_and_layer(HopeConfig) <= activations + memories + 1


def test_of_the_transformer() -> None:
    # The layer's input and its norm; values as part of all projections, turned queries and keys, what the heads read
    # and one number each; the MLP's input and what goes into gelu.
    expected = (2 + 3 + 2 + 1 + 1 + 4) * DIM + HEADS + DIM // HEADS  # the angles' table, once for all rows
    assert per_token_and_layer(HopeConfig.transformer) <= expected
