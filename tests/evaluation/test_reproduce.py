"""`nestlearn reproduce`: every table at its smallest, what its page says, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from nestlearn.cli.app import app
from nestlearn.evaluation.language_modeling import model_config
from nestlearn.evaluation.matching import count_parameters
from nestlearn.evaluation.reproduce import (
    NUMBERS,
    TABLES,
    Column,
    NovelsTable,
    Order,
    Plan,
    Scale,
    Table,
    ablation,
    context_use,
    language_modeling,
    novels,
    reproduce,
)
from nestlearn.evaluation.reproduce.models import state_floats, table_models
from nestlearn.evaluation.reproduce.page import describe
from nestlearn.evaluation.reproduce.runner import best_rates, make_job
from nestlearn.evaluation.task_training import build_for_task
from nestlearn.evaluation.tasks import build_task
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.data import load_tokenizer

WITH_DATA = ("needles", "babilong")
NOVELS = tuple(name for name, table in TABLES.items() if isinstance(table, NovelsTable))
TASKS = tuple(name for name, table in TABLES.items() if isinstance(table, Table))


def run(table: str, tmp_path: Path, *more: str) -> Any:
    given = ["reproduce", table, "--scale", "smoke", "--jobs", "1", "--out", str(tmp_path / "t"), *more]
    return CliRunner().invoke(app, [*given, "--runs", str(tmp_path / "runs")])


@pytest.mark.parametrize("name", [name for name in TASKS if name not in WITH_DATA])
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


@pytest.mark.parametrize("name", NOVELS)
def test_tables_of_language_models_are_made_at_the_smallest_scale(name: str, tmp_path: Path, data_dir: Path) -> None:
    models = list(TABLES[name].models)[:2]
    given = ("--models", ",".join(models), "--data-root", str(data_dir))
    done = run(name, tmp_path, *given)
    assert done.exit_code == 0, done.output
    page, results = (tmp_path / "t.md").read_text(), json.loads((tmp_path / "t.json").read_text())
    assert [record["job"]["model"] for record in results["runs"]] == models
    assert all(f"{model.removeprefix('hope/')} " in page for model in models)
    assert str(data_dir) not in (tmp_path / "t.json").read_text()
    learners = [model for model in models if model in TABLES[name].learners]  # type: ignore[union-attr]
    assert len(results["measured"]) == (2 if TABLES[name].measure else 0) + len(learners)  # type: ignore[union-attr]
    assert all(f"| {model}, levels learn " in page for model in learners)
    assert (tmp_path / "t.png").stat().st_size > 5000
    done = run(name, tmp_path, *given)
    assert "2 of 2 jobs are done already" in done.output
    assert (tmp_path / "t.md").read_text() == page
    refused = run(name, tmp_path, "--columns", "parity")
    assert "columns: this table has one task only" in refused.output


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("name", NOVELS)
def test_language_models_of_a_table_are_as_large_as_hope(name: str, scale: Scale) -> None:
    table = TABLES[name]
    assert isinstance(table, NovelsTable)
    plan = table.plan(scale)
    target = count_parameters(model_config("hope", **plan.size, **table.models["hope"]))
    for model, settings in table.models.items():
        config = model_config(model, target=target, **{**plan.size, **settings})
        assert abs(count_parameters(config) / target - 1) < (0.1 if scale == "smoke" else 0.01)
    assert plan.measure["window"] % plan.runs["sequence_length"] == 0


def trained(model: str, seed: int, bits: float, *, diverged: bool = False) -> dict[str, Any]:
    held_out = [{"step": 1, "tokens": 8, "loss": bits, "bits_per_byte": bits}]
    return {"job": {"name": f"{model}-{seed}", "model": model, "seed": seed, "lr": 1e-3}, "held_out": held_out,
            "train": [{"step": 1, "tokens": 8, "loss": 1.0, "seconds": 2.0}], "parameters": 1000, "seconds": 60.0,
            "diverged": "at step 1" if diverged else None}  # fmt: skip


def test_the_cost_of_a_part_is_paired_by_seed() -> None:
    records = [
        trained("hope", 0, 2.0), trained("hope", 1, 2.2),
        trained("hope/without DGD", 0, 2.1), trained("hope/without DGD", 1, 2.5),
        trained("hope/static k", 0, 2.1), trained("hope/static k", 1, 9.0, diverged=True),
        trained("hope/adaptive q", 0, 9.0, diverged=True),
    ]  # fmt: skip
    found = ablation.costs(records)
    assert found == {"hope/without DGD": pytest.approx([0.1, 0.3]), "hope/static k": pytest.approx([0.1])}
    assert ablation.paper_cost("hope/without DGD") == pytest.approx(math.log2(13.41 / 12.24))
    assert ablation.paper_cost("hope/with momentum") == pytest.approx(-math.log2(13.58 / 12.24))
    assert ablation.paper_cost("hope") is None
    page = ablation.page(records, {}, ablation.TABLE.plan("small"))
    assert "+0.2000 ± 0.1000" in page
    assert "diverged in 1" in page
    assert "| 2.1000 (1 diverged) |" in page.replace("  ", "")


def test_zero_shot_marks_stand_beside_the_papers() -> None:
    marks = {"lambada": {"accuracy": 0.25, "bits": 9.0}, "piqa": {"accuracy": 0.5, "normalised": 0.4, "chance": 0.5}}
    page = language_modeling.page([trained("hope", 0, 2.0)], {"hope-0": marks}, language_modeling.TABLE.plan("small"))
    assert "| 9.00 " in page
    assert "| 25.0 " in page
    assert "by guessing: piqa 50.0" in page
    assert "14.39" in page


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("name", TASKS)
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
            assert set(row) >= set(plan.columns)
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


def test_models_may_have_more_seeds_than_others(tmp_path: Path) -> None:
    table = TABLES["formal-languages"]
    plan = replace(table.plan("smoke"), seeds=1, seeds_of={"hope": 2})
    table = replace(table, plan=lambda scale: plan)
    order = Order(scale="smoke", runs=tmp_path / "r", out=tmp_path / "x", models=("hope", "lstm"), columns=("parity",))
    page = reproduce(table, order)
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert [(run["job"]["table_model"], run["job"]["seed"]) for run in runs] == [("hope", 0), ("lstm", 0), ("hope", 1)]
    assert len([line for line in page.splitlines() if line.startswith(("| hope  ", "| lstm  "))]) >= 2
    reproduce(table, replace(order, seeds=2, runs=tmp_path / "s"))
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert sum(run["job"]["table_model"] == "lstm" for run in runs) == 2


def test_what_a_model_carries_is_counted_without_snapshots_and_padding() -> None:
    size = {"dim": 16, "depth": 2, "heads": 2, "conv_width": 4}
    tail = 3 * 4 * 16  # of the convolutions of q, k, v and the gates
    memory = 2 * 2 * 8 * 8  # one of both heads, two maps of 8 x 8
    assert state_floats(size) == 2 * (3 * memory + 2 * memory // 4 + tail)
    assert state_floats({**size, "momentum": True}) == 2 * (2 * (3 * memory + 2 * memory // 4) + tail)
    assert state_floats({**size, "gate_hidden_ratio": 1.0, "adaptive_query": True}) == 2 * (6 * memory + tail)
    wide = {**size, "mixer": "tnt"}
    assert state_floats({**wide, "momentum": True}) - state_floats(wide) == 2 * (4 * memory + 2 * memory // 4)  # type: ignore[operator]
    assert state_floats({**size, "mixer": "delta_net"}) == 2 * (2 * 8 * 8 + 3 * 3 * 16)
    assert state_floats({**size, "mixer": "plain_attention"}) is None
    assert state_floats({"lstm": True, "dim": 5, "depth": 3}) == 30


def test_losses_that_are_not_finite_leave_a_page() -> None:
    plan = language_modeling.TABLE.plan("small")
    marks = {"lambada": {"accuracy": 0.0, "bits": None}, "piqa": {"accuracy": 0.5, "normalised": 0.4, "chance": 0.5}}
    assert "not finite" in language_modeling.page([trained("hope", 0, 2.0)], {"hope-0": marks}, plan)
    fine = {"begin": 0, "end": 512, "bits": 2.0, "gain": 0.0, "error": 0.01}
    records = [trained("hope", 0, 2.0), trained("titans", 0, 2.0)]
    measured = {"hope-0": [fine, {**fine, "begin": 512, "end": 1024}], "titans-0": [fine, {**fine, "bits": None}]}
    page = context_use.page(records, measured, plan)
    assert "| hope " in page
    assert "| titans " not in page
    assert "Left out, for losses that were not finite: titans" in page
    assert "at most 0.0100" in page
    assert "levels learn" not in page
    learnt = [{**fine, "bits": 1.9}, {**fine, "begin": 512, "end": 1024, "bits": 1.8, "gain": 0.2}]
    tried: list[float | None] = [2.0, 1.9, *[None] * (len(plan.learning) - 2)]
    learning = {"hope-0, levels learn": {"tried": tried, "chosen": plan.learning[1], "stretches": learnt}}
    page = context_use.page(records[:1], {**measured, **learning}, plan)
    assert "| hope, levels learn | 1     | 1.900 | 1.800     |" in page
    assert "| 2.0000 " in page
    assert page.count("gd 0.2 every 128") == 2  # a column, and what was chosen
    none = {"hope-0, levels learn": {"tried": [None] * len(plan.learning), "chosen": None, "stretches": None}}
    page = context_use.page(records[:1], {**measured, **none}, plan)
    assert "not finite: hope, levels learn" in page
    assert context_use.page(records[1:], {"titans-0": measured["titans-0"]}, plan) == "No model's loss was finite."


def test_levels_learn_by_the_rule_that_is_best_on_the_training_side(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(dim=16, depth=1, heads=2))
    job = {"sequence_length": 32, "window": 128, "window_tokens": 512, "choosing_tokens": 512, "choosing_bytes": 10_000}
    measure, tokenizer = novels.MEASURES[novels.LEARNS], load_tokenizer("bytes")
    weak, good = ({"period": 32, "rule": "gd", "lr": lr} for lr in (1e-3, 2.0))
    found = measure(model, tokenizer, {**job, "rules": [weak, good]})
    assert found["tried"][1] < found["tried"][0] - 0.05
    assert found["chosen"] == good
    alone = measure(model, tokenizer, {**job, "rules": [good]})
    assert found["stretches"] == alone["stretches"]
    assert found["tried"][1] == alone["tried"][0]
    endless = {**good, "lr": 1e30}
    assert measure(model, tokenizer, {**job, "rules": [endless]}) == {
        "tried": [None],
        "chosen": None,
        "stretches": None,
    }
