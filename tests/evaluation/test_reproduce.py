"""`nestlearn reproduce`: every table at its smallest, what its page says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from nestlearn.cli.app import app
from nestlearn.evaluation.reproduce import NUMBERS, TABLES, Column, Order, Plan, Scale, Table, reproduce
from nestlearn.evaluation.reproduce.models import table_models
from nestlearn.evaluation.reproduce.page import describe
from nestlearn.evaluation.reproduce.runner import best_rates, make_job
from nestlearn.evaluation.task_training import build_for_task
from nestlearn.evaluation.tasks import build_task

WITH_DATA = ("needles", "babilong")


def run(table: str, tmp_path: Path, *more: str) -> Any:
    given = ["reproduce", table, "--scale", "smoke", "--jobs", "1", "--out", str(tmp_path / "t"), *more]
    return CliRunner().invoke(app, [*given, "--runs", str(tmp_path / "runs")])


@pytest.mark.parametrize("name", [name for name in TABLES if name not in WITH_DATA])
def test_every_table_is_made_at_the_smallest_scale(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", WITH_DATA)
def test_tables_that_read_novels_are_made_at_the_smallest_scale(name: str, tmp_path: Path, data_dir: Path) -> None:
    check(name, tmp_path, "--data-root", str(data_dir))


def check(name: str, tmp_path: Path, *more: str) -> None:
    models = ",".join(TABLES[name].models[:2])
    columns = next(iter(TABLES[name].plan("smoke").columns))
    done = run(name, tmp_path, "--models", models, "--columns", columns, *more)
    assert done.exit_code == 0, done.output
    page, results = (tmp_path / "t.md").read_text(), json.loads((tmp_path / "t.json").read_text())
    assert len(results["runs"]) == 2
    for record in results["runs"]:
        assert f"| {record['job']['table_model']} " in page
        assert record["steps"] == record["job"]["steps"]
        assert all(0 <= marks[score] <= 1 for marks in record["tests"].values() for score in ("exact", "accuracy"))
    sizes = [record["parameters"] for record in results["runs"]]
    assert max(sizes) < 1.1 * min(sizes)
    assert (tmp_path / "t.png").stat().st_size > 5000
    again = run(name, tmp_path, "--models", models, "--columns", columns, *more)
    assert "2 of 2 jobs are done already" in again.output


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("name", TABLES)
def test_plans_are_whole(name: str, scale: Scale) -> None:
    table = TABLES[name]
    plan = table.plan(scale)
    for column in plan.columns.values():
        assert column.tests
        if name not in WITH_DATA:
            vocabularies = {build_task(task).vocab_size for task in (column.training, *column.tests.values())}
            assert len(vocabularies) == 1
    if scale != "smoke":
        for row in table.paper.values():
            assert set(row) == set(plan.columns)
        table_models(table.models, plan.size, table.settings, 16)
    assert set(table.paper) <= set(table.models)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    for more, message in (
        (("--models", "mamba"), "models: expected some of"),
        (("--columns", "chess"), "columns: expected some of parity"),
        (("--scale", "huge"), "--scale: expected one of smoke, small, paper"),
        (("--jobs", "0"), "at least 0 and 1"),
    ):
        done = run("formal-languages", tmp_path, *more)
        assert done.exit_code == 2
        assert message in done.output
    assert "name: expected one of" in run("table99", tmp_path).output
    assert set(NUMBERS.values()) <= set(TABLES)


def made(model: str, column: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    job = {"table_model": model, "column": column, "seed": seed, "lr": 1e-3, "steps": 9, **more}
    marks = {"exact": score, "accuracy": score}
    return {"job": job, "tests": {"test": marks}, "curve": [{"step": 9, **marks}], "steps": 9,
            "parameters": 1000, "seconds": 60.0, "diverged": False}  # fmt: skip


def test_the_page_has_means_errors_averages_and_the_paper() -> None:
    columns = {"a": Column(training={}, tests={"test": {}}), "b": Column(training={}, tests={"test": {}})}
    runs = {"test_sequences": 8, "batch_size": 2, "steps": 9, "settled": 2, "every": 3}
    plan = Plan(columns=columns, size={"dim": 4, "depth": 1}, rates=(1e-3,), runs=runs, seeds=2)
    table = Table(
        title="T",
        models=("hope",),
        score="accuracy",
        plan=lambda scale: plan,
        average=True,
        paper={"hope": {"a": "10", "b": "30"}},
    )
    scores = [made("hope", column, seed, score) for column, seed, score in
              (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 1.0), ("b", 1, 1.0))]  # fmt: skip
    page = describe(table, plan, scores, [], "small")
    assert "60.0 ± 10.0" in page
    assert "| 80.0 ± 5.0 |" in page.replace("  ", "")
    assert "| 20.0" in page
    assert "| hope, paper" in page


def test_the_best_rate_is_the_one_that_ends_best_and_of_equals_the_faster() -> None:
    table = TABLES["mad"]
    runs = [
        made("hope", "a", 0, 0.5, lr=1e-3),
        made("hope", "a", 0, 0.9, lr=3e-3) | {"steps": 7},
        made("hope", "a", 0, 0.9, lr=1e-2),
        made("hope", "b", 0, 0.1, lr=1e-3),
        made("hope", "b", 0, 0.9, lr=3e-3) | {"diverged": True, "curve": []},
        made("hope", "c", 0, 0.9, lr=3e-3) | {"diverged": True, "steps": 2},
        made("hope", "c", 0, 0.9, lr=1e-3) | {"diverged": True, "steps": 5},
    ]
    assert best_rates(runs, table) == {("hope", "a"): 3e-3, ("hope", "b"): 1e-3, ("hope", "c"): 1e-3}


def test_a_job_is_named_by_all_that_it_computes(tmp_path: Path) -> None:
    plan = TABLES["formal-languages"].plan("smoke")
    order = Order(scale="smoke", runs=tmp_path, out=tmp_path / "x")
    column = plan.columns["parity"]
    given = [({"dim": 4}, 1e-3, 0), ({"dim": 8}, 1e-3, 0), ({"dim": 4}, 2e-3, 0), ({"dim": 4}, 1e-3, 1)]
    names = {make_job("hope", "parity", column, config, plan, order, lr, seed)["name"] for config, lr, seed in given}
    assert len(names) == 4


def test_models_are_as_large_as_the_first() -> None:
    size = {"dim": 32, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0}
    task = build_task({"task": "formal_language", "language": "parity"})
    names = ("hope", "transformer", "lstm", "titans")
    models = table_models(names, size, {"hope": {"negative_eigenvalues": True}}, task.vocab_size)
    counts = [
        sum(p.numel() for p in build_for_task(settings, task, seed=0).parameters()) for settings in models.values()
    ]
    assert max(counts) < 1.05 * min(counts)
    assert models["hope"]["negative_eigenvalues"] is True
    with pytest.raises(ValueError, match=r"models: expected some of .*lstm; got mamba"):
        table_models(("mamba",), size, {}, 4)


def test_an_order_needs_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="eltec_eng"):
        reproduce(TABLES["babilong"], Order(scale="smoke", runs=tmp_path / "r", out=tmp_path / "x"))


def test_babilong_never_shows_a_story_of_one_side_on_another(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    for question in ("qa1", "qa4"):
        description = {"task": "babilong", "question": question, "words": 1024, "length": 128, "most_facts": 6}
        sides = [set(build_task({**description, "side": side}).stories) for side in ("train", "validation", "test")]  # type: ignore[attr-defined]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
