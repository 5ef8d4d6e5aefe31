"""Where the tokens of a batch fall on the chunk grid of each row.

A memory that works in chunks takes its snapshot every C tokens, counted in each row since the row's state was last
reset. Rows of one batch may stand at different places in their chunk, end at different lengths, and start new
documents: a timeline lays their tokens out so that all rows share one grid, with places in between that hold no token
and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A stretch of the timeline inside one chunk.

    Attributes:
        start, stop: its places.
        end: places from the grid's origin to its end, (B,) where rows differ: a chunk of C ends here if C divides it.
        active: (B, C) bool, which places hold a token; None if all do.
        reset: (B,) bool, rows whose state is reset before it; None if none is.
        filled: (B,) bool, rows that have a token at its last place; None if all have.
    """

    start: int
    stop: int
    end: int | Tensor
    active: Tensor | None
    reset: Tensor | None
    filled: Tensor | None

    def completes(self, chunk: int) -> bool | Tensor:
        """Whether a chunk ends with this segment: for all rows alike, or (B,) bool."""
        ends = self.end % chunk == 0
        if isinstance(ends, bool) and not ends:
            return False
        return ends if self.filled is None else ends & self.filled


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Places and segments for one call of a layer.

    Attributes:
        segments: in order.
        position: (B,) int64, each row's place in its chunk after the call.
        source: (B, places) int64, the token at each place (any token where there is none); None if place = token.
        places: (B, T) int64, the place of each token; None if place = token.
    """

    segments: tuple[Segment, ...]
    position: Tensor
    source: Tensor | None
    places: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) to places (B, places, ...)."""
        if self.source is None:
            return x
        return x.gather(1, self.source.view(*self.source.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """Places (B, places, D) into one piece a segment. One operation, so that its backward pass is one too."""
        return x.split([segment.stop - segment.start for segment in self.segments], dim=1)

    def collect(self, x: Tensor) -> Tensor:
        """Places (B, places, D) back to tokens (B, T, D)."""
        return x if self.places is None else x.gather(1, self.places[..., None].expand(-1, -1, x.shape[-1]))


def plan_timeline(
    position: Tensor,
    tokens: int,
    *,
    chunk: int,
    period: int,
    lengths: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Timeline:
    """Lays out one call.

    Args:
        position: (B,) int64, tokens each row has read since its last reset, modulo `period`.
        tokens: T.
        chunk: the longest segment; divides `period`.
        period: places after which the grid repeats: the largest chunk size.
        lengths: (B,) valid tokens of each row; None for all T.
        document_starts: (B, T) bool; the state is reset before these tokens. None for none.
    """
    if document_starts is not None and not bool(document_starts.any()):
        document_starts = None
    first = position.tolist()
    aligned = document_starts is None and (tokens <= 1 or len(set(first)) <= 1)
    if tokens == 1 and aligned and len(set(first)) > 1:
        return _one_token_each(position, period, lengths)
    if aligned:
        return _aligned(position, first[0] if first else 0, tokens, chunk, period, lengths)
    return _ragged(position, first, tokens, chunk, period, lengths, document_starts)


def _segments(origin: int, places: int, chunk: int) -> list[tuple[int, int]]:
    bounds = [0, *range(chunk - origin % chunk, places, chunk), places]
    return list(pairwise(bounds))


def _one_token_each(position: Tensor, period: int, lengths: Tensor | None) -> Timeline:
    """One token a row, each at its own place: no row can cross a chunk inside the call, so no grid is needed."""
    active = None if lengths is None else lengths[:, None] > 0
    moved = position + 1 if active is None else position + active[:, 0]
    segment = Segment(0, 1, position + 1, active, None, None if active is None else active[:, 0])
    return Timeline(segments=(segment,), position=moved % period, source=None, places=None)


def _aligned(position: Tensor, origin: int, tokens: int, chunk: int, period: int, lengths: Tensor | None) -> Timeline:
    segments = []
    for start, stop in _segments(origin, tokens, chunk) if tokens else []:
        active = filled = None
        if lengths is not None:
            active = torch.arange(start, stop, device=position.device) < lengths[:, None]
            filled = active[:, -1]
        segments.append(Segment(start, stop, origin + stop, active, None, filled))
    moved = position + (tokens if lengths is None else lengths)
    return Timeline(segments=tuple(segments), position=moved % period, source=None, places=None)


def _ragged(
    position: Tensor,
    first: list[int],
    tokens: int,
    chunk: int,
    period: int,
    lengths: Tensor | None,
    document_starts: Tensor | None,
) -> Timeline:
    rows, device = len(first), position.device
    valid = [tokens] * rows if lengths is None else lengths.tolist()
    starts: list[set[int]] = [set() for _ in first]
    if document_starts is not None:
        for row, token in document_starts.nonzero().tolist():
            starts[row].add(token)
    origin = min(first)
    places: list[list[int]] = []
    resets: list[tuple[int, int]] = []
    for row in range(rows):
        place, line = first[row] - origin, []
        for token in range(tokens):
            if token < valid[row] and token in starts[row]:
                place += -(origin + place) % period
                resets.append((row, place))
            line.append(place)
            place += 1
        places.append(line)
    width = max((line[-1] + 1 for line in places if line), default=0)
    place_of = torch.tensor(places, dtype=torch.long, device=device).reshape(rows, tokens)
    source = torch.zeros(rows, width, dtype=torch.long, device=device)
    source.scatter_(1, place_of, torch.arange(tokens, device=device).expand(rows, -1))
    held = torch.arange(tokens, device=device) < torch.tensor(valid, device=device)[:, None]
    active = torch.zeros(rows, width, dtype=torch.bool, device=device).scatter_(1, place_of, held)
    reset_at = torch.zeros(rows, width, dtype=torch.bool, device=device)
    for row, place in resets:
        reset_at[row, place] = True
    segments = []
    for start, stop in _segments(origin, width, chunk):
        reset = reset_at[:, start]
        segments.append(
            Segment(
                start,
                stop,
                origin + stop,
                active[:, start:stop],
                reset if bool(reset.any()) else None,
                active[:, stop - 1],
            )
        )
    last = [(origin + places[row][valid[row] - 1] + 1) % period if valid[row] else first[row] for row in range(rows)]
    return Timeline(
        segments=tuple(segments),
        position=torch.tensor(last, dtype=torch.long, device=device),
        source=source,
        places=place_of,
    )
