"""Runs many small trainings side by side, each in a process of its own with one thread, and keeps what is done."""

from __future__ import annotations

import json
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nestlearn.io import atomic_write_text
from nestlearn.training.process import prepare_process

Job = Mapping[str, Any]
Record = dict[str, Any]


def run_jobs(work: Callable[[Job], Record], jobs: Iterable[Job], folder: Path, *, processes: int) -> list[Record]:
    """Runs `work` on every job and returns the records in the order of the jobs.

    Each job names itself by "name"; its record is written to `folder/<name>.json` as soon as it is there, and a job
    whose record exists is not run again: delete the file to repeat it.

    Args:
        work: a function at module level that takes a job and returns plain JSON types.
        jobs: what to do.
        folder: where records are kept.
        processes: how many run at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs)
    waiting = [job for job in jobs if not (folder / f"{job['name']}.json").exists()]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done already in {folder}", flush=True)
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(processes, max(1, len(waiting))), maxtasksperchild=1) as pool:
        tasks = [(work, job, folder) for job in waiting]
        for count, name in enumerate(pool.imap_unordered(_run_one, tasks), start=1):
            passed = time.monotonic() - started
            remaining = passed / count * (len(waiting) - count)
            print(f"[{count}/{len(waiting)}] {name}  {passed:.0f} s, about {remaining:.0f} s left", flush=True)
    return [json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs]


def _run_one(task: tuple[Callable[[Job], Record], Job, Path]) -> str:
    work, job, folder = task
    prepare_process(threads=1)
    started = time.monotonic()
    record = {"job": dict(job), **work(job), "seconds": round(time.monotonic() - started, 1), **provenance()}
    atomic_write_text(folder / f"{job['name']}.json", json.dumps(record, indent=1))
    return str(job["name"])


def provenance() -> Record:
    """What a number needs beside it: commit, versions, device, threads."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
