"""Deep momentum (DMGD, Eq. 50): the memory of gradients is an MLP, and a weight moves by what it says to a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nestlearn.functional.surprise import mlp_error_surprise
from nestlearn.optim.momentum import as_matrix
from nestlearn.optim.shell import MemoryOptimizer, NonFinite, apply_update, need, sharded_like, whole

Objective = Literal["regression", "dot"]


def deep_memory_read(outer: Tensor, inner: Tensor, keys: Tensor) -> Tensor:
    """m(u) = W1 silu(W2 u) for each row u of keys.

    Args:
        outer: W1 (..., columns, hidden).
        inner: W2 (..., hidden, columns).
        keys: (..., rows, columns).

    Returns:
        (..., rows, columns).
    """
    return torch.nn.functional.silu(keys @ inner.mT) @ outer.mT


def deep_memory_write(
    outer: Tensor, inner: Tensor, keys: Tensor, *, decay: float, rate: float, objective: Objective = "regression"
) -> tuple[Tensor, Tensor]:
    """m <- alpha m - zeta grad L(m) for the MLP memory, in closed form (Eq. 50).

    Args:
        outer: W1 (..., columns, hidden).
        inner: W2 (..., hidden, columns).
        keys: u (..., rows, columns), one key a row.
        decay: alpha.
        rate: zeta.
        objective: L, a mean over rows: "dot", <m(u), 1> as the paper has it; "regression", 1/2 |m(u) + u|^2 (the L2
            objective of Eq. 48 with the target -u), under which the memory learns to say what moves W downhill.

    Returns:
        The new W1 and W2.
    """
    z = keys @ inner.mT
    hidden = torch.nn.functional.silu(z)
    error = torch.ones_like(keys) if objective == "dot" else hidden @ outer.mT + keys
    found = mlp_error_surprise(outer, keys, z, hidden, error, bound=None, scale=1 / keys.shape[-2])
    # A surprise is a pair of key and minus the error: the gradient is -value key^T.
    new_outer = decay * outer + rate * found.outer.value.mT @ found.outer.key
    return new_outer, decay * inner + rate * found.inner.value.mT @ found.inner.key


class DeepMomentum(MemoryOptimizer):
    """DMGD (Eq. 50): W <- W + lr m(u), where the MLP m is itself trained on the gradients u, at every step.

    Each matrix has a memory of its own, whose keys are the rows of the gradient, scaled together to a root mean square
    norm of 1: neither the memory nor the step depends on the gradient's scale. What it says is scaled by the root of
    the number of columns, so that a memory that knows a gradient moves W by lr times that gradient over its root mean
    square. W1 starts at zero: a memory that has seen nothing says nothing. W2 starts at twice a fixed orthogonal
    matrix, which keeps norms and angles (near zero silu halves its input).

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate.
        momentum: alpha, of the memory, from 0 to 1. It decays both maps, so below 1 a memory dies out in the end.
        rate: zeta, of the memory.
        hidden: width of the MLP.
        objective: "regression" or "dot", see `deep_memory_write`.
        weight_decay: times `lr`, apart from the step.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 1.0,
        rate: float = 0.5,
        hidden: int = 32,
        objective: Objective = "regression",
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        own = {"momentum": momentum, "rate": rate, "hidden": hidden, "objective": objective}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own}, nonfinite=nonfinite)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(0 <= group["momentum"] <= 1, "momentum", "a number from 0 to 1", group["momentum"])
        need(0 < group["rate"] < math.inf, "rate", "more than 0 and finite", group["rate"])
        need(
            type(group["hidden"]) is int and group["hidden"] >= 1, "hidden", "an integer of at least 1", group["hidden"]
        )
        need(group["objective"] in ("regression", "dot"), "objective", "'regression' or 'dot'", group["objective"])

    def state_shape(self, parameter: Tensor, name: str) -> tuple[int, ...] | None:
        *stack, _, columns = (1, *parameter.shape) if parameter.ndim == 1 else parameter.shape or (1, 1)
        hidden = next(g["hidden"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        return (*stack, columns, hidden) if name == "outer" else (*stack, hidden, columns)

    def update_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        updates = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            g = as_matrix(whole(gradient))
            g = g.to(torch.promote_types(g.dtype, torch.float32))
            # To a largest entry of 1, or the squares vanish or overflow.
            g = g / (g.abs().amax((-2, -1), keepdim=True) + torch.finfo(g.dtype).tiny)
            norm = g.square().sum(-1, keepdim=True).mean(-2, keepdim=True).sqrt()
            keys = g / (norm + torch.finfo(g.dtype).tiny)
            state = self._memory(parameter, keys, group)
            settings = {"decay": group["momentum"], "rate": group["rate"], "objective": group["objective"]}
            state["outer"], state["inner"] = deep_memory_write(state["outer"], state["inner"], keys, **settings)
            said = math.sqrt(g.shape[-1]) * deep_memory_read(state["outer"], state["inner"], keys)
            updates.append(sharded_like(said.reshape(gradient.shape), parameter))
        apply_update(parameters, updates, lr=float(group["lr"]), weight_decay=group["weight_decay"])

    def _memory(self, parameter: Tensor, keys: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            *stack, _, columns = keys.shape
            generator = torch.Generator().manual_seed(0)  # the same on every process, and after every start
            sides = sorted((group["hidden"], columns))
            inner = 2 * torch.linalg.qr(torch.randn(*sides[::-1], generator=generator, dtype=torch.float64)).Q
            inner = inner if group["hidden"] > columns else inner.mT
            state["inner"] = inner.to(keys).expand(*stack, -1, -1).clone()
            state["outer"] = keys.new_zeros(*stack, columns, group["hidden"])
        return state
