"""The picture of a benchmark: what a token, or a parameter, costs at every size. A horizontal line is linear cost."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from nestlearn.io import atomic_path


class Axes(NamedTuple):
    """What a benchmark's picture shows.

    Attributes:
        title: of each panel; {batch} is filled in.
        name: key of a row's name.
        x, y: keys of the numbers.
        x_label, y_label: with units.
    """

    title: str
    name: str
    x: str
    y: str
    x_label: str
    y_label: str


_TOKENS = ("model", "tokens", "microseconds_per_token")
AXES = {
    "train": Axes("training step, batch {batch}", *_TOKENS, "sequence length (tokens)", "µs per token"),
    "prefill": Axes("reading a prompt, batch {batch}", *_TOKENS, "prompt length (tokens)", "µs per token"),
    "decode": Axes("decoding, batch {batch}", *_TOKENS, "tokens in the context", "µs per token"),
    "optimizer": Axes("optimizer step", "optimizer", "parameters", "nanoseconds", "parameters", "ns per parameter"),
}


def plot_benchmark(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG: a panel for each batch size, a line for each candidate, whiskers from the fastest to the slowest
    turn.

    Args:
        report: of `benchmark_models` or `benchmark_optimizers`, with at least one row.
        path: the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes_of = AXES[report["benchmark"]]
    rows = [row for row in report["rows"] if not row.get("training")]
    batches = sorted({row.get("batch", 0) for row in rows})
    names = list(dict.fromkeys(row[axes_of.name] for row in rows))
    sizes = sorted({row[axes_of.x] for row in rows})
    legend = 0.19 * len(names) + 0.15  # inches
    height = 2.9 * len(batches) + legend + 0.3
    figure = Figure(figsize=(7, height), dpi=150)
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.55 / height, top=1 - (legend + 0.3) / height, hspace=0.32)
    panels = figure.subplots(len(batches), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, batch in zip(panels, batches, strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if row[axes_of.name] == name and row.get("batch", 0) == batch]
            x, y = [row[axes_of.x] for row in own], [row[axes_of.y] for row in own]
            scale = [row[axes_of.y] / row["milliseconds"] * 1000 for row in own]
            low = [value - min(row["seconds"]) * k for value, row, k in zip(y, own, scale, strict=True)]
            high = [max(row["seconds"]) * k - value for value, row, k in zip(y, own, scale, strict=True)]
            label = name.replace(":", ", ") if panel is panels[0] else None
            panel.errorbar(x, y, (low, high), fmt="o-", color=f"C{i}", markersize=4, capsize=3, label=label)
        panel.set_title(axes_of.title.format(batch=batch), fontsize=10)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.set_ylabel(axes_of.y_label)
        panel.grid(alpha=0.25, which="both")
    _label_decades(panels[0])
    panels[-1].set_xlabel(axes_of.x_label)
    figure.legend(loc="upper left", bbox_to_anchor=(0.13, 1.0), frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _label_decades(panel: Any) -> None:
    """Labels at 1, 2 and 5 of each decade, over at least a factor of four, so that two or more are seen."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = panel.get_ylim()
    panel.set_ylim(min(low, high / 4) * 0.9, high * 1.1)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
