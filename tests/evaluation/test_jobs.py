"""Jobs side by side: what is done is kept, what fails is named, and a record is never taken for another job's."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nestlearn.evaluation.jobs import JobsFailed, run_jobs


def die(job):
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(job):
    with open(job["out"], "a") as file:
        file.write("called\n")
    time.sleep(job["seconds"])
    return {"done": True}


def square(job):
    if job["x"] < 0:
        raise ValueError("no negative numbers")
    return {"result": job["x"] ** 2}


def test_records_come_in_the_order_of_the_jobs_and_are_kept(tmp_path: Path) -> None:
    jobs = [{"name": f"job{x}", "x": x} for x in (3, 1, 2)]
    assert [record["result"] for record in run_jobs(square, jobs, tmp_path, processes=2)] == [9, 1, 4]
    path = tmp_path / "job3.json"
    record = json.loads(path.read_text())
    assert {"job", "result", "seconds", "commit", "torch", "device", "threads"} <= set(record)
    path.write_text(json.dumps({**record, "result": "kept"}))
    assert run_jobs(square, jobs, tmp_path, processes=1)[0]["result"] == "kept"


def test_a_failing_job_is_named_and_stops_no_other(tmp_path: Path) -> None:
    jobs = [{"name": "bad", "x": -1}, {"name": "good", "x": 2}]
    with pytest.raises(JobsFailed, match=r"1 of 2 jobs failed.*\nbad: ValueError: no negative numbers"):
        run_jobs(square, jobs, tmp_path, processes=1)
    assert (tmp_path / "good.json").exists()
    assert not (tmp_path / "bad.json").exists()


def test_a_record_of_another_job_is_refused(tmp_path: Path) -> None:
    run_jobs(square, [{"name": "a", "x": 1}], tmp_path, processes=1)
    with pytest.raises(ValueError, match=r"a\.json holds the record of another job"):
        run_jobs(square, [{"name": "a", "x": 2}], tmp_path, processes=1)
    with pytest.raises(ValueError, match="a name of its own"):
        run_jobs(square, [{"name": "b", "x": 1}, {"name": "b", "x": 1}], tmp_path, processes=1)


def test_a_record_may_lie_elsewhere(tmp_path: Path) -> None:
    run_jobs(square, [{"name": "a", "x": 1, "folder": "here"}], tmp_path, processes=1)
    (record,) = run_jobs(square, [{"name": "a", "x": 1, "folder": "/there"}], tmp_path, processes=1)
    assert record["result"] == 1


def test_a_process_that_is_killed_does_not_keep_others_waiting(tmp_path: Path) -> None:
    with pytest.raises(JobsFailed, match="its process, or one beside it, was killed"):
        run_jobs(die, [{"name": "a"}], tmp_path, processes=1)


def test_two_commands_at_one_folder_do_a_job_once(tmp_path: Path) -> None:
    job = {"name": "slow", "seconds": 1.0, "out": str(tmp_path / "count")}
    with ThreadPoolExecutor(2) as both:
        given = [both.submit(run_jobs, count_calls, [job], tmp_path / "records", processes=1) for _ in range(2)]
        first, second = (each.result() for each in given)
    assert first == second
    assert (tmp_path / "count").read_text() == "called\n"
