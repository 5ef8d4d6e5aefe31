"""`nestlearn bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nestlearn.cli.shared import output, print_json, say, teaching
from nestlearn.evaluation.benchmark import MIXERS, TrainingBenchmark, benchmark_training
from nestlearn.io import atomic_write_json


@teaching
def bench_train(
    mixers: Annotated[
        str | None,
        typer.Option(help=f"Models beside the Transformer, separated by commas; default: {', '.join(MIXERS)}."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "512,2048",
    dim: Annotated[int, typer.Option(help="Model width.")] = 256,
    depth: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    alternations: Annotated[int, typer.Option(help="How often all models are timed in turn.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time a training step of each mixer, as a ratio to a plain Transformer of the same width and depth.

    All models take turns in one process, in fp32; numbers are medians over the turns. A model that does not read a
    whole sequence as it does its tokens one by one is refused, and no speed is printed.
    """
    report = benchmark_training(
        TrainingBenchmark(
            mixers=MIXERS if mixers is None else tuple(name.strip() for name in mixers.split(",")),
            lengths=_numbers(lengths),
            dim=dim,
            depth=depth,
            heads=heads,
            batch=batch,
            alternations=alternations,
            threads=threads,
            device=device,
            seed=seed,
        ),
        notice=say,
    )
    if out is not None:
        atomic_write_json(out, report)
    if as_json:
        print_json(report)
        return
    output().print(benchmark_table(report))
    if out is not None:
        output().print(f"written to {out}", markup=False, soft_wrap=True)


def benchmark_table(report: dict[str, Any]) -> Table:
    """The report of `benchmark_training` as a table."""
    settings, environment = report["settings"], report["environment"]
    table = Table(
        title=f"Training step: width {settings['dim']}, {settings['depth']} blocks, {settings['heads']} heads, batch "
        f"{settings['batch']}, fp32, {environment['device']}, {environment['threads']} threads, medians of "
        f"{settings['alternations']} turns; ratio: time over the Transformer's",
        title_justify="left",
    )
    table.add_column("model", no_wrap=True, min_width=max(len(row["model"]) for row in report["rows"]))
    for column in ("T", "ms", "tokens/s", "ratio", "(range)", "GFLOP/s", "parameters"):
        table.add_column(column, justify="right")
    rows = report["rows"]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row["model"],
            f"{row['tokens']:,}",
            f"{row['milliseconds']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['gflops_per_second']:.1f}",
            f"{row['parameters']:,}",
            end_section=following is not None and following["tokens"] != row["tokens"],
        )
    return table


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise ValueError(f"--lengths: expected whole numbers separated by commas, got {text!r}") from None
