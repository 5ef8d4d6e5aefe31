"""New domains one after another: what methods learn and what they forget (the question of Figures 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestlearn.continual.metrics import measure_stream
from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce import novels
from nestlearn.evaluation.reproduce.continual import (
    BASELINES,
    GRADIENT_DESCENT,
    ContinualPlan,
    ContinualTable,
    by_method,
    level_candidates,
    shown,
)
from nestlearn.evaluation.reproduce.table import Scale
from nestlearn.io import atomic_path

# Each level is four times as fast as the next; the longest period is 512, 2K or 8K.
LEVELS = {
    f"{count} level{'s' if count > 1 else ''} to {longest}": tuple(longest // 4**i for i in reversed(range(count)))
    for longest in (512, 2048, 8192)
    for count in (1, 2, 3)
}


LEVEL_COLOURS = {1: "tab:red", 2: "tab:orange", 3: "tab:green"}
LEVEL_MARKERS = {512: "s", 2048: "^", 8192: "D"}
OTHER_COLOURS = ("black", "tab:gray", "tab:blue", "tab:cyan", "navy", "tab:purple", "tab:pink", "tab:brown", "darkred")


def plan(scale: Scale) -> ContinualPlan:
    job: dict[str, Any] = {"what": "domains", "domains": ["kalamang", "nen", "python", "clinc"], "home": "novels",
                           "window": 1024, "segment": 512, "training": 32_768, "tests": 4096}  # fmt: skip
    if scale == "smoke":
        job |= {"domains": ["kalamang", "clinc"], "training": 1024, "tests": 256, "window": 64, "segment": 32}
    if scale == "paper":
        job |= {"training": 1_000_000, "tests": 65_536}
    return ContinualPlan(jobs={"domains": job}, seeds=1 if scale == "smoke" else 3, base=novels.plan(scale))


def measures(record: Record) -> dict[str, float]:
    """Those of `measure_stream`, and by how much the loss on the base's own domain has risen."""
    losses = record["losses"]
    found = asdict(measure_stream([row[:-1] for row in losses]))
    return {**found, "home": losses[-1][-1] - losses[0][-1]}


def score(record: Record) -> float:
    """Mean loss over all domains and the base's own at the end."""
    last: list[float] = record["losses"][-1]
    return sum(last) / len(last)


def page(records: Sequence[Record], _: Sequence[Record], plan: ContinualPlan) -> str:
    rows = []
    names = ("final", "learning", "forgetting", "backward", "forward", "home")
    for method, own in by_method(records).items():
        found = [measures(record) for record in own]
        numbers = [with_error([one[name] for one in found], 3, signed=name in names[3:]) for name in names]
        rows.append([method, shown(own[0]["job"]["method"]), len(own), *numbers])
    job = plan.jobs["domains"]
    header = ["method", "chosen", "seeds", "final", "learning", "forgetting", "backward", "forward", "base domain"]
    return (
        f"Each run reads {job['training']:,} bytes of each of {', '.join(job['domains'])} once, in an order of the "
        f"seed's, and is asked about {job['tests']:,} other bytes of each, in nats per byte: the mean loss at the end "
        "(final), how far a domain's loss falls while it is read (learning), how far it is above its lowest at the end "
        "(forgetting), backward and forward transfer, and the rise of the loss on novels, the base's domain. Levels "
        "are named by their number and the longest period, each four times the next shorter one. Thin lines in the "
        "picture join all that was tried.\n\n" + markdown_table(header, rows)
    )


def plot(records: Sequence[Record], tuning: Sequence[Record], path: Path) -> None:
    """Forgetting against learning: lines over what was tried, and the seeds' means; and the base domain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = by_method(records)
    attempts = by_method(tuning)
    others = [name for name in methods if name not in LEVELS]
    colours = {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    for method, own in methods.items():
        colour, marker = colours.get(method, ""), "o"
        if method in LEVELS:
            colour, marker = LEVEL_COLOURS[len(LEVELS[method])], LEVEL_MARKERS[LEVELS[method][-1]]
        found = [measures(record) for record in own]
        tries = sorted(((m["learning"], m) for m in map(measures, attempts.get(method, []))), key=lambda pair: pair[0])
        for axes, name in ((left, "forgetting"), (right, "home")):
            x, dx = mean_and_error([one["learning"] for one in found])
            y, dy = mean_and_error([one[name] or 0.0 for one in found])
            axes.errorbar(x, y, xerr=dx, yerr=dy, marker=marker, color=colour, elinewidth=0.8, linestyle="none",
                          label=method, markersize=7 if method in LEVELS else 5)  # fmt: skip
            axes.plot([at for at, _ in tries], [m[name] for _, m in tries], color=colour, linewidth=0.6, alpha=0.35)
            axes.set_xlabel("learning, nats per byte")
            axes.grid(alpha=0.25)
    left.set_ylabel("forgetting, nats per byte")
    right.set_ylabel("loss gained on the base domain, nats per byte")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


TABLE = ContinualTable(
    title="New domains one after another (Figures 7 and 8)",
    methods={
        **BASELINES,
        "1 level to 512 without momentum": GRADIENT_DESCENT,
        **{name: level_candidates(*periods) for name, periods in LEVELS.items()},
    },
    plan=plan,
    score=score,
    page=page,
    plot=plot,
    note=(
        "What is tried of each method is chosen on a part of the training text that is not read, with an order of its "
        "own. The best is the one with the lowest mean loss over all domains and the base's own at the end."
    ),
)
