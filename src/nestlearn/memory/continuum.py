"""The continuum memory system: a chain of MLP levels, each with its own update period (Eq. 70-74)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.kernels.native import run_level, unavailable
from nestlearn.functional.plain import is_plain, is_small, plain_weight
from nestlearn.functional.recomputed import mlp_behind_norm, recomputable
from nestlearn.functional.rms_norm import RMSNorm

Variant = Literal["sequential", "independent", "nested"]
LevelKind = Literal["mlp", "gated"]


class MLPLevel(nn.Module):
    """One level: an MLP behind a norm, without its residual connection: W_out gelu(W_in norm(x)).

    Args:
        dim: D.
        hidden: width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weights = self._plain_weights(x)
        if weights is not None and recomputable(x, *weights):
            return mlp_behind_norm(x, *weights, self.norm.eps)
        down: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return down

    @torch.no_grad()
    def decode_step(self, x: Tensor) -> Tensor:
        """x + level(x) of one token, x (B, D), without gradients."""
        weights = self._plain_weights(x) if is_small(x) and is_plain(self, MLPLevel) else None
        if weights is None or unavailable() is not None:
            return x + self(x)
        norm, up, down = weights
        x = x.contiguous()
        out = torch.empty_like(x)
        sizes = (*x.shape, up.shape[0], torch.get_num_threads(), x.dtype == torch.float64)
        run_level(*(t.data_ptr() for t in (x, norm, up, down, out)), sizes=sizes, eps=self.norm.eps)
        return out

    def _plain_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Those of norm, up and down, if they say all that these modules do to x, and fit it."""
        inside = self._modules
        norm = plain_weight(inside["norm"], RMSNorm, x)
        up, down = (plain_weight(inside[name], nn.Linear, x) for name in ("up", "down"))
        if norm is None or up is None or down is None:
            return None
        if up.shape[1:] != x.shape[-1:] or down.shape != up.shape[::-1] or norm.shape != x.shape[-1:]:
            return None  # the modules say what is wrong
        return norm, up, down


class GatedLevel(nn.Module):
    """One level as Llama and its relatives have it (SwiGLU): W_out (silu(W_gate norm(x)) * W_in norm(x)).

    Args:
        dim: D.
        hidden: width of the hidden layer.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed = self.norm(x)
        down: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return down

    @torch.no_grad()
    def decode_step(self, x: Tensor) -> Tensor:
        """x + level(x) of one token, x (B, D), without gradients."""
        return x + self(x)


LEVELS: dict[LevelKind, type[MLPLevel] | type[GatedLevel]] = {"mlp": MLPLevel, "gated": GatedLevel}


class ContinuumMemory(nn.Module):
    """Levels of MLP memory from the fastest to the slowest. The parameters are the initial states.

    A level is pre-norm and residual, so that one which is never updated does no harm:

    - "sequential" (Eq. 70, 73): x <- x + level(x), one after another.
    - "nested" (Eq. 72): the same read; the levels differ in how their states are re-initialised when they are updated
      in context, so without in-context updates nested equals sequential.
    - "independent" (Eq. 74): x + sum_i w_i level_i(x) with learnt weights w that start at 1 / levels.

    Periods count either optimizer steps (training: `nestlearn.optim.LevelOptimizer`) or tokens (in context); this
    module only carries them.

    Args:
        dim: D.
        periods: update period of each level, ascending: the first level is the fastest.
        expansion: hidden width of each level over D.
        variant: see above.
        kind: what a level is: "mlp" (`MLPLevel`) or "gated" (`GatedLevel`).

    Raises:
        ValueError: if periods are empty, below 1 or not ascending, or the variant or the kind is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        periods: Sequence[int],
        expansion: float = 4.0,
        variant: Variant = "sequential",
        kind: LevelKind = "mlp",
    ) -> None:
        super().__init__()
        check_periods(periods)
        if variant not in ("sequential", "independent", "nested"):
            raise ValueError(f'variant: expected "sequential", "independent" or "nested", got {variant!r}')
        if kind not in LEVELS:
            raise ValueError(f"kind: expected one of {', '.join(LEVELS)}, got {kind!r}")
        self.periods = tuple(periods)
        self.variant = variant
        self.levels = nn.ModuleList(LEVELS[kind](dim, round(dim * expansion)) for _ in periods)
        if variant == "independent":
            self.weights = nn.Parameter(torch.full((len(periods),), 1.0 / len(periods)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), residual included."""
        if self.variant == "independent":
            return x + sum(w * level(x) for w, level in zip(self.weights, self.levels, strict=True))
        for level in self.levels:
            x = x + level(x)
        return x

    def decode_step(self, x: Tensor) -> Tensor:
        """One token, x (B, D) -> (B, D), without gradients. Otherwise equal to `forward`."""
        if self.variant == "independent" or not is_plain(self, ContinuumMemory):
            mixed: Tensor = self(x)
            return mixed
        for level in self.levels:
            x = level.decode_step(x)  # type: ignore[operator]
        return x


def check_periods(periods: Sequence[int]) -> None:
    """Refuses periods that name no order of levels.

    Raises:
        ValueError: if they are empty, below 1, or not strictly ascending.
    """
    if (
        not periods
        or any(not isinstance(p, int) or p < 1 for p in periods)
        or any(b <= a for a, b in pairwise(periods))
    ):
        raise ValueError(
            f"CMS periods: expected one or more whole numbers of at least 1, strictly ascending from the fastest to "
            f"the slowest level, for example (1, 4, 16); got {tuple(periods)}"
        )
