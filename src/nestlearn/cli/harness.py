"""`nestlearn eval --tasks`: lm-evaluation-harness."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.table import Table

from nestlearn.cli.shared import output, print_json, say

WINDOW = 2048  # tokens, where neither the user nor the run says another number


def run_tasks(
    model: Path,
    tasks: list[str],
    *,
    limit: int,
    carry: bool,
    window: int | None,
    batch_size: int,
    include_path: Path | None,
    device: str,
) -> dict[str, Any]:
    """The measures of a run, checkpoint or exported folder, with how they were made."""
    if limit < 0:
        raise ValueError(f"--limit: expected 0 (all documents) or more, got {limit}")
    try:
        from nestlearn.hub.harness import evaluate_tasks
    except ImportError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ImportError("--tasks needs lm-evaluation-harness: pip install 'nestlearn[eval]'") from error
    from nestlearn.hub.loading import load

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has advice for other uses than this one
    loaded, tokenizer = load(model, device=device)
    window = window or WINDOW
    say(f"asking {', '.join(tasks)}")
    found = evaluate_tasks(
        loaded,
        tokenizer,
        tasks,
        limit=limit or None,
        carry=carry,
        window=window,
        batch_size=batch_size,
        include_path=include_path,
    )
    return {"model": str(model), "limit": limit or None, "carry": carry, "window": window, "tasks": found}


def show_tasks(report: dict[str, Any], *, as_json: bool) -> None:
    """The same as JSON or as a table."""
    if as_json:
        print_json(report)
        return
    table = Table("task", "measure", "value", "documents")
    for task, measured in report["tasks"].items():
        for name, value in measured.items():
            if name != "samples":
                table.add_row(task, name, f"{value:,.4f}", f"{measured['samples']:,}")
    output().print(table)
