"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestlearn.functional.constants import constant
from nestlearn.functional.recomputed import SMALL, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, that keeps x alone for its backward pass, and takes half the operations
    where gradients are off and x is small.

    dim: D. eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.eps: float = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight = self.weight
        if torch.is_grad_enabled() or x.numel() > SMALL or x.dtype != weight.dtype or x.dtype.itemsize < 4:
            return rms_norm(x, weight, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        eps = constant(self.eps, x.dtype, x.device)
        return (x * weight).mul_(torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_())


def normalize_token(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`functional.surprise.normalize` with fewer operations, for small x without gradients."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(constant(eps * eps, x.dtype, x.device), norm, norm).rsqrt_()
