"""The picture of a run: its losses over the tokens it has read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestlearn.io import atomic_path, missing_file

__all__ = ["plot_losses", "read_log"]


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: With the names near by.
        ValueError: For a broken line before the last; names the file and the line.
    """
    if not Path(path).is_file():
        raise missing_file(path, what="training log")
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):  # the last piece has no line end: it was being written
                    raise ValueError(f"{path}, line {number} is not valid JSON: {error.msg}") from None
    return rows


def plot_losses(
    log: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    label: str = "",
    baselines: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Draw training and held-out loss over tokens, both on log axes, to a PNG (or what the suffix of `path` says).

    Args:
        log: The run's ``log.jsonl``.
        path: The picture; written atomically.
        label: Name of the run in the legend.
        baselines: Name -> ``log.jsonl`` of other runs to draw beside it, such as a Transformer.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7, 4.5), dpi=150)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.12, top=0.97)
    axes = figure.add_subplot()
    runs = {label: log, **(baselines or {})}
    lowest, highest = float("inf"), 0.0
    for i, (name, source) in enumerate(runs.items()):
        rows = read_log(source)
        lead = f"{name}, " if name else ""
        for event, style, width in (("train", "-", 0.8), ("eval", "o-", 1.8)):
            points = [(r["tokens"], r["loss"]) for r in rows if r["event"] == event]
            if points:
                x, y = zip(*points, strict=True)
                what = "training" if event == "train" else "held-out"
                faint = 0.45 if event == "train" else 1.0
                axes.plot(x, y, style, color=f"C{i}", alpha=faint, linewidth=width, markersize=4, label=lead + what)
                lowest, highest = min(lowest, *y), max(highest, *y)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if highest:
        axes.set_ylim(lowest * 0.93, highest * 1.07)
        axes.legend()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    spread = highest / lowest if highest and lowest > 0 else 1.0
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.2g}") if spread < 20 else NullFormatter())
    axes.set_xlabel("tokens read")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25, which="both")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
