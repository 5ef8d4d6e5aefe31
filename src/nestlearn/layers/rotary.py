"""Rotary positions: queries and keys are turned by angles that grow with the position (Su et al., RoFormer).

Shapes: B batch, T tokens, H heads, Dh head width. Half-split layout: channel i is paired with channel i + Dh / 2.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary_table"]


def rotary_table(
    positions: Tensor, head_dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, Dh / 2) of positions (..., T) int64; pair i turns by base ** (-2 i / Dh) per token.

    The angle is formed in float64 (so that position 1,000,000 is as exact as position 1; fp32 on devices without it),
    the result is in `dtype`, at least fp32.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    angle = positions.to(wide).unsqueeze(-1) * _frequencies(head_dim, base, wide, positions.device)
    dtype = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=64)
def _frequencies(head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each pair turns by per token, (Dh / 2,); shared and never written to."""
    with torch.inference_mode(False):
        pair = torch.arange(0, head_dim, 2, device=device, dtype=dtype)
        frequencies: Tensor = base ** (-pair / head_dim)
        return frequencies


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, T, H, Dh) by its angle; cos, sin (B or 1, T, Dh / 2). Same dtype as x."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated: Tensor = _Rotate.apply(x.to(cos.dtype), cos, sin)
    return rotated.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), written once; the backward pass is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(a, cos, out=first)
        first.addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second)
        second.addcmul_(a, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = gradients
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None
