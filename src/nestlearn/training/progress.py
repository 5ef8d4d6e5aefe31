"""How a long run is going: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

__all__ = ["TrainingProgress", "duration"]


class TrainingProgress:
    """Shows step, loss, rate and the time that is left; a context manager.

    Args:
        total: Steps of the whole run.
        done: Steps that are done already.
        lines_every: Seconds between two lines where there is no terminal.
        silent: Show nothing (all processes but the first).
        stream: Where to write; standard error by default.
        doing: What the bar is labelled with.
        unit: What is counted.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int = 0,
        lines_every: float = 5.0,
        silent: bool = False,
        stream: TextIO | None = None,
        doing: str = "training",
        unit: str = "step",
    ) -> None:
        self._total, self._done, self._start_step = total, done, done
        self._lines_every, self._silent, self._unit = lines_every, silent, unit
        self._stream = stream if stream is not None else sys.stderr
        self._begin = time.perf_counter()
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not silent and self._stream.isatty():
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(doing, total=total, completed=done, text="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """So much is done. `loss` in nats per token."""
        if self._silent:
            return
        self._done = step
        left = duration(self.seconds_left())
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.perf_counter() - self._last_line >= self._lines_every or step == self._total:
            self._last_line = time.perf_counter()
            print(f"{self._unit} {step:,}/{self._total:,}  {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line of its own above the bar."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def seconds_left(self) -> float:
        """At the rate since this process began."""
        made = self._done - self._start_step
        return (time.perf_counter() - self._begin) / made * (self._total - self._done) if made else float("inf")


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``; a question mark while it is not known."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
