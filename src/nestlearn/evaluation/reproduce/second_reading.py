"""The same fifty pages twice: what levels keep of a first reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce import novels
from nestlearn.evaluation.reproduce.continual import (
    SGD,
    ContinualPlan,
    ContinualTable,
    by_method,
    delta_candidates,
    level_candidates,
    shown,
    tried,
)
from nestlearn.evaluation.reproduce.table import Scale
from nestlearn.io import atomic_path

SHARE = 0.1  # of the gain, which the base's domain may lose
MARGIN = 0.75  # what is chosen keeps to this part of it, for other pages and other bases
LEVELS = {"1 level": (512,), "2 levels": (128, 512), "3 levels": (32, 128, 512)}
PAGE = 2000  # bytes


def plan(scale: Scale) -> ContinualPlan:
    job: dict[str, Any] = {"what": "twice", "home": "novels", "window": 1024, "segment": 512, "tests": 16_384,
                           "training": 25 * PAGE}  # fmt: skip
    if scale == "smoke":
        job |= {"training": 1000, "tests": 256, "window": 64, "segment": 32}
    jobs = {"pages": {**job, "domains": ["clinc"] if scale == "smoke" else ["kalamang", "python"]}}
    return ContinualPlan(jobs=jobs, seeds=1 if scale == "smoke" else 3, base=novels.plan(scale))


def gain(record: Record) -> float:
    """How far the loss of the pages is below the frozen model's, in the second reading."""
    return float(record["frozen"] - record["second"])


def harm(record: Record) -> float:
    """How far the loss on the base's own domain has risen."""
    return float(record["home"][1] - record["home"][0])


def score(record: Record) -> float:
    """The second reading's loss, among those that harm the base little enough; if none, the least share of harm."""
    if harm(record) <= MARGIN * SHARE * gain(record):
        return float(record["second"])
    return 1000.0 + (harm(record) / gain(record) if gain(record) > 0 else 1000.0)


def page(records: Sequence[Record], _: Sequence[Record], plan: ContinualPlan) -> str:
    rows = []
    for column in plan.jobs:
        for method, own in by_method([r for r in records if r["job"]["column"] == column]).items():
            share = [harm(r) / gain(r) for r in own if gain(r) > 0]
            rows.append([column, method, shown(own[0]["job"]["method"]), len(own),
                         with_error([r["frozen"] for r in own], 3), with_error([r["known"] for r in own], 3),
                         with_error([r["second"] for r in own], 3),
                         with_error([gain(r) for r in own], 3), with_error([harm(r) for r in own], 3, signed=True),
                         f"{max(share):.0%}" if share else None])  # fmt: skip
    header = ["pages", "method", "chosen", "seeds", "frozen", "after one", "second reading", "gain", "base domain",
              "most of gain"]  # fmt: skip
    return (
        f"Fifty pages of {PAGE:,} bytes, half of them Kalamang and half Python, read twice; losses in nats per byte. "
        "Frozen and after one are the losses of the pages before and after one reading, with nothing learnt while they "
        "are asked about: these two compare all methods alike. In the second reading levels go on learning, each "
        "segment predicted before it is learnt from again; for methods without levels it is the loss after one, so "
        "that its gain is not to be compared between the two kinds. The base domain is the rise of the loss on other "
        "novels after both, and the last column its largest share of the gain over seeds.\n\n"
        + markdown_table(header, rows)
    )


def plot(records: Sequence[Record], tuning: Sequence[Record], path: Path) -> None:
    """What is lost on the base domain against what is gained on the pages, for all that was tried."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(record["job"]["column"] for record in records))
    figure = Figure(figsize=(4 * len(columns) + 1.5, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        attempts = by_method([r for r in tuning if r["job"]["column"] == column])
        for i, (method, own) in enumerate(by_method([r for r in records if r["job"]["column"] == column]).items()):
            tries = sorted(attempts.get(method, []), key=gain)
            axes.plot([gain(r) for r in tries], [harm(r) for r in tries], color=f"C{i}", linewidth=0.8, alpha=0.6)
            (x, dx), (y, dy) = mean_and_error([gain(r) for r in own]), mean_and_error([harm(r) for r in own])
            marker = "s" if "level" in method else "o"
            axes.errorbar(x, y, xerr=dx, yerr=dy, color=f"C{i}", marker=marker, label=method, linestyle="none")
        end = axes.get_xlim()[1]
        axes.plot([0, end], [0, SHARE * end], color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(column)
        axes.set_xlabel("gained on the pages, nats per byte")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("lost on the base domain, nats per byte")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


TABLE = ContinualTable(
    title="The same fifty pages twice",
    methods={
        # Lower rates than where learning alone counts, for the sake of the base's domain.
        "SGD": tried(SGD, (1e-3, 3e-3, 1e-2)),
        "SGD on MLP blocks": tried({**SGD, "mlps": True}, (3e-3, 1e-2, 3e-2)),
        **{name: level_candidates(*periods, rates=(1e-6, 2e-6, 5e-6)) for name, periods in LEVELS.items()},
        **{
            f"{name} with DGD": delta_candidates(
                *periods, rates=(0.01, 0.03, 0.1) if len(periods) == 1 else (0.003, 0.01, 0.03)
            )
            for name, periods in LEVELS.items()
        },
    },
    plan=plan,
    score=score,
    page=page,
    plot=plot,
    note=(
        "What is tried of each method is chosen on other pages and other novels, with the base of seed 0. The best is "
        "the one with the lowest loss in the second reading among those that lose at most 7.5% of the gain on the "
        "base's domain; the dotted line is at 10%."
    ),
)
