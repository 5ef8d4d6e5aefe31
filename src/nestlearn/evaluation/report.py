"""Tables of results, and the two files that hold them."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import provenance
from nestlearn.io import atomic_write_json, atomic_write_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, its columns aligned; a float is written with three digits, None as a dash."""
    cells = [[str(name) for name in header], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
             for row in cells]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the values; None for a single one."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def with_error(values: Sequence[float], digits: int = 4, *, signed: bool = False) -> str:
    """ "mean ± standard error" of the values."""
    mean, error = mean_and_error(values)
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def write_report(out: Path, title: str, text: str, results: Mapping[str, Any]) -> str:
    """Writes `out`.json and `out`.md, both with the command and what it ran on.

    Args:
        out: path without suffix.
        title: heading of the page.
        text: its body, Markdown.
        results: plain JSON types; numbers must be finite (write None for those that are not). If the records under
            "runs" were made at other commits than the page, it says so.

    Returns:
        The page.
    """
    origin = {"command": command(), **provenance()}
    commits = {record["commit"] for record in results.get("runs", ()) if "commit" in record}
    made = "" if commits <= {origin["commit"]} else f" (runs made at {', '.join(sorted(commits))})"
    page = (
        f"# {title}\n\n{text}\n\nCommand: `{origin['command']}`. Commit {origin['commit']}{made}, torch "
        f"{origin['torch']}, {origin['device']}.\n"
    )
    atomic_write_json(out.with_name(out.name + ".json"), {**origin, **results})
    atomic_write_text(out.with_name(out.name + ".md"), page)
    return page


def command() -> str:
    """The command that is running, as one would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = Path(sys.argv[0]).name
    start = f"python -m {module.name}" if module is not None else name if not name.endswith(".py") else f"python {name}"
    return f"{start} {shlex.join(sys.argv[1:])}".strip()


def described(settings: Mapping[str, Any]) -> str:
    """A sentence with the settings that are not the defaults, and a space; nothing if there are none."""
    return f"With {', '.join(f'{name}={value}' for name, value in settings.items())}. " if settings else ""


def finite_or_none(value: float) -> float | None:
    """The number, or None where JSON has no form for it."""
    return value if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
