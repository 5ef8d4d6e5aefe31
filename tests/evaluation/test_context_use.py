"""Loss by position: against a model whose loss is known at every place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nestlearn.continual.learner import ContinualLearner
from nestlearn.evaluation.context_use import learning_reader, loss_by_position
from nestlearn.memory.adaptation import LearningRule
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.stacking import StackedModel, stack_levels
from nestlearn.training.data import IGNORED, PackedTokens
from nestlearn.training.tokenizers import load_tokenizer

TOKENS = 256


class Counting(nn.Module):
    """Gives every token but "a" the logit 0, and "a" the square root of how many tokens its context has."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, *, document_starts: Tensor | None = None) -> tuple[Tensor, None]:
        assert not self.training
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        if document_starts is not None:
            place = place - torch.where(document_starts, place, 0).cummax(1).values
        logits = torch.zeros(*tokens.shape, TOKENS)
        logits[..., ord("a")] = (1.0 + place).sqrt()
        return logits, None


def bits(count: int) -> float:
    return math.log2(1 + (TOKENS - 1) * math.exp(-math.sqrt(count)))


def packed(texts: list[str], length: int) -> PackedTokens:
    return PackedTokens.from_texts(texts, load_tokenizer("bytes"), sequence_length=length)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_and_gains_are_those_of_the_positions(batch_size: int) -> None:
    model = Counting().train()
    found = loss_by_position(model, packed(["a" * 161], 32), fresh_every=8, max_tokens=10**6, batch_size=batch_size)
    assert model.training
    assert [(s.begin, s.end) for s in found] == [(0, 8), (8, 16), (16, 32)]
    for stretch in found:
        places = range(stretch.begin, stretch.end)
        long = sum(bits(1 + place) for place in places) / len(places)
        short = sum(bits(1 + place % 8) for place in places) / len(places)
        assert stretch.bits == pytest.approx(long, abs=1e-5)
        assert stretch.gain == pytest.approx(short - long, abs=1e-5)
        assert stretch.error == pytest.approx(0, abs=1e-6)  # all windows are alike
    assert found[0].gain == 0
    assert found[2].gain > found[1].gain > 0.1


def test_windows_in_which_a_document_ends_are_passed_over() -> None:
    whole = loss_by_position(Counting(), packed(["a" * 97], 32), fresh_every=16, max_tokens=10**6)
    # The third window has the end of the first text in it, and another text whose bytes cost far more.
    mixed = loss_by_position(Counting(), packed(["a" * 80, "z" * 10, "a" * 64], 32), fresh_every=16, max_tokens=10**6)
    assert [s.bits for s in mixed] == pytest.approx([s.bits for s in whole])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two times fresh_every, got 32 and 12"):
        loss_by_position(Counting(), packed(["a" * 99], 32), fresh_every=12, max_tokens=99)
    with pytest.raises(ValueError, match="power of two times fresh_every, got 32 and 32"):
        loss_by_position(Counting(), packed(["a" * 99], 32), fresh_every=32, max_tokens=99)
    with pytest.raises(ValueError, match="two windows of 32 tokens within documents"):
        loss_by_position(Counting(), packed(["a" * 40], 32), fresh_every=16, max_tokens=99)


def small_hope() -> StackedModel:
    torch.manual_seed(0)
    return stack_levels(HopeLM(HopeConfig(dim=16, depth=1, heads=2, chunk_size=4)), (8, 16), notice=None)


def test_windows_read_by_levels_at_rest_are_those_of_the_model() -> None:
    model, text = small_hope(), packed(["the same words and the same words again, " * 5], 32)
    rest = [LearningRule(lr=0.0)] * 2
    found = loss_by_position(
        model.base, text, fresh_every=8, max_tokens=10**6, reader=learning_reader(model, rest, window=64)
    )
    for own, expected in zip(found, loss_by_position(model.base, text, fresh_every=8, max_tokens=10**6), strict=True):
        assert own.bits == pytest.approx(expected.bits, abs=1e-5)
        assert own.gain == pytest.approx(expected.gain, abs=1e-5)


def test_levels_learn_from_the_windows_that_they_read_each_from_the_beginning() -> None:
    model, text = small_hope(), packed(["the same words and the same words again, " * 5], 32)
    rules = [LearningRule(lr=0.3)] * 2
    reader = learning_reader(model, rules, window=64)
    (batch,) = text.evaluation_batches(16)
    tokens, targets = batch.tokens[:3], batch.targets[:3]
    bits = reader(tokens, targets)
    assert bits.shape == tokens.shape
    for row in range(3):
        learner = ContinualLearner(model, lr=0.3, window=64)
        learnt = learner.observe(torch.cat([tokens[row], targets[row, -1:]]))
        assert learnt.updates == (4, 2)
        assert bits[row].mean().item() * math.log(2) == pytest.approx(learnt.loss, abs=1e-5)
    at_rest = learning_reader(model, [LearningRule(lr=0.0)] * 2, window=64)(tokens, targets)
    assert torch.allclose(bits[:, :7], at_rest[:, :7], atol=1e-5)  # nothing is learnt before the first period is full
    assert bits[:, 16:].mean() < at_rest[:, 16:].mean() - 0.01
    windows = loss_by_position(model.base, text, fresh_every=8, max_tokens=10**6, batch_size=16, reader=reader)
    assert windows[-1].bits == pytest.approx(reader(*_whole(text))[:, 16:].mean().item(), abs=1e-5)


def _whole(text: PackedTokens) -> tuple[Tensor, Tensor]:
    """The windows in which no document ends."""
    (batch,) = text.evaluation_batches(16)
    inside = ~(batch.document_starts[:, 1:].any(1) | (batch.targets == IGNORED).any(1))
    return batch.tokens[inside], batch.targets[inside]
