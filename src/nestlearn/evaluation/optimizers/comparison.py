"""Optimizers on small models: the loss against steps and against processor time (of this kind are Fig. 11 and 12).

    python -m nestlearn.evaluation.optimizers.comparison --task digits --out results/optimizers_digits
    python -m nestlearn.evaluation.optimizers.comparison --task novels --out results/optimizers_novels

Every optimizer first tries its learning rates with a seed of its own, at full length, then runs the best of them with
every seed. Each run is a process with one thread; runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import TUNING_SEED
from nestlearn.evaluation.optimizers.candidates import CANDIDATES, MOMENTUM, OTHERS_LR, WEIGHT_DECAY, build
from nestlearn.evaluation.optimizers.small_tasks import TASKS
from nestlearn.evaluation.report import finite_or_none, markdown_table, mean_and_error, with_error, write_report
from nestlearn.io import atomic_path

REFERENCE = "adamw"
OTHER_REFERENCE = "muon"  # whose final loss is a second mark to reach
SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "smoke": {
        "digits": {"dim": 16, "depth": 1, "heads": 2, "batch_size": 4, "steps": 4, "every": 2},
        "novels": {"dim": 16, "depth": 1, "heads": 2, "batch_size": 2, "steps": 4, "every": 2, "sequence_length": 16,
                   "max_bytes": 100_000, "held_out_bytes": 256},
    },
    "small": {
        "digits": {"dim": 64, "depth": 3, "heads": 4, "batch_size": 32, "steps": 400, "every": 20},
        "novels": {"dim": 96, "depth": 2, "heads": 3, "batch_size": 8, "steps": 500, "every": 25,
                   "sequence_length": 128, "max_bytes": 20_000_000, "held_out_bytes": 32_768},
    },
}  # fmt: skip
COMPARED = ("adamw", "muon", "adamuon", "m3", "m3 without slow", "m3 paper", "sgd", "dgd", "dgd delta",
            "dgd no momentum")  # fmt: skip


def train_one(job: Job) -> Record:
    """One run: the held-out loss over steps and over processor seconds of training.

    A run whose loss is not finite ends there; `diverged` says at which step.
    """
    task = TASKS[job["task"]](job)
    optimizer = build(job["optimizer"], task.model, job["lr"])
    curve, seconds, diverged = [], 0.0, None
    for step in range(job["steps"]):
        begin = time.process_time()  # other work on the machine does not count
        optimizer.zero_grad()
        loss = task.loss(step)
        loss.backward()
        if not all(bool(torch.isfinite(p.grad).all()) for p in task.model.parameters() if p.grad is not None):
            diverged = step
            break
        optimizer.step(_schedule(step, job["steps"]))
        seconds += time.process_time() - begin
        if (step + 1) % job["every"] == 0 or step + 1 == job["steps"]:
            found = task.held_out()
            if not math.isfinite(found):
                diverged = step
                break
            curve.append({"step": step + 1, "loss": found, "seconds": round(seconds, 3)})
    return {"curve": curve, "diverged": diverged, "unit": task.unit,
            "parameters": sum(p.numel() for p in task.model.parameters())}  # fmt: skip


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def make_job(task: str, optimizer: str, lr: float, seed: int, settings: Mapping[str, Any]) -> Job:
    """A run, named by all that it computes."""
    label = f"{task}-{optimizer.replace(' ', '_')}-lr{lr:g}-seed{seed}"
    return {"name": label, "task": task, "optimizer": optimizer, "lr": lr, "seed": seed, **settings}


def final_loss(record: Record) -> float:
    """The held-out loss at the end; infinite for a run that diverged."""
    return math.inf if record["diverged"] is not None or not record["curve"] else record["curve"][-1]["loss"]


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """The learning rate that ends lowest for each optimizer."""
    best: dict[str, Record] = {}
    for record in records:
        name = record["job"]["optimizer"]
        if name not in best or final_loss(record) < final_loss(best[name]):
            best[name] = record
    return {name: record["job"]["lr"] for name, record in best.items()}


def reached(record: Record, loss: float) -> tuple[float, float] | None:
    """Steps and processor seconds until the held-out loss is as low as `loss`, on the line between looks; None if it
    never is."""
    before = None
    for point in record["curve"]:
        if point["loss"] <= loss:
            if before is None:
                return point["step"], point["seconds"]
            part = (before["loss"] - loss) / (before["loss"] - point["loss"])
            values = [before[key] + part * (point[key] - before[key]) for key in ("step", "seconds")]
            return values[0], values[1]
        before = point
    return None


def table(records: Sequence[Record], tuning: Sequence[Record]) -> str:
    """A line an optimizer: its rate, its final loss, and when it reached the reference's."""
    names = list(dict.fromkeys(record["job"]["optimizer"] for record in records))
    by_name = {name: [r for r in records if r["job"]["optimizer"] == name] for name in names}
    goals, others = (
        {r["job"]["seed"]: final_loss(r) for r in by_name.get(reference, [])}
        for reference in (REFERENCE, OTHER_REFERENCE)
    )
    rows = []
    for name, runs in by_name.items():
        whole = [r for r in runs if math.isfinite(final_loss(r))]
        lost = len(runs) - len(whole)
        final = with_error([final_loss(r) for r in whole]) if whole else ""
        pairs = _with_goals(whole, goals)
        whens = [reached(r, goal) for r, goal in pairs]
        met = [when for when in whens if when is not None]
        second = [reached(r, goal) for r, goal in _with_goals(whole, others)]
        steps = sum(r["curve"][-1]["step"] for r in whole)
        seconds = sum(r["curve"][-1]["seconds"] for r in whole)
        rows.append(
            [
                name,
                f"{runs[0]['job']['lr']:g} of " + ", ".join(f"{rate:g}" for rate in CANDIDATES[name].rates),
                len(runs),
                f"{final} ({lost} diverged)" if lost else final,
                with_error([final_loss(r) - goal for r, goal in pairs], signed=True)
                if name != REFERENCE and pairs
                else None,
                _mean([when[0] for when in met], len(whens), ".0f"),
                _mean([when[1] for when in met], len(whens), ".1f"),
                _mean([when[0] for when in second if when is not None], len(second), ".0f"),
                f"{1000 * seconds / steps:.0f}" if steps else None,
            ]
        )
    unit = records[0]["unit"]
    header = ["optimizer", "learning rate", "seeds", f"held-out loss ({unit})", f"paired difference to {REFERENCE}",
              f"steps to {REFERENCE}'s loss", "processor seconds to it", f"steps to {OTHER_REFERENCE}'s loss",
              "processor ms a step"]  # fmt: skip
    return markdown_table(header, rows)


def _with_goals(runs: Sequence[Record], goals: Mapping[int, float]) -> list[tuple[Record, float]]:
    """Each run with the loss to reach, that of the reference with the same seed; without those that have none."""
    return [(r, goals[r["job"]["seed"]]) for r in runs if math.isfinite(goals.get(r["job"]["seed"], math.inf))]


def _mean(values: Sequence[float], of: int, form: str) -> str | None:
    """The mean, and how many seeds it is of where not all."""
    if not values:
        return None
    text = format(sum(values) / len(values), form)
    return text if len(values) == of else f"{text} ({len(values)} of {of})"


def plot(records: Sequence[Record], path: Path) -> None:
    """Held-out loss over steps, and over processor seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(record["job"]["optimizer"] for record in records))
    ends = [r["curve"][-1]["loss"] for r in records if r["curve"]]
    for i, name in enumerate(names):
        curves = [r["curve"] for r in records if r["job"]["optimizer"] == name and r["curve"]]
        length = min((len(curve) for curve in curves), default=0)
        if not length:
            continue
        points = [mean_and_error([curve[j]["loss"] for curve in curves]) for j in range(length)]
        for panel, key in zip(panels, ("step", "seconds"), strict=True):
            x = [mean_and_error([curve[j][key] for curve in curves])[0] for j in range(length)]
            y = [mean for mean, _ in points]
            panel.plot(x, y, color=f"C{i}", linewidth=1.4, label=name)
            low, high = ([m + sign * (e or 0.0) for m, e in points] for sign in (-1, 1))
            panel.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    for panel, label in zip(panels, ("steps", "processor seconds of training, one thread"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
    if ends:
        panels[0].set_ylim(0.95 * min(ends), min(2.5 * min(ends), 1.05 * max(max(ends), 1.5 * min(ends))))
    panels[0].set_ylabel(f"held-out loss ({records[0]['unit']})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def compare(task: str, names: Sequence[str], *, scale: str, seeds: int, out: Path, runs: Path, processes: int) -> str:
    """Runs what is not done yet and writes `out`.json, `out`.md and `out`.png; returns the page.

    Raises:
        JobsFailed: if runs failed; the others are kept.
    """
    settings = SETTINGS[scale][task]
    tuning_jobs = [
        make_job(task, name, rate, TUNING_SEED, settings) for name in names for rate in CANDIDATES[name].rates
    ]
    tuning = run_jobs(train_one, tuning_jobs, runs, processes=processes)
    rates = best_rates(tuning)
    jobs = [make_job(task, name, rates[name], seed, settings) for seed in range(seeds) for name in names]
    records = run_jobs(train_one, jobs, runs, processes=processes)
    figure = out.with_name(out.name + ".png")
    plot(records, figure)
    hours = sum(record["seconds"] for record in (*tuning, *records)) / 3600
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    text = (
        f"Task {task}, scale {scale} ({said}; {records[0]['parameters']:,} parameters), fp32, one thread a run, "
        f"{processes} runs at once, {hours:.2f} core-hours. Warm-up over a twentieth of the steps, a cosine to a "
        f"tenth. Gradients are not clipped: that would change what delta gradient descent writes, and not what it "
        f"erases. Each optimizer moves matrices with weight decay {WEIGHT_DECAY:g}, and AdamW the rest at the same "
        f"rate; sgd (momentum {MOMENTUM:g}, as dgd and dgd delta) and the variants of dgd move all linear layers "
        f"(not a head that is the embedding) without decay, and AdamW the rest at {OTHERS_LR:g}. "
        f"Each takes the best of its learning rates, tried at full "
        f"length with a seed of its own. ± is the standard error over seeds, which fix initial weights and data; "
        f"differences are between runs of one seed.\n\n"
        f"{table(records, tuning)}\n\nLearning rates tried:\n\n{rate_table(tuning)}\n\n![loss]({figure.name})"
    )
    results = {"scale": scale, "tuning": tuning, "runs": records}
    return write_report(out, f"Optimizers on {task}", text, results)


def rate_table(tuning: Sequence[Record]) -> str:
    """The final losses of the runs that chose learning rates."""
    rows = []
    for name in dict.fromkeys(record["job"]["optimizer"] for record in tuning):
        own = [r for r in tuning if r["job"]["optimizer"] == name]
        cells = [(r["job"]["lr"], finite_or_none(final_loss(r))) for r in own]
        rows.append([name, ", ".join(f"{lr:g}: " + ("diverged" if x is None else f"{x:.4f}") for lr, x in cells)])
    return markdown_table(["optimizer", "held-out loss by learning rate"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--optimizers", default=",".join(COMPARED), help=f"of {', '.join(CANDIDATES)}")
    add("--scale", choices=list(SETTINGS), default="small")
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=2, help="processes, one thread each")
    add(
        "--out", type=Path, default=None, help="path of the results, without suffix; by default results/optimizers_TASK"
    )
    add("--runs", type=Path, default=None, help="folder of the records; by default runs/optimizers-SCALE")
    given = parser.parse_args()
    names = [name.strip() for name in given.optimizers.split(",")]
    unknown = [name for name in names if name not in CANDIDATES]
    if unknown:
        parser.error(f"unknown optimizers {', '.join(unknown)}; known: {', '.join(CANDIDATES)}")
    if given.seeds < 1 or given.jobs < 1:
        parser.error(f"--seeds and --jobs: expected at least 1, got {given.seeds} and {given.jobs}")
    out = given.out or Path("results") / f"optimizers_{given.task}"
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = given.runs or Path("runs") / f"optimizers-{given.scale}"
    print(compare(given.task, names, scale=given.scale, seeds=given.seeds, out=out, runs=runs, processes=given.jobs))


if __name__ == "__main__":
    main()
