"""The steps that are timed: a training step, the reading of a prompt, and the decoding of a token.

What each must move, in fp32 and at least (`Needs.bytes`), with P parameters and A the inputs and outputs of all linear
layers for one token:

- train: 10 P for the parameters (read in both passes, the gradient written; AdamW reads weight, gradient and two
  moments and writes three), and 3 A a token: forward once, backward once themselves and once as gradients.
- prefill: P, and A a token.
- decode: P, and of the state whatever a token reads once and whatever it changes twice; of a cache the tokens in it.

All that happens between two linear layers may in principle stay in caches and counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.evaluation.benchmarks.context import context_of, megabytes
from nestlearn.evaluation.benchmarks.machine import Needs
from nestlearn.evaluation.benchmarks.settings import Kind, ModelBenchmark
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import LevelOptimizer

FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step of one candidate, ready to run.

    Attributes:
        step: runs it.
        tokens: read by a step, in all rows together.
        needs: what it must compute and move.
        facts: what a reader of its row should know besides, plain JSON types.
        begin: called before each turn, untimed.
    """

    step: Callable[[], None]
    tokens: int
    needs: Needs
    facts: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[], None] = lambda: None


def build_model(config: HopeConfig, settings: ModelBenchmark) -> HopeLM:
    """The model on its device; the same seed for all."""
    torch.manual_seed(settings.seed)
    return HopeLM(config).to(settings.torch_device)


def make_work(kind: Kind, model: HopeLM, batch: int, tokens: int, *, room: int = 1) -> Work:
    """The step of one model.

    Args:
        kind: which.
        model: on its device.
        batch: B.
        tokens: T; for "decode" the tokens that the state has read before.
        room: tokens that are decoded in a turn at most.
    """
    if kind == "train":
        optimizer = LevelOptimizer.for_model(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
        return training_work(model, batch, tokens, optimizer)
    if kind == "prefill":
        return _prefill(model, batch, tokens)
    return _decoding(model, batch, tokens, room)


def training_work(model: HopeLM, batch: int, tokens: int, optimizer: torch.optim.Optimizer) -> Work:
    """A training step under an optimizer of the model's parameters."""
    inputs, targets = _random_tokens(model, 2, batch, tokens)

    def step() -> None:
        optimizer.zero_grad()
        logits, _ = model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    count = batch * tokens
    moved = FLOAT * (10 * model.num_parameters() + 3 * count * _crossing(model))
    # A backward pass costs twice its forward pass.
    return Work(step=step, tokens=count, needs=_needs(model, 3 * count, model.flops_per_token(tokens), moved))


def _prefill(model: HopeLM, batch: int, tokens: int) -> Work:
    (inputs,) = _random_tokens(model, 1, batch, tokens)

    @torch.no_grad()
    def step() -> None:
        model(inputs)

    count = batch * tokens
    moved = FLOAT * (model.num_parameters() + count * _crossing(model))
    return Work(step=step, tokens=count, needs=_needs(model, count, model.flops_per_token(tokens), moved))


def _decoding(model: HopeLM, batch: int, tokens: int, room: int) -> Work:
    context = context_of(model, batch, tokens, room=room)
    token = _random_tokens(model, 1, batch, 1)[0, :, 0]
    state = context.state

    def begin() -> None:
        nonlocal state
        state = context.rewound(state)

    def step() -> None:
        nonlocal state
        _, state = model.decode_step(token, state)

    before = {name: x.clone() for name, x in state.items() if name not in context.growing}
    step()
    changed = {name: x for name, x in before.items() if not torch.equal(x, state[name])}
    moved = 1e6 * (megabytes(before) + megabytes(changed) + context.cache_megabytes)
    begin()
    return Work(
        step=step,
        tokens=batch,
        needs=_needs(model, batch, model.decode_flops(tokens), FLOAT * model.num_parameters() + moved),
        facts={"state_megabytes": megabytes(before) + context.cache_megabytes, "state_made_by": context.made_by},
        begin=begin,
    )


def _needs(model: HopeLM, tokens: float, flops: float, moved: float) -> Needs:
    linear = model.linear_flops()
    return Needs(linear_flops=tokens * linear, mixer_flops=tokens * (flops - linear), bytes=moved)


def _crossing(model: HopeLM) -> int:
    """A: inputs and outputs of all linear layers, numbers a token."""
    return sum(m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def _random_tokens(model: HopeLM, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape).to(model.embedding.weight.device)
