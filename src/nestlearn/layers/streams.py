"""What goes into every mixer of Hope: slow projections, a short causal convolution, silu (Titans, Sec. 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.plain import is_plain
from nestlearn.functional.recomputed import convolved_heads, heads_available
from nestlearn.layers.short_convolution import ShortConvolution

# How much the tap of its own token starts ahead of a query's other taps, and that of the token before ahead of a key's,
# in units of their spread, 1 / sqrt(conv_width).
LEAD = 0.8


class Streams(nn.Module):
    """Several inputs of a mixer (q, k, v, gates, ..., in this order) from one merged projection.

    Queries and keys start with one projection, queries looking mostly at their own token and keys at the token before,
    so that from the start a read leans towards what came after tokens like this one (decision 21 of
    docs/decisions.md). With a convolution of one token there is no token before, and no lead.

    Args:
        dim: D, divisible by heads.
        heads: H.
        streams: how many, at least q and k.
        conv_width: taps of the convolution.

    Raises:
        ValueError: if heads do not divide dim, or there is no stream for k.
    """

    def __init__(self, dim: int, heads: int, *, streams: int, conv_width: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim: expected a multiple of heads, got dim {dim} and heads {heads}")
        if streams < 2:
            raise ValueError(f"streams: expected at least 2, for q and k, got {streams}")
        self.heads = heads
        self.count = streams
        self.projection = nn.Linear(dim, streams * dim, bias=False)
        self.convolution = ShortConvolution(streams * dim, conv_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start described above; the projection is normal with std 0.5 / sqrt(D)."""
        dim, width = self.projection.in_features, self.convolution.width
        nn.init.normal_(self.projection.weight, std=0.5 * dim**-0.5)
        self.convolution.reset_parameters()
        queries, keys = slice(0, dim), slice(dim, 2 * dim)
        with torch.no_grad():
            self.projection.weight[keys] = self.projection.weight[queries]
            if width > 1:
                self.convolution.weight[-1, queries] += LEAD * width**-0.5
                self.convolution.weight[-2, keys] += LEAD * width**-0.5

    def init_tail(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The convolution's state before the first token, (B, conv_width - 1, streams * D)."""
        return self.convolution.init_state(batch_size, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, tail: Tensor | None, *, lengths: Tensor | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> all streams side by side (B, T, streams * D), and the new tail. No tail: a fresh context."""
        u, tail = self.convolution(self.projection(x), tail, lengths=lengths, document_starts=document_starts)
        return F.silu(u), tail

    def by_heads(
        self, x: Tensor, tail: Tensor | None, *, lengths: Tensor | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, but (B, T, streams, H, K), laid out in memory as `split` wants it."""
        if not (is_plain(self, Streams) and is_plain(self.convolution, ShortConvolution)):
            u, tail = self(x, tail, lengths=lengths, document_starts=document_starts)
            return u.unflatten(-1, (self.count, self.heads, -1)), tail
        p, weight = self.projection(x), self.convolution.weight
        if tail is None and document_starts is None and heads_available(p, weight):
            u = convolved_heads(p, weight, self.count, self.heads)
            return u.permute(1, 3, 0, 2, 4), self.convolution.tail_after(p, None, lengths, None)
        u, tail = self.convolution(p, tail, lengths=lengths, document_starts=document_starts)
        return F.silu(u).unflatten(-1, (self.count, self.heads, -1)), tail

    def decode_step(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """One token x (B, 1, D) without gradients -> (B, 1, streams * D) and the tail, overwritten."""
        u, tail = self.convolution.decode_step(self.projection(x), tail)
        return F.silu(u, inplace=True), tail

    def split(self, u: Tensor) -> Tensor:
        """(B, T, streams * D), or (B, T, streams, H, K) -> (streams, B, H, T, K)."""
        apart = u if u.ndim == 5 else u.unflatten(-1, (self.count, self.heads, -1))
        return apart.permute(2, 0, 3, 1, 4)
