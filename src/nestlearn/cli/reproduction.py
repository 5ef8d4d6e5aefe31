"""`nestlearn reproduce`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from nestlearn.cli.shared import output, teaching
from nestlearn.evaluation.reproduce import NUMBERS, TABLES, Order, Scale, Table, reproduce


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@teaching
def reproduce_table(
    name: Annotated[str, typer.Argument(help="One of " + ", ".join([*TABLES, *NUMBERS]) + ".")],
    scale: Annotated[
        str, typer.Option(help="smoke (a minute, shows only that it runs), small (core-hours) or paper.")
    ] = "small",
    models: Annotated[str, typer.Option(help="Names separated by commas; all of the table by default.")] = "",
    columns: Annotated[str, typer.Option(help="Tasks separated by commas; all of the table by default.")] = "",
    seeds: Annotated[int, typer.Option(help="How many; 0: as many as the scale has.")] = 0,
    jobs: Annotated[int, typer.Option(help="Runs at once, one thread each.")] = 2,
    data_root: Annotated[Path | None, typer.Option(help="Folder of data sets; by default $NESTLEARN_DATA.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Path of the results, no suffix; by default results/NAME, with the scale if not small."),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default runs/NAME-SCALE, or runs/novels-SCALE.")
    ] = None,
) -> None:
    """Make a table of the paper: train its models, and put our numbers beside the paper's.

    Writes OUT.json, OUT.md and OUT.png. Given again, the command goes on where it was stopped.
    """
    name = NUMBERS.get(name, name)
    if name not in TABLES:
        raise ValueError(f"name: expected one of {', '.join([*TABLES, *NUMBERS])}; got {name!r}")
    if scale not in get_args(Scale):
        raise ValueError(f"--scale: expected one of {', '.join(get_args(Scale))}; got {scale!r}")
    if seeds < 0 or jobs < 1:
        raise ValueError(f"--seeds and --jobs: expected at least 0 and 1, got {seeds} and {jobs}")
    if data_root is not None:
        os.environ["NESTLEARN_DATA"] = str(data_root.resolve())  # the processes of the runs find it there too
    order = Order(
        scale=scale,  # type: ignore[arg-type]
        models=_names(models),
        columns=_names(columns),
        seeds=seeds,
        processes=jobs,
        # Tables of language models share runs, and so their folder.
        runs=runs or Path("runs") / f"{name if isinstance(TABLES[name], Table) else 'novels'}-{scale}",
        out=out or Path("results") / (name.replace("-", "_") + ("" if scale == "small" else f"_{scale}")),
    )
    order.out.parent.mkdir(parents=True, exist_ok=True)
    output().print(reproduce(TABLES[name], order), markup=False, soft_wrap=True)
