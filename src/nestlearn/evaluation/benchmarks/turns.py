"""Candidates take turns in one process, so that whatever slows the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nestlearn.evaluation.benchmarks.machine import Machine, now
from nestlearn.evaluation.benchmarks.work import Work
from nestlearn.training.progress import duration

Notice = Callable[[str], None]


class Progress:
    """Says what is being done and about how long the rest will take.

    Args:
        total: amount of work, in any unit; the rate is that of the work done so far.
        notice: is given a line at a time.
    """

    def __init__(self, total: float, notice: Notice) -> None:
        self._total, self._done, self._notice = total, 0.0, notice
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time left, once any work is done."""
        left = ""
        if self._done:
            passed = time.monotonic() - self._begin
            left = f"; about {duration(max(0.0, passed / self._done * (self._total - self._done)))} left"
        self._notice(text + left)

    def advance(self, amount: float) -> None:
        """So much of the work is done."""
        self._done += amount


def take_turns(
    works: Mapping[str, Work],
    *,
    alternations: int,
    repeats: int,
    device: torch.device,
    what: str,
    progress: Progress,
    costs: Mapping[str, float],
) -> dict[str, list[float]]:
    """Times all candidates one after another, again and again; a first turn warms up and is not counted.

    Args:
        works: by name.
        alternations: turns that count.
        repeats: steps in a turn.
        device: to wait for.
        what: beginning of the notices.
        progress: is told of each turn.
        costs: of a turn, in the unit of `progress`.

    Returns:
        Seconds of a step in each turn, the mean over its repeats.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(alternations + 1):
        progress.say(f"{what}: " + (f"turn {turn} of {alternations}" if turn else "warming up"))
        for name, work in works.items():
            work.begin()
            begin = now(device)
            for _ in range(repeats):
                work.step()
            taken = (now(device) - begin) / repeats
            if turn:
                seconds[name].append(taken)
            progress.advance(costs[name])
    return seconds


def timing_row(work: Work, taken: Sequence[float], reference: Sequence[float], machine: Machine) -> dict[str, Any]:
    """What is known of a candidate's time.

    Args:
        work: that was timed.
        taken: seconds of a step in each turn.
        reference: the same of the reference, in the same turns.
        machine: whose rates set the floor.

    Returns:
        milliseconds (median of a step), ratio with ratio_min and ratio_max (median, least and most of time over the
        reference's in the same turn), gflops_per_second, floor_milliseconds, floor_set_by ("operations" or "bytes"),
        over_floor (measured over floor), seconds (of every turn).
    """
    ratios = [own / other for own, other in zip(taken, reference, strict=True)]
    median = statistics.median(taken)
    floor = machine.floor(work.needs)
    return {
        "milliseconds": 1000 * median,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "gflops_per_second": (work.needs.linear_flops + work.needs.mixer_flops) / median / 1e9,
        "floor_milliseconds": 1000 * floor.seconds,
        "floor_set_by": floor.by,
        "over_floor": median / floor.seconds,
        "seconds": list(taken),
    }
