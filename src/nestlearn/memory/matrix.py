"""A linear associative memory (Definition 1): one matrix for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MatrixMemory(nn.Module):
    """M (V x K) for each head; its parameter is the initial state M_0, learnt across contexts (Eq. 28).

    Args:
        heads: number of heads H.
        key_dim: K.
        value_dim: V; None for K.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int | None = None) -> None:
        super().__init__()
        self.initial = nn.Parameter(torch.zeros(heads, key_dim if value_dim is None else value_dim, key_dim))

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> Tensor:
        """M_0 for each row, (B, H, V, K), in the parameter's type but at least fp32."""
        initial = self.initial.to(device=device, dtype=torch.promote_types(self.initial.dtype, torch.float32))
        return initial.expand(batch_size, *initial.shape).clone()
