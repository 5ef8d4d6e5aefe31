"""Figure 6: classes that arrive in groups."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce import novels
from nestlearn.evaluation.reproduce.continual import (
    ADAMW,
    BASELINES,
    SGD,
    ContinualPlan,
    ContinualTable,
    by_method,
    level_candidates,
    shown,
    tried,
)
from nestlearn.evaluation.reproduce.table import Scale
from nestlearn.io import atomic_path

RATES = (2e-4, 5e-4)  # higher than where a text is read once
LEVELS = {"1 level": (512,), "2 levels": (128, 512), "3 levels": (32, 128, 512)}


def plan(scale: Scale) -> ContinualPlan:
    job: dict[str, Any] = {"what": "classes", "window": 1024, "segment": 256, "groups": 4, "classes": 12}
    job |= {"training": 60, "tests": 5, "passes": 8}
    sets: dict[str, dict[str, Any]] = {"clinc": {}, "dbpedia": {"passes": 4}}
    if scale == "smoke":
        job |= {"training": 1, "tests": 1, "passes": 2, "classes": 4, "groups": 2, "window": 64, "segment": 32}
        sets = {"clinc": {}}
    if scale == "paper":
        job |= {"training": 70, "tests": 14, "classes": 0}
        sets = {"clinc": {"groups": 10}, "dbpedia": {"groups": 7}}
    jobs = {name: {**job, "data": name, **own} for name, own in sets.items()}
    return ContinualPlan(jobs=jobs, seeds=1 if scale == "smoke" else 3, base=novels.plan(scale))


def score(record: Record) -> float:
    """Below zero, the accuracy over all classes at the end."""
    return -float(record["accuracy"][-1])


def page(records: Sequence[Record], _: Sequence[Record], plan: ContinualPlan) -> str:
    parts = []
    for column, job in plan.jobs.items():
        rows = []
        of_column = [record for record in records if record["job"]["column"] == column]
        if not of_column:
            continue
        for method, own in by_method(of_column).items():
            last = [100 * record["accuracy"][-1] for record in own]
            first = [100 * record["accuracy"][0] for record in own]
            mean = [100 * statistics.fmean(record["accuracy"]) for record in own]
            rows.append([method, shown(own[0]["job"]["method"]), len(own),
                         *(with_error(values, 1) for values in (first, last, mean))])  # fmt: skip
        classes = of_column[0]["classes"]
        header = ["method", "chosen", "seeds", "first group", "all classes", "mean over groups"]
        parts.append(
            f"**{column}**: {classes[-1]} classes in {len(classes)} groups, {job['training']} texts of each, read "
            f"{job['passes']} times; chance is {100 / classes[0]:.1f}% after the first group, "
            f"{100 / classes[-1]:.1f}% after all.\n\n" + markdown_table(header, rows)
        )
    return (
        'Texts of a group\'s classes are read as lines "text -> label", in no order, several times over before '
        "the next group comes. Then the model is asked for the labels of other texts of all classes so far: behind "
        "the arrow it may write labels only, the likeliest token at each branch. Accuracy in percent after the first "
        "group, after the last, and on average over all groups.\n\n" + "\n\n".join(parts)
    )


def plot(records: Sequence[Record], _: Sequence[Record], path: Path) -> None:
    """Accuracy against the classes seen so far."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(record["job"]["column"] for record in records))
    figure = Figure(figsize=(5 * len(columns) + 1.5, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for method, own in by_method([r for r in records if r["job"]["column"] == column]).items():
            points = [mean_and_error([100 * r["accuracy"][i] for r in own]) for i in range(len(own[0]["classes"]))]
            axes.errorbar(
                own[0]["classes"], [mean for mean, _ in points], yerr=[error or 0.0 for _, error in points],
                linestyle="-" if "level" in method else "--", marker=".", label=method,
            )  # fmt: skip
        seen = next(r["classes"] for r in records if r["job"]["column"] == column)
        axes.plot(seen, [100 / count for count in seen], color="gray", linestyle=":", label="chance")
        axes.set_title(column)
        axes.set_xlabel("classes so far")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


TABLE = ContinualTable(
    title="Classes that arrive in groups (Figure 6)",
    methods={
        "in context": BASELINES["in context"],
        "SGD": tried(SGD, (0.1, 0.3)),
        "SGD on MLP blocks": tried({**SGD, "mlps": True}, (0.1, 0.3)),
        "AdamW": tried(ADAMW, (3e-4, 1e-3)),
        "EWC": tried({**SGD, "kind": "ewc", "strength": 10.0}, (0.1, 0.3)),
        "replay": tried({**SGD, "kind": "replay", "capacity": 64}, (0.1, 0.3)),
        **{name: level_candidates(*periods, rates=RATES) for name, periods in LEVELS.items()},
    },
    plan=plan,
    score=score,
    page=page,
    plot=plot,
    note=(
        "What is tried of each method is chosen on training texts that are not read, with an order of its own. "
        "The best is the one with the highest accuracy over all classes at the end. The paper's figure has Llama-3 of "
        "3 and 8 billion parameters, whole tasks in one context, and InCA beside them, and prints no numbers."
    ),
)
