"""The page and the picture of a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce.models import state_floats
from nestlearn.evaluation.reproduce.table import Plan, Scale, Table
from nestlearn.io import atomic_path

# More tests than this in a column are a table and a curve of their own, over lengths.
FEW_TESTS = 2


def describe(table: Table, plan: Plan, records: Sequence[Record], tuning: Sequence[Record], scale: Scale) -> str:
    """The protocol in sentences, then the numbers."""
    runs = plan.runs
    kind = "sequences that are right as a whole" if table.score == "exact" else "right answers"
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    chosen = (
        f"for each model and task the best of the learning rates {rates}, tried with a seed of their own"
        if len(plan.rates) > 1
        else f"learning rate {rates} for all, no other was tried"
    )
    seconds = [record["seconds"] for record in (*records, *tuning)]
    looks = "1 look" if runs["settled"] == 1 else f"{runs['settled']} looks in a row"
    text = (
        f"Scale {scale}. Per cent of {kind}, of {runs['test_sequences']:,} fresh sequences; ± is the standard error "
        f"over seeds. Models of width {plan.size['dim']} and {plan.size['depth']} blocks with equal numbers of "
        f"parameters, trained on each task from scratch: AdamW, {chosen}, batch {runs['batch_size']}, at most "
        f"{runs['steps']:,} steps{_exceptions(plan)}; a run ends earlier after {looks}, {runs['every']} steps apart, "
        f"at which all of up to 256 other sequences were right. {table.note} One thread a run, "
        f"{sum(seconds) / 3600:.1f} core-hours in all, the longest run {max(seconds) / 60:.1f} minutes."
    )
    changed = [f"{model}: {', '.join(f'{k}={v}' for k, v in own.items())}" for model, own in table.settings.items()]
    if changed:
        text += f" Settings that are not the defaults: {'; '.join(changed)}."
    columns = list(dict.fromkeys(record["job"]["column"] for record in records))
    long = [name for name in columns if len(_some(records, name)["tests"]) > FEW_TESTS]
    short = [name for name in columns if name not in long]
    parts = [text]
    if short:
        parts.append(_short_table(table, records, short))
    parts += [f"## {name}\n\n{_long_table(table, records, name)}" for name in long]
    return "\n\n".join(parts)


def _short_table(table: Table, records: Sequence[Record], columns: Sequence[str]) -> str:
    """A line a model, the tests of a task in one cell, and below it what the paper prints."""
    rows: list[list[Any]] = []
    for model in _models(records):
        own = [_of(records, model, name) for name in columns]
        cells = [" / ".join(_number(table, runs, test) for test in runs[0]["tests"]) if runs else None for runs in own]
        some = next(runs for runs in own if runs)
        line: list[Any] = [model, _sizes([run for runs in own for run in runs])]
        if table.state:
            floats = state_floats(some[0]["job"]["model"])
            line.append("grows" if floats is None else f"{floats:,}")
        line += [len(some), *cells]
        printed = [table.paper.get(model, {}).get(name) for name in columns]
        if table.average:
            line.append(_average(table, own))
            known = [float(number) for number in printed if number]
            printed.append(f"{statistics.fmean(known):.1f}" if len(known) == len(columns) else None)
        rows.append(line)
        if model in table.paper:
            rows.append([f"{model}, paper", *[None] * (2 + table.state), *printed])
    tests = " / ".join(_some(records, columns[0])["tests"])
    header = ["model", "parameters", *["state"] * table.state, "seeds", *columns, *["average"] * table.average]
    page = markdown_table(header, rows)
    steps = [[model, *(_steps(_of(records, model, name)) for name in columns)] for model in _models(records)]
    spent = f"Steps taken, mean over seeds:\n\n{markdown_table(['model', *columns], steps)}"
    return (f"Each cell: {tests}.\n\n{page}" if "/" in tests else page) + f"\n\n{spent}"


def _long_table(table: Table, records: Sequence[Record], column: str) -> str:
    tests = list(_some(records, column)["tests"])
    rows = []
    for model in _models(records):
        runs = _of(records, model, column)
        if runs:
            rows.append([model, f"{runs[0]['parameters']:,}", len(runs), *(_number(table, runs, t) for t in tests)])
    text = markdown_table(["model", "parameters", "seeds", *tests], rows)
    spent = ", ".join(f"{model} {_steps(_of(records, model, column))}" for model in _models(records))
    printed = [f"{model} {row[column]}" for model, row in table.paper.items() if column in row]
    return f"{text}\n\nSteps taken: {spent}." + (f" The paper: {', '.join(printed)}." if printed else "")


def plot(table: Table, records: Sequence[Record], path: Path) -> None:
    """A panel for each column: bars where there are few tests, curves over them where there are many."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(record["job"]["column"] for record in records))
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(
        figsize=(max(4.2 * across, 5.5), 3.1 * down + 0.2 * len(_models(records))), dpi=130, layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False).flatten()
    models = _models(records)
    for panel, column in zip(panels, columns, strict=False):
        tests = list(_some(records, column)["tests"])
        for number, model in enumerate(models):
            runs = _of(records, model, column)
            if not runs:
                continue
            found = [mean_and_error([100 * run["tests"][test][table.score] for run in runs]) for test in tests]
            means, errors = [mean for mean, _ in found], [error or 0.0 for _, error in found]
            if len(tests) <= FEW_TESTS:
                width = 0.8 / len(models)
                places = [place - 0.4 + (number + 0.5) * width for place in range(len(tests))]
                panel.bar(places, means, width, yerr=errors, color=f"C{number}", label=model)
            else:
                panel.errorbar(
                    range(len(tests)), means, errors, fmt="o-", markersize=3, color=f"C{number}", label=model
                )
        panel.set_xticks(range(len(tests)), tests)
        panel.set_ylim(0, 105)
        panel.set_title(column)
        panel.grid(axis="y", alpha=0.25)
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    panels[0].set_ylabel("per cent right")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(across + 1, len(labels)), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["job"]["table_model"] for record in records))


def _of(records: Sequence[Record], model: str, column: str) -> list[Record]:
    return [r for r in records if (r["job"]["table_model"], r["job"]["column"]) == (model, column)]


def _some(records: Sequence[Record], column: str) -> Record:
    return next(record for record in records if record["job"]["column"] == column)


def _number(table: Table, runs: Sequence[Record], test: str) -> str:
    diverged = sum(run["diverged"] for run in runs)
    text = with_error([100 * run["tests"][test][table.score] for run in runs], 1)
    return f"{text} ({diverged} diverged)" if diverged else text


def _average(table: Table, columns: Sequence[Sequence[Record]]) -> str | None:
    """The mean over the tasks, for each seed that has all of them, and its error over the seeds."""
    by_seed = [{run["job"]["seed"]: run for run in runs} for runs in columns]
    seeds = set.intersection(*map(set, by_seed))
    if not seeds:
        return None
    test = next(iter(columns[0][0]["tests"]))
    means = [100 * statistics.fmean(runs[seed]["tests"][test][table.score] for runs in by_seed) for seed in seeds]
    return with_error(means, 1)


def _sizes(runs: Sequence[Record]) -> str:
    """Parameters; they differ between tasks with the vocabulary."""
    counts = [run["parameters"] for run in runs]
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,}-{max(counts):,}"


def _exceptions(plan: Plan) -> str:
    """Where columns differ from the plan."""
    own = [
        f"{name}: {', '.join(f'{k} {v:,}' for k, v in c.settings.items())}"
        for name, c in plan.columns.items()
        if c.settings
    ]
    return f" ({'; '.join(own)})" if own else ""


def _steps(runs: Sequence[Record]) -> str | None:
    return f"{statistics.fmean(run['steps'] for run in runs):,.0f}" if runs else None
