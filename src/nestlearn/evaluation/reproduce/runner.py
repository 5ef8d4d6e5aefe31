"""Trains the models of a table, each on each of its tasks, and writes what they can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import TUNING_SEED
from nestlearn.evaluation.report import write_report
from nestlearn.evaluation.reproduce.models import table_models
from nestlearn.evaluation.reproduce.page import describe, plot
from nestlearn.evaluation.reproduce.table import Column, Order, Plan, Table
from nestlearn.evaluation.task_training import train_on_task
from nestlearn.evaluation.tasks import build_task


def reproduce_tasks(table: Table, order: Order) -> str:
    """`nestlearn.evaluation.reproduce.reproduce` for a table of synthetic tasks."""
    plan = table.plan(order.scale)
    unknown = [name for name in order.columns if name not in plan.columns]
    if unknown:
        raise ValueError(f"columns: expected some of {', '.join(plan.columns)}; got {', '.join(unknown)}")
    columns = {name: plan.columns[name] for name in order.columns or plan.columns}
    for column in columns.values():  # what is missing or wrong shows before hours of training
        for task in (column.training, column.validation or column.training, *column.tests.values()):
            build_task(task)
    models = order.models or table.models
    configs = {
        name: table_models(models, plan.size, table.settings, build_task(column.training).vocab_size)
        for name, column in columns.items()
    }
    rates, tuning = dict[tuple[str, str], float](), list[Record]()
    if len(plan.rates) > 1:
        jobs = [
            make_job(model, column, columns[column], configs[column][model], plan, order, rate, TUNING_SEED)
            for model in models
            for column in columns
            for rate in plan.rates
        ]
        tuning = run_jobs(train_on_task, jobs, order.runs / "records", processes=order.processes)
        rates = best_rates(tuning, table)
    seeds = {model: order.seeds or plan.seeds_of.get(model, plan.seeds) for model in models}
    jobs = [
        make_job(model, column, columns[column], configs[column][model], plan, order,
                 rates.get((model, column), plan.rates[0]), seed)
        for seed in range(max(seeds.values()))
        for model in models
        for column in columns
        if seed < seeds[model]
    ]  # fmt: skip
    records = run_jobs(train_on_task, jobs, order.runs / "records", processes=order.processes)
    figure = order.out.with_name(order.out.name + ".png")
    plot(table, records, figure)
    text = f"{describe(table, plan, records, tuning, order.scale)}\n\n![{table.title}]({figure.name})"
    return write_report(order.out, table.title, text, {"scale": order.scale, "tuning": tuning, "runs": records})


def make_job(
    model: str,
    column: str,
    task: Column,
    config: Mapping[str, Any],
    plan: Plan,
    order: Order,
    rate: float,
    seed: int,
) -> Job:
    """One run, named by its model, its task, its seed and a digest of everything that it computes."""
    computed = {
        "model": dict(config),
        "training": dict(task.training),
        "validation": dict(task.validation or task.training),
        "tests": {name: dict(test) for name, test in task.tests.items()},
        "examples": task.examples,
        **plan.runs,
        **task.settings,
        "lr": rate,
        "seed": seed,
    }
    digest = hashlib.blake2b(json.dumps(computed, sort_keys=True).encode(), digest_size=4).hexdigest()
    words = "".join(c if c.isalnum() else "_" for c in f"{model}-{column}")
    label = f"{words}-lr{rate:g}-seed{seed}-{digest}"
    names = {"name": label, "table_model": model, "column": column, "folder": str(order.runs / label)}
    return {**names, **computed}


def best_rates(records: Sequence[Record], table: Table) -> dict[tuple[str, str], float]:
    """For each model and column the learning rate that ends best on fresh sequences like the training's; of equals the
    one that needs fewer steps."""
    best: dict[tuple[str, str], tuple[float, int, float]] = {}
    for record in records:
        key = (record["job"]["table_model"], record["job"]["column"])
        steps = record["steps"]
        if record["diverged"] or not record["curve"]:
            found = (-1.0, steps, record["job"]["lr"])  # the later the better
        else:
            found = (record["curve"][-1][table.score], -steps, record["job"]["lr"])
        best[key] = max(best.get(key, found), found)
    return {key: rate for key, (_, _, rate) in best.items()}
