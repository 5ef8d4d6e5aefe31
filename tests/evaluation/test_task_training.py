"""A run on a task goes on bitwise where it was stopped, and is marked on what it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evaluation import task_training
from nestlearn.evaluation.task_training import build_for_task, evaluate_task, train_on_task
from nestlearn.evaluation.tasks import build_task
from nestlearn.models.lstm import LSTMLM

PARITY = {"task": "formal_language", "language": "parity", "longest": 12}
HOPE = {"dim": 16, "depth": 1, "heads": 1, "cms_periods": [1], "cms_expansion": 1.0, "chunk_size": 4}


def make_job(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "model": HOPE,
        "training": PARITY,
        "validation": PARITY,
        "tests": {"short": PARITY, "long": {**PARITY, "shortest": 13, "longest": 20}},
        "steps": 6,
        "batch_size": 4,
        "lr": 3e-3,
        "warmup": 2,
        "weight_decay": 0.1,
        "seed": 0,
        "examples": 0,
        "every": 2,
        "settled": 1,
        "test_sequences": 8,
        "test_batch": 3,
        "folder": str(folder),
        **changes,
    }


@pytest.mark.parametrize("examples", [0, 12])
def test_a_run_goes_on_bitwise(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_on_task(make_job(tmp_path / "whole", examples=examples))
    monkeypatch.setattr(task_training, "SAVE_SECONDS", 0)
    clock = iter(range(10**6))
    monkeypatch.setattr(task_training.time, "monotonic", lambda: next(clock))

    class Stopped(Exception):
        pass

    steps = 0
    before = task_training._batch

    def stop_after_three(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise Stopped
        return before(*given)

    monkeypatch.setattr(task_training, "_batch", stop_after_three)
    with pytest.raises(Stopped):
        train_on_task(make_job(tmp_path / "stopped", examples=examples))
    went_on: list[int] = []
    monkeypatch.setattr(task_training, "_batch", lambda *given: went_on.append(given[-1]) or before(*given))
    again = train_on_task(make_job(tmp_path / "stopped", examples=examples))
    assert again == whole
    assert went_on == [3, 4, 5]
    assert [point["step"] for point in whole["curve"]] == [2, 4, 6]


def test_a_fixed_set_is_read_whole_in_every_pass_and_a_fresh_one_never_repeats() -> None:
    task = build_task(PARITY)
    job = make_job(Path(), examples=12)
    fixed = task_training._fixed_set(task, job)
    rows = [task_training._batch(task, fixed, job, step) for step in range(6)]
    for first in (0, 3):
        read = torch.cat([batch.tokens for batch in rows[first : first + 3]])
        assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, fixed.tokens.tolist()))
    assert not torch.equal(rows[0].tokens, rows[3].tokens)
    fresh = [task_training._batch(task, None, job, step).tokens for step in range(2)]
    assert not torch.equal(*fresh)


def test_a_model_that_is_right_stops_and_one_that_diverges_says_so(tmp_path: Path) -> None:
    easy = {"task": "formal_language", "language": "parity", "longest": 1}
    settings = {
        "training": easy,
        "validation": easy,
        "tests": {"t": easy},
        "batch_size": 16,
        "lr": 1e-2,
        "settled": 2,
        "every": 5,
    }
    done = train_on_task(make_job(tmp_path / "a", model={"lstm": True, "dim": 32, "depth": 1}, steps=400, **settings))
    assert done["steps"] < 400
    assert [point["exact"] for point in done["curve"][-2:]] == [1.0, 1.0]
    assert done["tests"]["t"] == {"accuracy": 1.0, "exact": 1.0}
    broken = train_on_task(make_job(tmp_path / "b", lr=1e30))
    assert broken["diverged"]
    assert broken["steps"] < 6


def test_marks_do_not_depend_on_how_many_are_read_at_once() -> None:
    task = build_task(PARITY)
    model = build_for_task(HOPE, task, seed=0)
    examples = task.sample(7, torch.Generator().manual_seed(0))
    marks = {evaluate_task(model, task, examples, size) for size in (1, 3, 7)}
    assert len(marks) == 1


def test_models_and_tasks_by_description() -> None:
    task = build_task(PARITY)
    assert isinstance(build_for_task({"lstm": True, "dim": 4, "depth": 1}, task, seed=0), LSTMLM)
    first, second = (build_for_task(HOPE, task, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="an LSTM has no form for compression"):
        build_for_task({"lstm": True, "dim": 4, "depth": 1}, build_task({"task": "compression"}), seed=0)
    with pytest.raises(ValueError, match="task: expected one of associative_recall"):
        build_task({"task": "chess"})
    with pytest.raises(ValueError, match=r"formal_language: .*colour"):
        build_task({**PARITY, "colour": 1})


def test_what_is_looked_at_while_it_trains_changes_no_step_and_no_mark(tmp_path: Path) -> None:
    longer = {**PARITY, "shortest": 13, "longest": 20}
    one, other = (
        train_on_task(make_job(tmp_path / name, validation=task)) for name, task in (("a", PARITY), ("b", longer))
    )
    assert [p["loss"] for p in one["curve"]] == [p["loss"] for p in other["curve"]]
    assert [p["accuracy"] for p in one["curve"]] != [p["accuracy"] for p in other["curve"]]
    assert one["tests"] == other["tests"]
