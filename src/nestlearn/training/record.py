"""What a run leaves behind beside its checkpoints: the log, and what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from nestlearn.io import atomic_write_json, atomic_write_text, load_json
from nestlearn.training.distributed import Processes
from nestlearn.training.plots import read_log

__all__ = ["RunLog", "describe_environment", "write_metadata"]


class RunLog:
    """The JSONL log of a run: one object per line, each flushed when it is written. A context manager.

    Args:
        path: The file. Lines of later steps than `step` (of a run that was cut off after its last checkpoint, and will
            come to these steps again) and a line that was cut off are removed.
        step: The step that the run goes on from.
    """

    def __init__(self, path: str | os.PathLike[str], *, step: int) -> None:
        self.path = Path(path)
        rows = [row for row in read_log(path) if row["step"] <= step] if self.path.is_file() else []
        self._known = {(row["event"], row["step"]) for row in rows}
        atomic_write_text(path, "".join(_line(row) for row in rows))
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, row: dict[str, Any]) -> bool:
        """Append one line; returns False where the log has that event of that step already.

        Raises: OSError that names the file where the disk refuses.
        """
        key = (row["event"], row["step"])
        if key in self._known:
            return False
        self._known.add(key)
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"could not write the log: {error.strerror}", str(self.path)) from error
        return True


def describe_environment(processes: Processes) -> dict[str, Any]:
    """Commit, versions, device, threads and time, as plain JSON types."""
    names = ("nestlearn", "torch", "numpy", "safetensors")
    device = processes.device
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # `python -m nestlearn` is the same command.
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "nestlearn"), *sys.argv[1:]],
        "commit": running_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size,
    }


def write_metadata(path: str | os.PathLike[str], facts: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write a run's ``run.json``: `facts`, and one entry of `environment` for each time the run was started."""
    earlier: list[Any] = []
    if Path(path).is_file():
        earlier = load_json(path).get("sessions", [])
    atomic_write_json(path, {**facts, "sessions": [*earlier, environment]})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def running_commit() -> dict[str, Any] | None:
    """The commit of the code that is running, where that is a git checkout: its hash, and whether the package (not the
    results beside it) has been changed since."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository (a virtual environment in it).
        git("ls-files", "--error-unmatch", __file__)
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
