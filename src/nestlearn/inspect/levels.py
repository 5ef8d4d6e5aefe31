"""The levels of a model: which part changes how often (Definition 2), as a table and as a picture.

Time inside a context is counted in tokens, time in training in optimizer steps. The two never mix, so they have a
table and a pane each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rich.table import Table
from rich.text import Text
from torch import nn

from nestlearn.io import atomic_path
from nestlearn.levels import EVERY_READ, FROZEN, Clock, Level, Unit, order_by_frequency
from nestlearn.memory import MatrixMemory, MLPMemory
from nestlearn.models import HopeLM

TITLES: dict[Unit, str] = {
    "token": "In a context, counted in tokens",
    "step": "In training, counted in optimizer steps",
}
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")  # by level; also tell apart in grey


@dataclass(frozen=True, kw_only=True)
class LevelPart:
    """The same part of all blocks, for example ``blocks.0-3.mixer.memory``.

    Attributes:
        name: of the parts; a range stands for the blocks.
        level: its index by update frequency, 0 the fastest, among the parts with the same unit.
        period: units of time between two updates; 0 if it is read anew at each token, infinity if frozen.
        unit: "token" or "step".
        parameters: learnt numbers: of a memory its initial state, of attention none.
    """

    name: str
    level: int
    period: int | float
    unit: Unit
    parameters: int

    @property
    def rhythm(self) -> str:
        """The period in words."""
        if self.period == EVERY_READ:
            return "recomputed at every read"
        if self.period == FROZEN:
            return "never"
        return f"every {self.unit}" if self.period == 1 else f"every {self.period:,} {self.unit}s"


def describe_levels(model: HopeLM) -> list[LevelPart]:
    """The parts of a model from the fastest to the slowest, those inside a context first.

    The memories' initial states are parameters too: they are counted in both units, as what a context starts from and
    as what training changes.
    """
    parts: list[LevelPart] = []
    for unit in get_args(Unit):
        order = order_by_frequency(level for level in model.levels() if level.unit == unit)
        groups: dict[tuple[str, int], list[Level]] = {}
        for level, index in order.items():
            groups.setdefault((re.sub(r"^blocks\.\d+\.", "blocks.*.", level.name), index), []).append(level)
        for (pattern, index), levels in groups.items():
            blocks = [int(level.name.split(".")[1]) for level in levels if level.name.startswith("blocks.")]
            parts.append(
                LevelPart(
                    name=pattern.replace("*", _span(blocks)),
                    level=index,
                    period=levels[0].period,
                    unit=unit,
                    parameters=sum(_parameters(model, level) for level in levels),
                )
            )
    return parts


def levels_table(model: HopeLM) -> list[Table]:
    """`describe_levels` as tables for a terminal, one for each unit of time."""
    tables = []
    parts = describe_levels(model)
    for unit, title in TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in ("level", "part", "updated"):
            table.add_column(column)
        table.add_column("initial state" if unit == "token" else "parameters", justify="right")
        for part in parts:
            if part.unit == unit:
                table.add_row(str(part.level), Text(part.name), part.rhythm, f"{part.parameters:,}")
        tables.append(table)
    return tables


def plot_levels(model: HopeLM, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws each part's updates along time, a pane for each unit, to a PNG (or what the suffix of `path` says).

    Args:
        model: whose levels.
        path: the picture; written atomically.
        title: above both panes.
    """
    from matplotlib.figure import Figure

    parts = describe_levels(model)
    panes = [[part for part in parts if part.unit == unit] for unit in TITLES]
    figure = Figure(figsize=(9, 1.9 + 0.55 * len(parts)), dpi=150, layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=[len(pane) + 0.5 for pane in panes])
    for pane, unit, ax in zip(panes, TITLES, axes, strict=True):
        horizon = _horizon(pane)
        for row, part in enumerate(pane):
            colour = COLOURS[part.level % len(COLOURS)]
            if part.period == EVERY_READ:
                ax.hlines(row, 0, horizon, color=colour, linewidth=6, alpha=0.5)
            else:
                level, clock = Level(part.name, part.period, unit), Clock(unit=unit)
                due = [t for t in range(horizon + 1) if Clock(unit=unit, time=t).due(level)]
                ax.hlines(row, clock.time, horizon, color=colour, linewidth=1, alpha=0.35)
                ax.vlines(due, row - 0.33, row + 0.33, color=colour, linewidth=max(0.5, min(2.5, 240 / horizon)))
            ax.annotate(
                f"level {part.level}: {part.rhythm}, {_short(part.parameters)} numbers",
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
        ax.set_yticks(range(len(pane)), [part.name for part in pane], fontsize=8)
        ax.set_ylim(len(pane) - 0.4, -0.6)
        ax.set_xlim(0, horizon * 1.005)
        ax.set_xlabel(f"{unit}s", fontsize=9)
        ax.set_title(TITLES[unit], fontsize=10, loc="left")
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.tick_params(left=False)
    if title:
        figure.suptitle(title, fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _horizon(parts: Sequence[LevelPart]) -> int:
    """A stretch of time in which the slowest part changes four times."""
    periods = [int(part.period) for part in parts if part.period not in (EVERY_READ, FROZEN)]
    return max(16, 4 * max(periods, default=1))


def _span(blocks: Sequence[int]) -> str:
    return f"{min(blocks)}-{max(blocks)}" if len(blocks) > 1 else "".join(map(str, blocks))


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _parameters(model: HopeLM, level: Level) -> int:
    """Learnt numbers of the part that a level names."""
    if level.unit == "step":
        slow = [other for other in model.levels() if other.unit == "step" and other.name.startswith("blocks.")]
        count = {other.name: _size(model.get_submodule(other.name)) for other in slow}
        return count.get(level.name, model.num_parameters() - sum(count.values()))
    owner, _, part = level.name.rpartition(".")
    memory = getattr(model.get_submodule(owner), "memory", None) if part in ("memory", "projections") else None
    if isinstance(memory, MatrixMemory):
        return memory.initial.numel()
    if isinstance(memory, MLPMemory):
        share = memory.hidden[-1] / sum(memory.hidden)
        main = round(_size(memory) * share)
        return main if part == "memory" else _size(memory) - main
    return 0


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
