"""Ways to go on learning: each learns what it reads, touches only what it may, and is what its paper says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn import ContinualLearner, HopeConfig, HopeLM, stack_levels
from nestlearn.continual.methods import (
    EWC,
    FineTuning,
    Frozen,
    InContext,
    Levels,
    LoRA,
    Method,
    Replay,
    domain_losses,
    pieces,
    run_stream,
)

SIZES: dict[str, int] = {"segment": 16, "window": 32}


def base(seed: int = 0) -> HopeLM:
    torch.manual_seed(seed)
    config = HopeConfig.transformer(vocab_size=32, dim=16, depth=2, heads=2)
    return HopeLM(config).eval()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def domain(seed: int, length: int = 120) -> Tensor:
    """A short phrase again and again."""
    phrase = torch.randint(32, (8,), generator=torch.Generator().manual_seed(seed))
    return phrase.repeat(-(-length // 8))[:length]


def make(name: str, model: nn.Module) -> Method:
    if name == "levels":
        return Levels(ContinualLearner(stack_levels(model, (16, 48), notice=None), lr=0.5, window=32))
    if name == "in context":
        return InContext(model, window=32)
    if name == "frozen":
        return Frozen(model, window=32)
    if name == "ewc":
        return EWC(model, sgd, strength=1.0, **SIZES)
    if name == "replay":
        return Replay(model, sgd, capacity=4, **SIZES)
    if name == "lora":
        pytest.importorskip("peft", reason="peft comes with the extra `baselines`")
        return LoRA(model, sgd, rank=4, targets=("up", "down"), **SIZES)
    return FineTuning(model, sgd, **SIZES)


NAMES = ("levels", "in context", "fine-tuning", "ewc", "replay", "lora", "frozen")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_learns_what_it_reads_and_leaves_the_base(name: str) -> None:
    model = base()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    method, text = make(name, model), domain(1)
    untouched = Frozen(base(), window=32).loss(text)
    if name != "lora":  # whose additions start at zero, up to rounding
        assert name == "in context" or method.loss(text) == untouched
    for _ in range(4):
        method.observe(text)
    method.end_domain()
    learnt = method.loss(text)
    assert method.loss(text) == learnt  # asking teaches nothing
    if name == "in context":  # an untrained base makes nothing of it
        assert learnt != untouched
    else:
        assert learnt == untouched if name == "frozen" else learnt < untouched - 0.1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_loss_of_a_frozen_model_is_that_of_its_windows() -> None:
    model, text = base(), domain(3, 32)
    with torch.no_grad():
        expected = F.cross_entropy(model(text[None])[0][0, :-1], text[1:])
    assert Frozen(model, window=64).loss(text) == pytest.approx(float(expected), rel=1e-5)


def test_in_context_only_has_half_a_window_of_what_was_read() -> None:
    model, text = base(), domain(3, 40)
    method = InContext(model, window=32)
    method.observe(torch.arange(10))
    method.observe(torch.arange(10, 20))
    assert method.recent.tolist() == list(range(4, 20))
    short = text[:14]
    with torch.no_grad():
        logits = model(torch.cat([method.recent, short[:-1]])[None])[0][0, 16:]
    assert method.loss(short) == pytest.approx(float(F.cross_entropy(logits, short[1:])), rel=1e-4)
    assert method.loss(text) != Frozen(model, window=32).loss(text)
    with pytest.raises(ValueError, match="at least two tokens"):
        method.loss(text[:1])


def test_fine_tuning_is_gradient_descent_on_segments() -> None:
    model, text = base(), domain(2, 40)
    method = FineTuning(model, sgd, **SIZES)
    method.observe(text)
    plain = copy.deepcopy(model)
    optimizer = sgd(plain.parameters())
    for start in (0, 16, 32):
        piece = text[start : start + 17]
        optimizer.zero_grad()
        F.cross_entropy(plain(piece[None, :-1])[0][0], piece[1:]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for n, parameter in method.model.named_parameters():
        torch.testing.assert_close(parameter, dict(plain.named_parameters())[n])


def test_ewc_holds_what_earlier_domains_need() -> None:
    text, other = domain(1), domain(2)
    free, held = EWC(base(), sgd, strength=0.0, **SIZES), EWC(base(), sgd, strength=0.5, **SIZES)
    plain = FineTuning(base(), sgd, **SIZES)
    for method in (free, held, plain):
        for _ in range(4):
            method.observe(text)
        method.end_domain()
    for a, b, c in zip(free.trained, held.trained, plain.trained, strict=True):
        assert torch.equal(a, b)  # nothing to hold yet
        assert torch.equal(a, c)
    gradients = [torch.autograd.grad(held.mean_loss(p), held.trained, allow_unused=True) for p in pieces(text, 16) * 4]
    expected = sum(g[0].square() for g in gradients) / len(gradients)
    torch.testing.assert_close(held.fisher[0], expected)
    assert torch.equal(held.objective(pieces(text, 16)[0]), held.mean_loss(pieces(text, 16)[0]))  # at the anchor
    for method in (free, held):
        method.observe(other)
    moved = [
        sum(float((f * (p.detach() - a).square()).sum()) for f, p, a in zip(m.fisher, m.trained, m.anchor, strict=True))
        for m in (free, held)
    ]
    assert moved[1] < moved[0]


def test_replay_keeps_a_bounded_uniform_sample() -> None:
    method = Replay(base(), sgd, capacity=3, **SIZES)
    for seed in range(6):
        method.observe(domain(seed))
    assert len(method.kept) == 3
    assert method._seen == 6 * 8
    counts = torch.zeros(6)
    for seed in range(200):
        sample = Replay(base(), lambda p: torch.optim.SGD(p, lr=0.0), capacity=2, segment=1, window=8, seed=seed)
        sample.mean_loss = lambda piece: torch.zeros((), requires_grad=True)  # type: ignore[method-assign]
        for i in range(6):
            sample.objective(torch.tensor([i, i]))
        for kept in sample.kept:
            counts[kept[0]] += 1
    assert counts.sum() == 400
    assert (counts / 400 - 1 / 6).abs().max() < 0.06


def test_lora_trains_its_additions_alone() -> None:
    pytest.importorskip("peft", reason="peft comes with the extra `baselines`")
    method = LoRA(base(), sgd, rank=2, targets=("up", "down"), **SIZES)
    kept = {n: p.clone() for n, p in method.model.named_parameters() if not p.requires_grad}
    method.observe(domain(1))
    assert kept
    assert all("lora_" in n for n, p in method.model.named_parameters() if p.requires_grad)
    assert all(torch.equal(p, kept[n]) for n, p in method.model.named_parameters() if not p.requires_grad)


def test_a_stream_gives_a_row_before_and_after_each_domain() -> None:
    texts = [[domain(seed)] for seed in (1, 2)]
    tests = [*texts, [domain(7), domain(8, 60)]]
    rows = list(run_stream(make("fine-tuning", base()), texts, tests))
    assert [len(row) for row in rows] == [3, 3, 3]
    assert rows[0] == domain_losses(Frozen(base(), window=32), tests)
    assert rows[1][0] < rows[0][0]
    assert rows[2][1] < rows[1][1]
    a, b = (Frozen(base(), window=32).loss(text) for text in tests[2])
    assert rows[0][2] == pytest.approx((a * 119 + b * 59) / 178)
