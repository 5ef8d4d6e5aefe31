"""Runs many small trainings side by side, each in a process of its own with one thread, and keeps what is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nestlearn.io import atomic_write_text
from nestlearn.training.process import prepare_process
from nestlearn.training.record import running_commit

Job = Mapping[str, Any]
Record = dict[str, Any]

# Where a job keeps its files: says nothing about what it computes.
_PLACES = ("folder",)


class JobsFailed(RuntimeError):
    """Some jobs have no record; the others are kept."""


def run_jobs(work: Callable[[Job], Record], jobs: Iterable[Job], folder: Path, *, processes: int) -> list[Record]:
    """Runs `work` on every job and returns the records in the order of the jobs.

    Each job names itself by "name"; its record is written to `folder/<name>.json` as soon as it is there, and a job
    whose record exists is not run again: delete the file to repeat it. A job that fails does not stop the others. Two
    commands may share a folder: one waits for a job that the other is at.

    Args:
        work: a function at module level that takes a job and returns plain JSON types.
        jobs: what to do.
        folder: where records are kept.
        processes: how many run at once.

    Raises:
        ValueError: if two jobs share a name, or a record belongs to another job of the same name.
        JobsFailed: at the end, naming the jobs that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(jobs)
    if len({job["name"] for job in jobs}) < len(jobs):
        raise ValueError("every job needs a name of its own")
    waiting = [job for job in jobs if not _is_done(job, folder)]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done already in {folder}", flush=True)
    failures = [failure for failure in _run_all(work, waiting, folder, processes) if failure]
    if failures:
        raise JobsFailed(f"{len(failures)} of {len(jobs)} jobs failed, the others are kept:\n" + "\n".join(failures))
    return [json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs]


def _run_all(work: Callable[[Job], Record], jobs: list[Job], folder: Path, processes: int) -> Iterator[str | None]:
    """What went wrong with each job, or None, as they end."""
    if not jobs:
        return
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn, max_tasks_per_child=1) as pool:
        names = {pool.submit(_run_one, work, job, folder): job["name"] for job in jobs}
        try:
            for count, done in enumerate(as_completed(names), start=1):
                try:
                    failure = done.result()
                except BrokenProcessPool:
                    failure = "its process, or one beside it, was killed; is there enough memory for so many at once?"
                passed = time.monotonic() - started
                remaining = passed / count * (len(jobs) - count)
                print(f"[{count}/{len(jobs)}] {names[done]}  {passed:.0f} s, about {remaining:.0f} s left", flush=True)
                yield f"{names[done]}: {failure}" if failure else None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_done(job: Job, folder: Path) -> bool:
    path = folder / f"{job['name']}.json"
    if not path.exists():
        return False
    if _computed(json.loads(path.read_text())["job"]) != _computed(json.loads(json.dumps(dict(job)))):
        raise ValueError(
            f"{path} holds the record of another job of the same name (its settings differ); "
            f"move or delete it, or choose another folder"
        )
    return True


def _computed(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name not in _PLACES}


def _run_one(work: Callable[[Job], Record], job: Job, folder: Path) -> str | None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_process(threads=1)
    # Another command may be at the same job: whoever comes second waits, and finds it done.
    with FileLock(folder / f".{job['name']}.lock"):
        if _is_done(job, folder):
            return None
        started = time.monotonic()
        origin = provenance()  # before the work: the code that is running, not what the folder holds hours later
        try:
            result = work(job)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        record = {"job": dict(job), **result, "seconds": round(time.monotonic() - started, 1), **origin}
        atomic_write_text(folder / f"{job['name']}.json", json.dumps(record, indent=1))
    return None


def _end_with_parent() -> None:
    """A process whose parent was killed has nobody left to work for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def provenance() -> Record:
    """What a number needs beside it: commit, versions, device, threads."""
    found = running_commit()
    return {
        "commit": found and found["hash"][:12] + ("-dirty" if found["changed"] else ""),
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
