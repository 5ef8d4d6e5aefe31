"""Measures of learning one domain after another (Lopez-Paz and Ranzato, 1706.08840; Chaudhry et al., 1801.10112)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StreamMeasures:
    """What a stream of N domains comes to. Losses are nats, the lower the better; gains are how far they fall.

    Attributes:
        final: mean loss over the domains after the last one (the ACC of Lopez-Paz and Ranzato, for losses).
        learning: mean fall of a domain's loss while it is read, against its loss just before.
        backward: backward transfer, the mean fall of the earlier domains' losses from the end of each to the end of
            the stream; below zero is forgetting. None for one domain.
        forward: forward transfer, the mean fall of the later domains' losses before they are read, against the model
            that read nothing. None for one domain.
        forgetting: mean over the earlier domains of the final loss less the lowest one that the domain had since it was
            read, at least 0. None for one domain.
    """

    final: float
    learning: float
    backward: float | None
    forward: float | None
    forgetting: float | None


def measure_stream(losses: Sequence[Sequence[float]]) -> StreamMeasures:
    """Measures of a stream.

    Args:
        losses: (N + 1) x N; row 0 before anything is read, row i after domain i of 1 .. N, a column for each domain.

    Raises:
        ValueError: if it has another shape, or a loss is not finite.
    """
    count = len(losses) - 1
    if count < 1 or any(len(row) != count for row in losses):
        raise ValueError(
            f"losses: expected one row more than domains, as long as there are domains; got rows of "
            f"{[len(row) for row in losses]}"
        )
    if not all(math.isfinite(loss) for row in losses for loss in row):
        raise ValueError("losses: expected finite numbers; a method that diverged has no measures")
    last = losses[count]
    learnt = [losses[i][i] - losses[i + 1][i] for i in range(count)]
    backward = [losses[i + 1][i] - last[i] for i in range(count - 1)]
    forward = [losses[0][i] - losses[i][i] for i in range(1, count)]
    lost = [last[i] - min(losses[row][i] for row in range(i + 1, count + 1)) for i in range(count - 1)]
    return StreamMeasures(
        final=math.fsum(last) / count,
        learning=math.fsum(learnt) / count,
        backward=_mean(backward),
        forward=_mean(forward),
        forgetting=_mean(lost),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
