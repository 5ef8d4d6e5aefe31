"""Newton-Schulz iteration: the nearest semi-orthogonal matrix by matrix products alone (Eq. 42-44)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The quintic of Jordan et al. (Muon, 2024): steep at zero, singular values end within about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
# The classical cubic, X <- 1.5 X - 0.5 X X^T X: slower at first, converges to exactly orthogonal.
CUBIC = (1.5, -0.5, 0.0)


def newton_schulz(
    matrix: Tensor, *, steps: int = 5, coefficients: Sequence[float] = QUINTIC, eps: float = 1e-7
) -> Tensor:
    """Replaces every singular value of a matrix by one near 1.

    X <- a X + b (X X^T) X + c (X X^T)^2 X, from X = matrix / |matrix|_F, on the smaller Gram side.

    Args:
        matrix: (..., rows, columns), a batch of matrices of any shape, in fp32 or fp64.
        steps: iterations, at least 0.
        coefficients: (a, b, c); `QUINTIC` or `CUBIC`, or your own.
        eps: added to the norm, so that a zero matrix stays zero.

    Returns:
        A tensor of the same shape and type; differentiable, nothing in place.

    Raises:
        ValueError: if the input is no matrix, or coefficients are not three numbers.
    """
    if matrix.ndim < 2:
        raise ValueError(f"matrix: expected (..., rows, columns), got shape {tuple(matrix.shape)}")
    if len(coefficients) != 3:
        raise ValueError(f"coefficients: expected three numbers (a, b, c), got {len(coefficients)}")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        # b gram + c gram^2, and a x + (...) x: each one fused product and sum.
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)
