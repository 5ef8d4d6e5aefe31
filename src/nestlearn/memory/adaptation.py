"""Weights that learn in context (Eq. 71): each row's own change, and the gradients gathered until its level is due.

A weight W (O, I) of a level is read as W + change P^T, with change (B, O, K): K = I and no P where all of the weight
learns, or a fixed P (I, K) with K directions of its input. Everything here is a pure function of tensors, per row, and
can be differentiated, also through many updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rule = Literal["gd", "dgd", "momentum"]


@dataclass(frozen=True, kw_only=True)
class LearningRule:
    """How a level changes when it is due.

    With g the gradient of the loss summed over the tokens since its last update (Eq. 71), D the change, and c at most 1
    such that the norm of c g over all weights of the level is at most `clip`:

        gd        D <- retention D - lr c g
        momentum  S <- momentum S + c g,  D <- retention D - lr S
        dgd       D <- (retention D - lr c g) (I + lr c G)^-1,  G = sum of x x^T over these tokens, |x| = 1   Eq. 56, 57

    c scales the whole objective of Eq. 56, so also what "dgd" erases: it gives way where its weight was used, what it
    learnt earlier at the same inputs goes as new things are learnt.

    Args:
        lr: learning rate, at least 0; at 0 nothing is gathered and nothing changes.
        rule: "gd", "dgd" or "momentum".
        momentum: in [0, 1), for the rule of that name.
        clip: largest norm of a row's g over a level; None for no bound.
        retention: what an update keeps of the earlier change, in (0, 1]; below 1 a level drifts back to its initial
            weights.

    Raises:
        ValueError: for a number out of range or an unknown rule.
    """

    lr: float
    rule: Rule = "gd"
    momentum: float = 0.9
    clip: float | None = 1.0
    retention: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(map(repr, get_args(Rule)))}; got {self.rule!r}")
        for name, fits, expected in (
            ("lr", 0 <= self.lr < float("inf"), "a number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("clip", self.clip is None or 0 < self.clip < float("inf"), "a positive norm, or None for no bound"),
            ("retention", 0 < self.retention <= 1, "a number above 0 and at most 1"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class FastWeight(NamedTuple):
    """What learns of one weight, for each row on its own; at least fp32.

    Attributes:
        change: (B, O, K).
        gradient: (B, O, K), the sum since the last update.
        velocity: (B, O, K) under "momentum", otherwise None.
        gram: (B, K, K), the sum of x x^T with |x| = 1 since the last update under "dgd", otherwise None.
    """

    change: Tensor
    gradient: Tensor
    velocity: Tensor | None
    gram: Tensor | None

    @staticmethod
    def fresh(
        batch_size: int, outputs: int, width: int, rule: LearningRule, *, device: torch.device, dtype: torch.dtype
    ) -> FastWeight:
        """Before anything is learnt: all zero."""
        empty = torch.zeros(batch_size, outputs, width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return FastWeight(
            empty,
            torch.zeros_like(empty),
            torch.zeros_like(empty) if rule.rule == "momentum" else None,
            empty.new_zeros(batch_size, width, width) if rule.rule == "dgd" else None,
        )

    def gathered(self, gradient: Tensor, inputs: Tensor | None) -> FastWeight:
        """With the gradient (B, O, K) of more tokens, and under "dgd" their inputs (B, T, K)."""
        gram = self.gram
        if gram is not None:
            assert inputs is not None
            unit = torch.nn.functional.normalize(inputs.to(gram.dtype), dim=-1)
            gram = gram + unit.mT @ unit
        return self._replace(gradient=self.gradient + gradient, gram=gram)

    def detach(self) -> FastWeight:
        return FastWeight(*(None if tensor is None else tensor.detach() for tensor in self))  # type: ignore[arg-type]


def read_change(x: Tensor, change: Tensor) -> Tensor:
    """What each row's own change (B, O, K) adds to the output of its weight, x (B, T, K) -> (B, T, O), or (B, K) ->
    (B, O)."""
    return x @ change.mT if x.ndim == 3 else (change @ x[..., None])[..., 0]


def update_level(weights: Mapping[str, FastWeight], rule: LearningRule) -> dict[str, FastWeight]:
    """The weights of a level after an update, with nothing gathered."""
    scale = _clipping(weights, rule.clip)
    return {name: _update(weight, scale, rule) for name, weight in weights.items()}


def _clipping(weights: Mapping[str, FastWeight], clip: float | None) -> Tensor | None:
    """What scales each row's gradient down to the norm, (B, 1, 1)."""
    if clip is None or not weights:
        return None
    square = sum(weight.gradient.square().sum((1, 2)) for weight in weights.values())
    assert isinstance(square, Tensor)
    # The root only where it is above the bound: at zero it has no derivative.
    above = square > clip**2
    return torch.where(above, clip / torch.where(above, square, 1.0).sqrt(), 1.0)[:, None, None]


def _update(weight: FastWeight, scale: Tensor | None, rule: LearningRule) -> FastWeight:
    gradient = weight.gradient if scale is None else scale * weight.gradient
    velocity = weight.velocity
    if velocity is not None:
        gradient = velocity = rule.momentum * velocity + gradient
    change = rule.retention * weight.change - rule.lr * gradient
    gram = weight.gram
    if gram is not None:
        identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        # change (I + lr G)^-1, where the matrix is symmetric.
        change = torch.linalg.solve(identity + rule.lr * (gram if scale is None else scale * gram), change.mT).mT
        gram = torch.zeros_like(gram)
    return FastWeight(change, torch.zeros_like(weight.gradient), velocity, gram)


def advance_levels(
    weights: Mapping[str, FastWeight],
    levels: Mapping[int, tuple[LearningRule, tuple[str, ...]]],
    tokens: int,
    *,
    nested: bool = False,
) -> tuple[dict[str, FastWeight], tuple[int, ...]]:
    """All weights after the levels that are due at a time have changed, the fastest first.

    Args:
        weights: by name.
        levels: by period in tokens: the rule, and the names of the level's weights.
        tokens: how many have been read. A level of period p is due at p, 2 p, 3 p, ...
        nested: whether a level returns to its initial weights once the next slower one has changed: its context ends
            there (Eq. 72).

    Returns:
        the weights, and the periods that were due.
    """
    found = dict(weights)
    due = tuple(period for period in sorted(levels) if tokens > 0 and tokens % period == 0)
    for period in due:
        rule, names = levels[period]
        if rule.lr:
            found |= update_level({name: found[name] for name in names if name in found}, rule)
    if nested:
        for faster, slower in zip(sorted(levels), sorted(levels)[1:], strict=False):
            if slower in due:
                found |= {name: _returned(found[name]) for name in levels[faster][1] if name in found}
    return found, due


def _returned(weight: FastWeight) -> FastWeight:
    return FastWeight(*(None if tensor is None else torch.zeros_like(tensor) for tensor in weight))  # type: ignore[arg-type]
