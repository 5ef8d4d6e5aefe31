"""The surprise of a memory: for each linear map inside it, the pair of its own input and minus the error at its output.

For the loss 1/2 |M(k) - target|^2 these pairs are what gradient descent writes: the gradient of a linear map W is
-value key^T (Eq. 8, 93). In closed form, so that it compiles, checkpoints, and is differentiable again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Surprise(NamedTuple):
    """key (..., T, K) and value (..., T, V) that one linear map is to associate."""

    key: Tensor
    value: Tensor


class MLPSurprise(NamedTuple):
    """The surprises of W2 (inner map, key = the memory's input) and of W1 (outer map, key = the hidden features)."""

    inner: Surprise
    outer: Surprise


def linear_surprise(memory: Tensor, keys: Tensor, targets: Tensor) -> Surprise:
    """Surprise of a linear memory, value = target - M k (Eq. 93).

    Args:
        memory: (..., V, K).
        keys: (..., T, K).
        targets: (..., T, V).
    """
    return Surprise(keys, targets - keys @ memory.mT)


def mlp_surprise(
    outer: Tensor,
    inner: Tensor,
    keys: Tensor,
    targets: Tensor,
    *,
    residual: bool = True,
    bound: float | None = None,
    scale: float | Tensor = 1.0,
) -> MLPSurprise:
    """Surprise of the 2-layer memory M(k) = [k +] W1 silu(W2 k) (Eq. 89).

    Args:
        outer: W1 (..., V, hidden).
        inner: W2 (..., hidden, K).
        keys: (..., T, K).
        targets: (..., T, V).
        residual: whether the input is added to the output (needs K = V).
        bound: norm to which the error, and its image at the inner map, is scaled down; None for no bound.
        scale: the fraction of the bounded errors that is written, as if the loss were multiplied by it.
    """
    z = keys @ inner.mT
    read = F.silu(z) @ outer.mT
    return mlp_error_surprise(
        outer, keys, z, F.silu(z), (keys + read if residual else read) - targets, bound=bound, scale=scale
    )


def mlp_error_surprise(
    outer: Tensor,
    keys: Tensor,
    z: Tensor,
    hidden: Tensor,
    error: Tensor,
    *,
    bound: float | None,
    scale: float | Tensor = 1.0,
) -> MLPSurprise:
    """As `mlp_surprise`, from what is known already: z = W2 k, hidden = silu(z) and the error M(k) - target."""
    value = -clip_norm(error, bound)
    image = clip_norm((value @ outer) * silu_slope(z, hidden), bound)
    return MLPSurprise(Surprise(keys, scale * image), Surprise(hidden, scale * value))


def silu_slope(z: Tensor, activated: Tensor) -> Tensor:
    """Derivative of silu at z, given silu(z)."""
    gate = torch.sigmoid(z)
    return gate + activated * (1 - gate)


def clip_norm(x: Tensor, bound: float | None) -> Tensor:
    """Scales the last dimension down to a Euclidean norm of at most `bound`, differentiably; None leaves x as it is."""
    if bound is None:
        return x
    squared = x.square().sum(-1, keepdim=True)
    return x * (bound * bound / squared.clamp_min(bound * bound)).sqrt()


def normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| along the last dimension, smooth at zero: x / sqrt(|x|^2 + eps^2)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps * eps)
