"""Continual pre-training (Sec. 7.3): a stacked model trained with its updates active, so that its weights learn to be
adapted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from nestlearn.memory.adaptation import LearningRule
from nestlearn.models.in_context import LevelMemory, read
from nestlearn.models.stacking import StackedModel


def pretrain(
    model: StackedModel,
    tokens: Tensor,
    rules: Sequence[LearningRule],
    *,
    steps: int,
    lr: float = 1e-3,
    rows: int = 4,
    length: int = 2048,
    order: Literal[1, 2] = 1,
    window: int = 1024,
    nested: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the base in place on what it loses while its levels learn.

    Each step, every row reads a stretch of the text from the initial weights on, with all updates that are due on the
    way; AdamW (weight decay 0.1, warm-up of a twentieth and a cosine to zero, gradients clipped to norm 1) descends on
    the mean loss of all its tokens.

    Args:
        model: stacked; all parameters of its base are trained.
        tokens: ids (N,) of the text.
        rules: of the levels; a level with lr 0 is trained as plain weights are.
        steps: of AdamW.
        lr: largest learning rate of AdamW.
        rows: stretches a step.
        length: tokens of a stretch; updates with longer periods never happen.
        order: 1 takes what the levels learnt for constants (as first-order MAML does, Finn et al., 1703.03400); 2
            differentiates through the updates. A `HopeLM` with a memory needs backend="torch" for 2.
        window: longest context of a base with attention, in tokens.
        nested: the variant of Eq. 72.
        seed: of the stretches.
        progress: called after each step with their number and the loss.

    Returns:
        the mean loss of each step, in nats per token.

    Raises:
        ValueError: for a number out of range, or a text shorter than a stretch.
        FloatingPointError: if the loss or a gradient is not finite; the weights are those of the step before.
    """
    for name, number in (("steps", steps), ("rows", rows)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not 2 <= length <= len(tokens):
        raise ValueError(f"length: expected 2 to {len(tokens):,} tokens, as many as the text has, got {length:,}")
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 or 2, got {order}")
    parameters = list(model.base.parameters())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - length + 1, (rows,), generator=generator)
        batch = torch.stack([tokens[start : start + length] for start in starts.tolist()]).to(device)
        memory = LevelMemory(model.fresh(rows, rules), rows, 0)
        found = read(model, batch, memory, rules, window=window, nested=nested, order=order)
        loss = found.nats.sum() / (found.predicted * rows)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not math.isfinite(value := float(loss.detach())) or not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"step {step}: loss {value}, gradient norm {float(norm)}; try a smaller lr, here or of the levels"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.step()
        losses.append(value)
        if progress is not None:
            progress(step, value)
    optimizer.zero_grad()
    return losses
