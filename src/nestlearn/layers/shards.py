"""Sequences cut into shards that know nothing of each other, and so can be read side by side as rows of one batch.

A shard ends every so many tokens, counted in each row since its last reset, and wherever a document starts. The first
piece of a row goes on with the shard that the row's state is in; all others begin afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The R pieces of B rows of T tokens, at most W tokens each, in the order of rows and tokens.

    Attributes:
        position: (R,) int64, the place in its shard at which each piece begins.
        lengths: (R,) int64, tokens of each piece; None if all have W.
        continues: (R,) int64, the row whose state a piece goes on from; B where it begins afresh.
        final: (B,) int64, the piece after which a row's state is read off; R where a shard ended with it.
        after: (B,) int64, each row's place in its shard after the call.
        width: W.
        source: (R * W,) int64, the token of each place, counted over all rows; None if place = token.
        places: (B * T,) int64, the place of each token; None if place = token.
    """

    position: Tensor
    lengths: Tensor | None
    continues: Tensor
    final: Tensor
    after: Tensor
    width: int
    source: Tensor | None
    places: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """Rows (B, T, D) to pieces (R, W, D)."""
        flat = x.flatten(0, 1)
        return (flat if self.source is None else flat.index_select(0, self.source)).unflatten(0, (-1, self.width))

    def collect(self, x: Tensor, tokens: int) -> Tensor:
        """Pieces (R, W, D) back to rows (B, T, D)."""
        flat = x.flatten(0, 1)
        return (flat if self.places is None else flat.index_select(0, self.places)).unflatten(0, (-1, tokens))


def plan_shards(
    position: Tensor,
    tokens: int,
    *,
    shard_length: int,
    lengths: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Shards:
    """Cuts one call into pieces.

    Args:
        position: (B,) int64, each row's place in its shard, below `shard_length`.
        tokens: T, at least 1.
        shard_length: S.
        lengths: (B,) valid tokens of each row; None for all T.
        document_starts: (B, T) bool; a shard begins at these tokens. None for none.
    """
    first, device = position.tolist(), position.device
    valid = [tokens] * len(first) if lengths is None else lengths.tolist()
    starts: list[list[int]] = [[] for _ in first]
    if document_starts is not None:
        for row, token in document_starts.nonzero().tolist():
            if token < valid[row]:
                starts[row].append(token)
    pieces: list[tuple[int, int, int, int, int]] = []  # row, first token, tokens, place in the shard, state
    last = []
    for row, place in enumerate(first):
        if 0 not in starts[row]:  # even with no token at all, a row keeps its state
            stop = min([*starts[row], valid[row], shard_length - place])
            pieces.append((row, 0, stop, place, row))
            starts[row].insert(0, stop)
        for start, end in pairwise([*starts[row], valid[row]]):
            for token in range(start, end, shard_length):
                pieces.append((row, token, min(shard_length, end - token), 0, len(first)))
        last.append(len(pieces) - 1)
    rows, begin, count, place_of, continues = torch.tensor(pieces, device=device).unbind(1)
    ends = (place_of + count)[last]
    width = max(1, *(piece[2] for piece in pieces))
    source = places = None
    if len(pieces) * width > sum(piece[2] for piece in pieces) or len(pieces) * width < len(first) * tokens:
        across = torch.arange(width, device=device)
        source = ((rows * tokens + begin)[:, None] + across).clamp_max(len(first) * tokens - 1).flatten()
        held = (across < count[:, None]).flatten()
        places = torch.zeros(len(first) * tokens, dtype=torch.long, device=device)
        places[source[held]] = held.nonzero().squeeze(1)
    return Shards(
        position=place_of,
        lengths=None if source is None else count,
        continues=continues,
        final=torch.where(ends == shard_length, len(pieces), torch.tensor(last, device=device)),
        after=ends % shard_length,
        width=width,
        source=source,
        places=places,
    )
