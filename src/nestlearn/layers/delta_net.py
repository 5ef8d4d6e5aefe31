"""DeltaNet and Gated DeltaNet: matrix memories that replace what they hold at a key (Eq. 65)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.layers.chunked_memory import spread_retention
from nestlearn.layers.matrix_layer import MatrixMemoryLayer


class DeltaNet(MatrixMemoryLayer):
    """M_t = M_{t-1} - beta_t (M_{t-1} k_t - v_t) k_t^T, o_t = M_t q_t, with q and k of norm 1 (Eq. 65).

    Args:
        dim: D, divisible by heads.
        heads: H.
        chunk_size: tokens a chunk; it changes the speed, not the result.
        conv_width: taps of the short convolutions.
    """

    def __init__(self, dim: int, heads: int, *, chunk_size: int = 64, conv_width: int = 4) -> None:
        super().__init__(dim, heads, gates=1, chunk_size=chunk_size, conv_width=conv_width)

    def strengths(self, logits: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        assert logits is not None
        beta = torch.sigmoid(logits[0])
        return torch.zeros_like(like), beta, beta


class GatedDeltaNet(MatrixMemoryLayer):
    """M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = M_t q_t (Yang et al., 2412.06464).

    The biases of the retention alpha are spread over the heads as in the other layers here.

    Args: as `DeltaNet`.
    """

    def __init__(self, dim: int, heads: int, *, chunk_size: int = 64, conv_width: int = 4) -> None:
        super().__init__(dim, heads, gates=2, chunk_size=chunk_size, conv_width=conv_width)
        self.retain_bias = nn.Parameter(spread_retention(heads))

    def strengths(self, logits: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        assert logits is not None
        beta = torch.sigmoid(logits[0])
        log_retain = F.logsigmoid(logits[1] + self.retain_bias.to(like.dtype)[:, None])
        return log_retain, log_retain.exp() * beta, beta
