"""The outer loss reaches every memory's initial state, exactly, and from far away without growing."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.evaluation.gradients import opening, outer_gradient
from nestlearn.models.config import HopeConfig, Mixer
from nestlearn.models.hope import HopeLM

MEMORIES = ("key", "value", "rate", "retention", "memory")
MEMORY_MIXERS = ("self_modifying_titans", "titans")
GATES = (0.02, 0.1, 0.5, 0.9)
# Shards short enough that many of them, and several global chunks, fit in the longer text.
SHARDS = {"global_chunk_size": 512, "shard_length": 512}
# What decision 19 allows from T = 128 to T = 8192.
LARGEST_GROWTH = 4.0


def loss_of(model: HopeLM, tokens: Tensor) -> Tensor:
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build(*, random_outer: bool, **settings: Any) -> HopeLM:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "vocab_size": 11,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "chunk_size": 4,
        "gate_hidden_ratio": 1.0,
    }
    model = HopeLM(HopeConfig(**{**tiny, **settings})).double()
    if random_outer:
        with torch.no_grad():
            for block in model.blocks:
                block.mixer.memory.outer.normal_(std=0.3)
    return model


def text_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("settings", [{}, {"momentum": True}, {"retain_to": "zero", "read": "previous"}], ids=str)
@pytest.mark.parametrize("random_outer", [False, True], ids=["W1 zero", "W1 random"])
def test_the_loss_reaches_the_initial_state_of_all_five_memories(random_outer: bool, settings: dict[str, Any]) -> None:
    model = build(random_outer=random_outer, **settings)
    tokens = text_tokens(2, 15)
    loss_of(model, tokens).backward()
    generator = torch.Generator().manual_seed(4)
    for number, block in enumerate(model.blocks):
        memory = block.mixer.memory
        # While W1 is zero nothing depends on the W2 of a memory's own reads; W1 carries the first step.
        kinds = ("inner", "outer") if random_outer else ("outer",)
        for kind in kinds:
            parameter: Tensor = getattr(memory, kind)
            assert parameter.grad is not None
            assert parameter.grad.shape[1] == len(MEMORIES)
            for index, name in enumerate(MEMORIES):
                where = f"block {number}, {name}, {kind}"
                gradient = parameter.grad[:, index]
                assert gradient.norm() > 1e-7, f"{where}: the gradient is zero"
                # The directional derivative along a random direction, by central differences.
                direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
                direction = direction / direction.norm() + gradient / gradient.norm()  # far from orthogonal to it
                expected = finite_difference(model, parameter, index, direction, tokens)
                found = (gradient * direction).sum().item()
                assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), where


def finite_difference(model: HopeLM, parameter: Tensor, index: int, direction: Tensor, tokens: Tensor) -> float:
    """(loss(p + h d) - loss(p - h d)) / 2h, improved twice by Richardson extrapolation: its error falls with h^6."""
    found = []
    with torch.no_grad():
        original = parameter[:, index].clone()
        for step in (8e-6, 4e-6, 2e-6):  # RMSNorm is strongly curved near zero, where a fresh memory reads
            losses = []
            for sign in (1.0, -1.0):
                parameter[:, index] = original + sign * step * direction
                losses.append(loss_of(model, tokens).item())
            found.append((losses[0] - losses[1]) / (2 * step))
        parameter[:, index] = original
    wide, narrow = ((4 * found[i + 1] - found[i]) / 3 for i in (0, 1))
    return (16 * narrow - wide) / 15


def test_at_initialisation_w2_waits_for_w1() -> None:
    model = build(random_outer=False)
    loss_of(model, text_tokens(2, 3)).backward()  # within the first chunk, before anything written is read by W2
    inner = model.blocks[0].mixer.memory.inner.grad
    outer = model.blocks[0].mixer.memory.outer.grad
    assert inner is not None
    assert outer is not None
    projections = slice(None, 4)
    assert inner[:, projections].abs().max() == 0
    assert outer[:, projections].abs().max() > 0


def test_detach_every_cuts_the_gradient_through_writes() -> None:
    whole, cut = (build(random_outer=True, detach_every=every) for every in (None, 1))
    tokens = text_tokens(1, 17)
    for model in (whole, cut):
        logits, _ = model(tokens)
        logits[:, -1].square().sum().backward()  # reads memories written in earlier chunks
    gradients = [model.blocks[0].mixer.gate_bias.grad for model in (whole, cut)]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert not torch.allclose(gradients[0], gradients[1])
    assert torch.equal(whole(tokens)[0], cut(tokens)[0])  # the forward pass does not change


@pytest.fixture(scope="module")
def text() -> Tensor:
    return opening("stdlib", 8193)


GROWTH_CASES = [
    pytest.param({"mixer": mixer, **SHARDS, **({} if gate is None else {"initial_gate": gate})}, id=f"{mixer}-{gate}")
    for mixer in get_args(Mixer)
    for gate in (GATES if mixer in MEMORY_MIXERS else (None,))
]


@pytest.mark.parametrize("settings", GROWTH_CASES)
def test_the_gradient_does_not_grow_with_length(settings: dict[str, Any], text: Tensor) -> None:
    config = HopeConfig(dim=32, depth=2, heads=2, **settings)
    short, long = (outer_gradient(config, text[: length + 1], dtype=torch.float32) for length in (128, 8192))
    assert math.isfinite(long.norm)
    assert long.norm <= LARGEST_GROWTH * short.norm, f"{short.norm:.3g} at T=128, {long.norm:.3g} at T=8192"
    # And it does not vanish: the memories' initial states still hear of the loss.
    assert long.norm > 0.05 * short.norm
