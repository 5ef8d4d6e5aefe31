"""The compressor says a sequence from one vector: nothing leaks around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.evaluation.tasks import IGNORED, mark
from nestlearn.evaluation.tasks.compression import Compression, Compressor, sinusoids
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import LevelOptimizer

CONFIG = HopeConfig(vocab_size=7, dim=16, depth=1, heads=2, chunk_size=4)


def sequences(count: int = 3, length: int = 6) -> Tensor:
    return Compression(vocab_size=7, length=length).sample(count, torch.Generator().manual_seed(0)).tokens


def with_hidden(compressor: Compressor, tokens: Tensor, change: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Logits where `change` (B, T, D) is added to what the base gives."""
    handle = compressor.base.register_forward_hook(lambda module, inputs, output: (output[0] + change, output[1]))
    try:
        logits: Tensor = compressor(tokens, lengths=lengths)[0]
    finally:
        handle.remove()
    return logits


@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 1, 4])])
def test_logits_depend_on_the_vector_at_the_last_token_alone(lengths: Tensor | None) -> None:
    compressor, tokens = Compressor(HopeLM(CONFIG)), sequences()
    last = torch.tensor([5, 5, 5]) if lengths is None else lengths - 1
    plain = compressor(tokens, lengths=lengths)[0]
    change = torch.randn(3, 6, 16)
    change[torch.arange(3), last] = 0
    assert torch.equal(with_hidden(compressor, tokens, change, lengths), plain)
    at_last = torch.zeros(3, 6, 16)
    at_last[torch.arange(3), last] = torch.randn(3, 16)
    assert ((with_hidden(compressor, tokens, at_last, lengths) - plain).abs().amax(-1) > 1e-4).all()

    change = torch.zeros(3, 6, 16, requires_grad=True)
    with_hidden(compressor, tokens, change, lengths).sum().backward()
    assert change.grad is not None
    reached = change.grad.abs().sum(-1) > 0
    assert torch.equal(reached, F.one_hot(last, 6).bool())


def test_rows_are_independent_and_the_vector_knows_the_whole_sequence() -> None:
    compressor, tokens = Compressor(HopeLM(CONFIG)), sequences()
    logits, state = compressor(tokens)
    assert logits.shape == (3, 6, 7)
    torch.testing.assert_close(state, compressor.base(tokens)[1])
    torch.testing.assert_close(compressor(tokens[1:2])[0], logits[1:2])
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 6
    changed = (compressor(other)[0] - logits).abs().amax(-1) > 1e-6
    assert changed[0].all()
    assert not changed[1:].any()


def test_padded_rows_are_read_as_without_padding() -> None:
    compressor, tokens = Compressor(HopeLM(CONFIG)), sequences(2)
    lengths = torch.tensor([4, 6])
    logits, state = compressor(tokens, lengths=lengths)
    torch.testing.assert_close(state, compressor.base(tokens, lengths=lengths)[1])
    torch.testing.assert_close(logits[0, :4], compressor(tokens[:1, :4])[0][0])
    torch.testing.assert_close(logits[1], compressor(tokens[1:])[0][0])


@pytest.mark.parametrize("tied", [True, False])
def test_it_trains_at_the_levels_of_its_base(tied: bool) -> None:
    config = HopeConfig(**{**CONFIG.to_dict(), "tie_embeddings": tied, "cms_periods": (1, 3)})
    base = HopeLM(config)
    of_base = base.num_parameters() - (0 if tied else 7 * 16)
    compressor = Compressor(base)
    of_decoder = 3 * 16 + 2 * (16 * 16 + 16) + 16 * 7 + 7
    assert compressor.num_parameters() == of_base + of_decoder
    levels = compressor.level_parameters()
    assert set(levels) == {1, 3}
    assert {name: id(p) for members in levels.values() for name, p in members} == {
        name: id(p) for name, p in compressor.named_parameters()
    }
    assert all(".memory_system.levels.1." in name for name, _ in levels[3])

    optimizer = LevelOptimizer.for_model(compressor, lr=0.1)
    before = {name: p.detach().clone() for name, p in compressor.named_parameters()}
    compressor(sequences())[0].square().mean().backward()
    optimizer.step()
    moved = {name for name, p in compressor.named_parameters() if not torch.equal(p, before[name])}
    assert "decoder.1.weight" in moved
    assert not moved & {name for name, _ in levels[3]}


def test_it_learns_to_say_short_sequences() -> None:
    task = Compression(vocab_size=4, length=4)
    model = Compressor(HopeLM(HopeConfig(vocab_size=4, dim=32, depth=1, heads=1, chunk_size=4, cms_periods=(1,))))
    optimizer = LevelOptimizer.for_model(model, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        examples = task.sample(32, generator)
        logits = model(examples.tokens)[0]
        F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    examples = task.sample(200, generator)
    assert mark(model(examples.tokens)[0], examples.targets).accuracy > 0.9  # chance is 1/3


def test_places_have_the_sines_and_cosines_of_their_wavelengths() -> None:
    table = sinusoids(5, 4)
    place = torch.arange(5.0)
    expected = torch.stack([place.sin(), (place / 100).sin(), place.cos(), (place / 100).cos()], 1)
    torch.testing.assert_close(table, expected)
    assert sinusoids(5, 3).shape == (5, 3)
