"""Levels: which part of a model changes how often (Nested Learning, Definition 2).

Time is counted in one of two units. A ``"token"`` is one position of the stream a model reads (memories, in-context
updates); a ``"step"`` is one step of the optimizer that trains it. One step reads many tokens, so the two never mix:
comparing them is an error until `Level.in_tokens` has said how many tokens a step reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

Unit = Literal["token", "step"]

EVERY_READ = 0
"""Period of a non-parametric part such as softmax attention: recomputed whenever it is read, infinite frequency."""

FROZEN = math.inf
"""Period of a part that never changes: frequency 0."""


@dataclass(frozen=True)
class Level:
    """One part of a model or of its optimizer, and how often it is updated.

    Args:
        name: The part, for example ``"blocks.0.mixer.memory"``.
        period: Units of time between two updates: an integer of at least 1, `EVERY_READ` (0) or `FROZEN` (infinity).
        unit: What the period counts, ``"token"`` or ``"step"``.

    Raises:
        ValueError: If the period is neither of these or the unit is unknown.
    """

    name: str
    period: int | float
    unit: Unit = "token"

    def __post_init__(self) -> None:
        if self.unit not in ("token", "step"):
            raise ValueError(f"the unit of level {self.name!r} must be 'token' or 'step', got {self.unit!r}")
        whole = isinstance(self.period, int) and not isinstance(self.period, bool) and self.period >= 0
        if not whole and self.period != FROZEN:
            raise ValueError(
                f"the period of level {self.name!r} must be an integer of at least 1 ({self.unit}s between two "
                f"updates), EVERY_READ (0: not parametric) or FROZEN (infinity: never updated), got {self.period!r}"
            )

    @property
    def frequency(self) -> Fraction | float:
        """Updates per unit of time, exact: 1/period, infinity if not parametric, 0 if frozen."""
        if self.period == EVERY_READ:
            return math.inf
        return Fraction(0) if self.period == FROZEN else Fraction(1, int(self.period))

    @property
    def timeless(self) -> bool:
        """Whether the frequency is 0 or infinite, and therefore the same in every unit."""
        return self.period in (EVERY_READ, FROZEN)

    def in_tokens(self, tokens_per_step: int) -> Level:
        """This level with its period counted in tokens, given how many tokens one optimizer step reads."""
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        if self.unit == "token":
            return self
        return Level(self.name, self.period if self.timeless else self.period * tokens_per_step, "token")

    def faster_than(self, other: Level) -> bool:
        """Whether f_self > f_other, the first half of Definition 2. Units must agree."""
        _require_one_unit((self, other))
        return self.frequency > other.frequency


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How many units of time have passed. Pure: `advance` returns a new clock.

    A level of period p is due at times p, 2p, 3p, ..., never at time 0.

    Args:
        unit: What is counted, ``"token"`` or ``"step"``.
        time: Units that have passed, at least 0.
    """

    unit: Unit
    time: int = 0

    def __post_init__(self) -> None:
        if self.unit not in ("token", "step"):
            raise ValueError(f"the unit of a clock must be 'token' or 'step', got {self.unit!r}")
        if not isinstance(self.time, int) or isinstance(self.time, bool) or self.time < 0:
            raise ValueError(f"the time of a clock must be an integer of at least 0, got {self.time!r}")

    def advance(self, units: int = 1) -> Clock:
        """The clock `units` later."""
        if units < 0:
            raise ValueError(f"a clock only runs forward, got {units} units")
        return Clock(unit=self.unit, time=self.time + units)

    def due(self, level: Level) -> bool:
        """Whether `level` is updated now. Advancing by more than `until_due` jumps over an update."""
        period = self._period(level)
        if period in (EVERY_READ, FROZEN):
            return period == EVERY_READ
        return self.time > 0 and self.time % int(period) == 0

    def until_due(self, level: Level) -> int | float:
        """Units from now to the next update after now: 1 to the period, 0 if not parametric, infinity if frozen."""
        period = self._period(level)
        return period if period in (EVERY_READ, FROZEN) else int(period) - self.time % int(period)

    def updates(self, level: Level) -> int | float:
        """Updates of `level` since time 0, one that is due now included. Infinity if not parametric."""
        period = self._period(level)
        if period == EVERY_READ:
            return math.inf
        return 0 if period == FROZEN else self.time // int(period)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Clock.from_dict` reads them back."""
        return {"unit": self.unit, "time": self.time}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Clock:
        """The clock that `to_dict` wrote."""
        if set(values) != {"unit", "time"}:
            raise ValueError(f"a clock is stored as 'unit' and 'time', got the keys {sorted(values)}")
        return cls(unit=values["unit"], time=values["time"])

    def _period(self, level: Level) -> int | float:
        if level.unit != self.unit and not level.timeless:
            raise ValueError(
                f"level {level.name!r} counts {level.unit}s but this clock counts {self.unit}s; "
                "keep one clock per unit, or convert the level with level.in_tokens(tokens_per_step)"
            )
        return level.period


def order_by_frequency(
    components: Iterable[Level], dependencies: Mapping[str, Collection[str]] | None = None
) -> dict[Level, int]:
    """Order the parts of a system by update frequency and name the level of each (Definition 2).

    A is faster than B if f_A > f_B, or if f_A = f_B and the state of B at time t needs the state of A at time t. Parts
    that are neither faster nor slower than one another share a level; level 0 is the fastest, and a higher level is
    updated less often. So momentum and the weights it moves are two levels, the two moments of Adam are one.

    Args:
        components: The parts, with distinct names and one unit of time (frequencies 0 and infinity fit any unit).
        dependencies: For a part's name, the names of the parts whose state at t its own state at t needs. Between
            parts of different frequency the frequency decides.

    Returns:
        Each part and the index of its level, fastest first; parts of one level keep the order they came in.
        ``list(order_by_frequency(parts))`` is the ordered list.

    Raises:
        ValueError: On mixed units, a name that appears twice or is unknown, or parts that need each other in a circle.
    """
    parts = list(components)
    _require_one_unit(parts)
    by_name = {part.name: part for part in parts}
    if len(by_name) != len(parts):
        twice = sorted({part.name for part in parts if [p.name for p in parts].count(part.name) > 1})
        raise ValueError(f"every part needs a name of its own, these appear more than once: {', '.join(twice)}")
    needs = {name: tuple((dependencies or {}).get(name, ())) for name in by_name}
    unknown = sorted((set(dependencies or {}) | {other for many in needs.values() for other in many}) - set(by_name))
    if unknown:
        raise ValueError(f"dependencies name parts that do not exist: {', '.join(unknown)}; known: {list(by_name)}")

    # Needing the same moment's state is transitive, also by way of a part of another frequency.
    ancestors = {name: _ancestors(name, needs) for name in by_name}
    depth: dict[str, int] = {}
    for name in sorted(by_name, key=lambda n: len(ancestors[n])):  # an ancestor has fewer ancestors than its heirs
        same = [a for a in ancestors[name] if by_name[a].frequency == by_name[name].frequency]
        depth[name] = 1 + max((depth[a] for a in same), default=-1)

    rank = {part: (-part.frequency, depth[part.name]) for part in parts}
    index = {key: i for i, key in enumerate(sorted(set(rank.values())))}
    return {part: index[rank[part]] for part in sorted(parts, key=lambda part: rank[part])}


def _ancestors(name: str, needs: Mapping[str, Collection[str]]) -> set[str]:
    """Every part that `name` needs, directly or not."""
    found: set[str] = set()
    waiting = list(needs[name])
    while waiting:
        other = waiting.pop()
        if other == name:
            raise ValueError(
                f"{name!r} needs its own state at time t, by way of {sorted(found) or [name]}: "
                "a dependency must be on the same moment; a need for the previous moment's state is none"
            )
        if other not in found:
            found.add(other)
            waiting.extend(needs[other])
    return found


def _require_one_unit(parts: Iterable[Level]) -> None:
    """Frequencies per token and per step cannot be compared."""
    units: dict[str, str] = {}
    for part in parts:
        if not part.timeless:
            units.setdefault(part.unit, part.name)
    if len(units) > 1:
        raise ValueError(
            f"level {units['token']!r} counts tokens and level {units['step']!r} counts optimizer steps; the two have "
            "no common frequency. Say how many tokens one step reads: "
            f"{units['step']!r} -> level.in_tokens(tokens_per_step=batch_size * sequence_length)"
        )
