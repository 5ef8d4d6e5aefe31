"""`ContinuumMemory.adapt` (Eq. 71, 72): against plain descent of a copy for each row, and its properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.memory.adaptation import LearningRule
from nestlearn.memory.continuum import AdaptedLevels, ContinuumMemory

PERIODS = (2, 3, 6)
RULES = (LearningRule(lr=0.05, clip=None), LearningRule(lr=0.05, clip=0.5, retention=0.9), LearningRule(lr=0.1))


def memory_system(variant: Any, level: Any = "mlp") -> ContinuumMemory:
    torch.manual_seed(0)
    return ContinuumMemory(4, periods=PERIODS, expansion=2.0, variant=variant, kind=level).double()


def inputs(length: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, goal = (torch.randn(rows, length, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, goal


def distance(goal: Tensor) -> Any:
    return lambda y, start: (y - goal[:, start : start + y.shape[1]]).square().sum((1, 2))


def by_descent(model: ContinuumMemory, x: Tensor, goal: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One row (T, D), token by token: the outputs and the changes of a copy whose own parameters descend."""
    own = copy.deepcopy(model)
    initial = {name: p.detach().clone() for name, p in own.named_parameters()}
    weights = {n.removesuffix(".weight"): p for n, p in own.named_parameters() if p.ndim == 2}
    gathered = {name: torch.zeros_like(p) for name, p in weights.items()}
    outputs = []
    for t in range(len(x)):
        y = own(x[None, t : t + 1])
        outputs.append(y[0].detach())
        loss = (y[0, 0] - goal[t]).square().sum()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            gathered[name] += gradient
        due = [i for i, period in enumerate(PERIODS) if (t + 1) % period == 0]
        with torch.no_grad():
            for i in due:
                names = [n for n in weights if n.startswith(f"levels.{i}.")]
                norm = sum(gathered[n].square().sum() for n in names) ** 0.5
                scale = 1.0 if RULES[i].clip is None else min(1.0, RULES[i].clip / float(norm))
                for n in names:
                    start = initial[f"{n}.weight"]
                    kept = RULES[i].retention * (weights[n] - start)
                    weights[n].copy_(start + kept - RULES[i].lr * scale * gathered[n])
                    gathered[n].zero_()
            for i in due:
                if model.variant == "nested" and i > 0:
                    for n in (n for n in weights if n.startswith(f"levels.{i - 1}.")):
                        weights[n].copy_(initial[f"{n}.weight"])
                        gathered[n].zero_()
    return torch.cat(outputs), {n: w.detach() - initial[f"{n}.weight"] for n, w in weights.items()}


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
@pytest.mark.parametrize("level", ["mlp", "gated"])
@pytest.mark.parametrize("length", [1, 5, 6, 20])
def test_it_is_gradient_descent_of_a_copy_for_each_row(variant: str, level: str, length: int) -> None:
    model = memory_system(variant, level)
    x, goal = inputs(length)
    y, found = model.adapt(x, distance(goal), model.unadapted(2, RULES), RULES)
    assert found.tokens == length
    assert y.isfinite().all()
    for row in range(2):
        outputs, changes = by_descent(model, x[row], goal[row])
        torch.testing.assert_close(y[row], outputs, rtol=1e-11, atol=1e-11)
        for name, change in changes.items():
            torch.testing.assert_close(found.weights[name].change[row], change, rtol=1e-11, atol=1e-11)
    assert length < 2 or any(weight.change.any() for weight in found.weights.values())


def test_a_split_is_the_whole_and_nothing_given_changes() -> None:
    model = memory_system("sequential")
    x, goal = inputs(20)
    rules = tuple(LearningRule(lr=0.2, rule="dgd") for _ in PERIODS)
    fresh = model.unadapted(2, rules)
    whole, after = model.adapt(x, distance(goal), fresh, rules)
    assert not any(weight.change.any() for weight in fresh.weights.values())
    first, between = model.adapt(x[:, :7], distance(goal), fresh, rules)
    second, later = model.adapt(x[:, 7:], distance(goal[:, 7:]), between, rules)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    for name, weight in after.weights.items():
        torch.testing.assert_close(later.weights[name].change, weight.change, rtol=1e-12, atol=1e-12)
        assert weight.gram is not None


def test_an_output_depends_on_no_later_token_and_no_other_row() -> None:
    model = memory_system("sequential")
    x, goal = inputs(20)
    fresh = model.unadapted(2, RULES)
    y, _ = model.adapt(x, distance(goal), fresh, RULES)
    other, aim = x.clone(), goal.clone()
    other[0, 11:] += 1
    aim[0, 11:] -= 1
    z, _ = model.adapt(other, distance(aim), fresh, RULES)
    assert torch.equal(y[0, :11], z[0, :11])
    assert torch.equal(y[1], z[1])
    assert not torch.equal(y[0, 11:], z[0, 11:])


def test_a_level_with_rate_zero_stays_and_the_module_is_as_it_was() -> None:
    model = memory_system("sequential")
    before = copy.deepcopy(model.state_dict())
    x, goal = inputs(12)
    still = tuple(LearningRule(lr=0.0) for _ in PERIODS)
    y, found = model.adapt(x, distance(goal), model.unadapted(2, still), still)
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-12, atol=1e-12)
    assert found == AdaptedLevels({}, 12)
    model.adapt(x, distance(goal), model.unadapted(2, RULES), RULES)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="3 levels, got 1"):
        model.adapt(x, distance(goal), model.unadapted(2, RULES), RULES[:1])
