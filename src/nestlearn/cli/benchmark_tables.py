"""The tables of `nestlearn bench`, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

WIDTH = 80
HEADS = {
    "train": "Training step: width {dim}, {depth} blocks, {heads} heads",
    "prefill": "Reading a prompt: width {dim}, {depth} blocks, {heads} heads",
    "decode": "Decoding a token after T others: width {dim}, {depth} blocks, {heads} heads",
    "optimizer": "Optimizer step on the parameters of {model}: {depth} blocks, {heads} heads",
}
MODELS_LEGEND = (
    "ratio: time over the Transformer's in the same turn, median (least-most). MB: what a step adds to the memory of "
    "a process that holds the model. floor: time over the least time in which this machine could compute and move what "
    "the step needs."
)
OPTIMIZERS_LEGEND = (
    "ratio: time over AdamW's in the same turn, median (least-most). MB: the optimizer's state. floor: time over that "
    "of moving what AdamW must."
)
BARE_LINE = (
    "m3's step takes {bare_ratio:.2f} ({bare_ratio_min:.2f}-{bare_ratio_max:.2f}) times one bare Newton-Schulz pass "
    "over the same matrices and a step of AdamW; its state has {state_floats:.0f} numbers a parameter."
)


def benchmark_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report of a benchmark as lines for a terminal."""
    settings, environment, machine = report["settings"], report["environment"], report["machine"]
    optimizers = report["benchmark"] == "optimizer"
    head = HEADS[report["benchmark"]].format(**settings)
    copy = list(machine["copy_gigabytes_per_second"].values())[-1]
    yield from textwrap.wrap(
        f"{head}, fp32, {environment['device']}, {environment['threads']} threads, medians of "
        f"{settings['alternations']} turns. The machine: {machine['product_gflops_per_second']:.0f} GFLOP/s in large "
        f"products, {machine['batched_product_gflops_per_second']:.0f} in products of 64 x 64, {copy:.0f} GB/s.",
        WIDTH,
    )
    for size, rows in groupby(report["rows"], _size_of):
        yield ""
        yield _line(size, "ms", "ns/param" if optimizers else "tokens/s", "ratio", "(range)", "MB",
                    "" if optimizers else "ratio", "floor")  # fmt: skip
        for row in rows:
            name, *details = (row["optimizer"] if optimizers else row["model"]).split(":")
            yield _line(
                name,
                short(row["milliseconds"]),
                short(row["nanoseconds"] if "optimizer" in row else row["tokens_per_second"]),
                _ratio(row["ratio"]),
                f"({_ratio(row['ratio_min'])}-{_ratio(row['ratio_max'])})",
                short(row["state_megabytes"] if optimizers else row.get("growth_megabytes")),
                "" if optimizers else _ratio(row.get("memory_ratio")),
                f"{_ratio(row['over_floor'])}x",
            )
            yield from (f"  {detail}" for detail in details)
            if "bare_ratio" in row:
                yield from textwrap.wrap(BARE_LINE.format(**row), WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    yield from textwrap.wrap(OPTIMIZERS_LEGEND if optimizers else MODELS_LEGEND, WIDTH)


def _size_of(row: dict[str, Any]) -> str:
    if row.get("training"):
        return "training step, to SGD"
    return f"{row['parameters']:,} numbers" if "optimizer" in row else f"T {row['tokens']:,}, batch {row['batch']}"


def _line(name: str, *cells: str) -> str:
    widths = (7, 8, 6, 13, 7, 6, 6)  # with the name and the spaces between them: WIDTH
    return f"{name:21}" + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def short(value: float | None, most: int = 99_999) -> str:
    """Three digits, or all before the point up to `most` and with a unit (k, M, G) above it; a dash for None."""
    if value is None:
        return "-"
    unit = ""
    if value >= most + 0.5:
        unit = "k" if value < 999_500 else "M" if value < 999.5e6 else "G"
        value /= {"k": 1e3, "M": 1e6, "G": 1e9}[unit]
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"


def _ratio(value: float | None) -> str:
    """At most five characters."""
    return short(value, most=999)
