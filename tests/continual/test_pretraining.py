"""Continual pre-training: its gradients against an oracle, and that it does what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.continual.pretraining import pretrain
from nestlearn.memory.adaptation import LearningRule
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.in_context import LevelMemory, read, segments
from nestlearn.models.stacking import StackedModel, stack_levels

RULES = (LearningRule(lr=0.3), LearningRule(lr=0.2, rule="dgd"))


def stacked(dtype: torch.dtype = torch.float64, **settings: Any) -> StackedModel:
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=41, dim=16, depth=2, heads=2, cms_periods=(1, 4), chunk_size=4, **settings)
    return stack_levels(HopeLM(config).to(dtype), (4, 8), strategy="whole_depth", notice=None)


def tokens(*shape: int) -> Tensor:
    return torch.randint(41, shape, generator=torch.Generator().manual_seed(0))


def start(model: StackedModel, rows: int) -> LevelMemory:
    return LevelMemory(model.fresh(rows, RULES), rows, 0)


@pytest.mark.parametrize(
    "settings", [{}, {"backend": "torch"}, {"mixer": "attention"}], ids=["auto", "torch", "attention"]
)
def test_first_order_gradients_are_those_of_reading_with_constant_changes(settings: dict[str, Any]) -> None:
    model = stacked(**settings)
    text = tokens(2, 21)
    found = read(model, text, start(model, 2), RULES, window=64, order=1)
    found.nats.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.base.named_parameters() if p.grad is not None}
    model.base.zero_grad()
    weights, context, place, losses = start(model, 2).weights, None, 0, []
    for part in segments(model, text, start(model, 2), RULES, window=64):
        stop = place + part.tokens
        fed, targets = text[:, max(place - 1, 0) : stop - 1], text[:, max(place, 1) : stop]
        logits, context = model(fed, weights, context)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        weights, place = part.memory.weights, stop
    torch.stack(losses).sum().backward()
    assert len(gradients) == len(list(model.base.parameters()))
    for name, parameter in model.base.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_read_with_updates_is_predicted_better_afterwards(order: Any) -> None:
    model = stacked(torch.float32, mixer="attention")
    pattern = tokens(16).repeat(40)
    shown: list[tuple[int, float]] = []
    losses = pretrain(model, pattern, RULES, steps=12, lr=5e-3, rows=2, length=24, order=order,
                      progress=lambda step, loss: shown.append((step, loss)))  # fmt: skip
    assert losses[-1] < losses[0] - 0.2
    assert shown == list(enumerate(losses, start=1))
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_it_is_the_same_every_time_and_says_what_does_not_fit() -> None:
    found = []
    for _ in range(2):
        model = stacked(torch.float32)
        pretrain(model, tokens(200), RULES, steps=3, rows=2, length=20, seed=5)
        found.append(copy.deepcopy(model.base.state_dict()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    model = stacked(torch.float32)
    with pytest.raises(ValueError, match="expected 2 to 200 tokens"):
        pretrain(model, tokens(200), RULES, steps=1, length=201)
    with pytest.raises(ValueError, match="order: expected 1 or 2, got 0"):
        pretrain(model, tokens(200), RULES, steps=1, length=20, order=0)  # type: ignore[arg-type]
    before = copy.deepcopy(model.base.state_dict())
    with torch.no_grad():
        model.base.embedding.weight[0] = float("nan")  # type: ignore[index, union-attr]
    before["embedding.weight"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1"):
        pretrain(model, torch.zeros(50, dtype=torch.long), RULES, steps=1, length=20)
    for name, tensor in model.base.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
