"""Linear attention (Eq. 14-15): a Hebbian matrix memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.layers.matrix_layer import MatrixMemoryLayer


class LinearAttention(MatrixMemoryLayer):
    """M_t = M_{t-1} + v_t k_t^T, o_t = M_t q_t, with q and k of norm 1 (Eq. 15).

    Args:
        dim: D, divisible by heads.
        heads: H.
        chunk_size: tokens a chunk; it changes the speed, not the result.
        conv_width: taps of the short convolutions.
    """

    def __init__(self, dim: int, heads: int, *, chunk_size: int = 64, conv_width: int = 4) -> None:
        super().__init__(dim, heads, gates=0, chunk_size=chunk_size, conv_width=conv_width)

    def strengths(self, logits: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return torch.zeros_like(like), None, torch.ones_like(like)
