"""Tasks that should not disturb each other (Sec. 4.3): inputs in subspaces at right angles, learnt one after another.

    python -m nestlearn.evaluation.optimizers.orthogonal_tasks --out results/orthogonal_tasks

The gradient of a linear map on a task lies in the subspace of its inputs, so what one task has learnt need not move
when the next one is learnt: a linear map forgets only by its optimizer. A two-layer network also shares hidden units.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import TUNING_SEED
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error, write_report
from nestlearn.io import atomic_path
from nestlearn.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    HigherOrderMomentum,
    Muon,
    PreconditionedMomentum,
)

Build = Callable[[nn.Module, float], torch.optim.Optimizer]
SMALL, LARGE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

OPTIMIZERS: Mapping[str, tuple[Build, tuple[float, ...]]] = {
    "sgd": (lambda m, lr: torch.optim.SGD(m.parameters(), lr), LARGE),
    "momentum": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), LARGE),
    "momentum 0.99": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.99), LARGE),
    "adamw": (lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.0), SMALL),
    "muon": (lambda m, lr: Muon(m.parameters(), lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), SMALL),
    "m3": (lambda m, lr: M3(m.parameters(), lr, weight_decay=0.0), SMALL),
    "delta momentum": (lambda m, lr: DeltaMomentum(m.parameters(), lr, momentum=0.9), LARGE),
    "delta momentum 0.99": (lambda m, lr: DeltaMomentum(m.parameters(), lr, momentum=0.99), LARGE),
    "delta momentum 0.99, rate 10": (
        lambda m, lr: DeltaMomentum(m.parameters(), lr / 10, momentum=0.99, rate=10.0),
        LARGE,
    ),
    "preconditioned momentum": (lambda m, lr: PreconditionedMomentum(m.parameters(), lr), LARGE),
    "higher-order momentum": (lambda m, lr: HigherOrderMomentum(m.parameters(), lr), LARGE),
    "deep momentum": (lambda m, lr: DeepMomentum(m.parameters(), lr), SMALL),
    "dgd": (lambda m, lr: DeltaGradientDescent(m, lr), (*LARGE, 3.0, 10.0)),
    "dgd delta": (lambda m, lr: DeltaGradientDescent(m, lr, rule="delta"), (*LARGE, 3.0)),
    "dgd delta, momentum": (lambda m, lr: DeltaGradientDescent(m, lr, rule="delta", momentum=0.9), LARGE),
}
NETWORKS = ("linear", "two layers")
SIZES = {"smoke": {"dim": 8, "tasks": 2, "steps": 5}, "small": {"dim": 64, "tasks": 4, "steps": 300}}
OUTPUTS, BATCH, NOISE = 16, 32, 0.1


class OrthogonalTasks:
    """Regression tasks; the inputs of each lie in a subspace of its own.

    Args:
        dim: of the inputs; the tasks share it equally.
        tasks: how many.
        seed: of subspaces and targets.
    """

    def __init__(self, dim: int, tasks: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(self._normal(dim, dim)).Q
        self._bases = basis.split(dim // tasks, dim=1)
        self._maps = [self._normal(OUTPUTS, dim) / (dim // tasks) ** 0.5 for _ in range(tasks)]
        self._tests = [self.sample(task, 512, noise=0.0) for task in range(tasks)]

    def sample(self, task: int, count: int, noise: float = NOISE) -> tuple[Tensor, Tensor]:
        """Inputs (count, dim) and targets (count, OUTPUTS)."""
        basis = self._bases[task]
        x = self._normal(count, basis.shape[1]) @ basis.mT
        y = torch.tanh(x @ self._maps[task].mT)
        return x, y + noise * self._normal(count, OUTPUTS)

    @torch.no_grad()
    def test(self, model: nn.Module, task: int) -> float:
        """Mean squared error over the variance of the targets."""
        x, y = self._tests[task]
        return float((model(x) - y).square().mean() / y.var())

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def learn_tasks(job: Job) -> Record:
    """Learns the tasks in turn; the record holds the error on each right after it was learnt, and at the end."""
    tasks = OrthogonalTasks(job["dim"], job["tasks"], job["seed"])
    torch.manual_seed(job["seed"])
    model: nn.Module = nn.Sequential(nn.Linear(job["dim"], OUTPUTS, bias=False))
    if job["network"] == "two layers":
        layers = [nn.Linear(job["dim"], width, bias=False) for width in (job["dim"], OUTPUTS)]
        model = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    make, _ = OPTIMIZERS[job["optimizer"]]
    optimizer = make(model, job["lr"])
    learnt: list[float] = []
    first: list[float] = []
    for task in range(job["tasks"]):
        for _ in range(job["steps"]):
            x, y = tasks.sample(task, BATCH)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            if not bool(torch.isfinite(loss)) or float(loss.detach()) > 1e6:
                return {"learnt": None, "end": None, "first": None}
            loss.backward()
            optimizer.step()
            first.append(tasks.test(model, 0))
        learnt.append(tasks.test(model, task))
    end = [tasks.test(model, task) for task in range(job["tasks"])]
    every = max(1, len(first) // 200)
    return {"learnt": learnt, "end": end, "first": [first[i] for i in range(every - 1, len(first), every)]}


def tune_and_learn(job: Job) -> Record:
    """`learn_tasks` with each of the job's rates and a seed for that, then with the best rate and the other seeds."""
    sizes = {name: job[name] for name in ("network", "optimizer", "dim", "tasks", "steps")}
    tuning = [_run({**sizes, "lr": lr, "seed": TUNING_SEED}) for lr in job["rates"]]
    lr = min(tuning, key=final_error)["job"]["lr"]
    return {"tuning": tuning, "runs": [_run({**sizes, "lr": lr, "seed": seed}) for seed in range(job["seeds"])]}


def _run(job: Job) -> Record:
    return {"job": job, **learn_tasks(job)}


def final_error(record: Record) -> float:
    """The mean error over the tasks at the end; infinite for a run that diverged."""
    return statistics.fmean(record["end"]) if record["end"] else math.inf


def forgotten(record: Record) -> float:
    """By how much the error on all tasks but the last has grown since each was learnt, on average."""
    pairs = list(zip(record["end"], record["learnt"], strict=True))[:-1]
    return statistics.fmean(end - learnt for end, learnt in pairs)


def table(records: Sequence[Record], network: str) -> str:
    rows = []
    own = [r for r in records if r["job"]["network"] == network]
    for name in dict.fromkeys(r["job"]["optimizer"] for r in own):
        runs = [r for r in own if r["job"]["optimizer"] == name and r["end"]]
        cells: list[Any] = ["diverged", None, None]
        if runs:
            cells = [
                with_error([statistics.fmean(r["learnt"]) for r in runs], 3),
                with_error([final_error(r) for r in runs], 3),
                with_error([forgotten(r) for r in runs], 3, signed=True),
            ]
        lr = next(r["job"]["lr"] for r in own if r["job"]["optimizer"] == name)
        rows.append([name, f"{lr:g}", len(runs), *cells])
    header = ["optimizer", "learning rate", "seeds", "error when learnt", "error at the end", "forgotten"]
    return markdown_table(header, rows)


def rate_table(tuning: Sequence[Record], network: str) -> str:
    """What each learning rate that was tried came to."""
    own = [r for r in tuning if r["job"]["network"] == network]
    rows = []
    for name in dict.fromkeys(r["job"]["optimizer"] for r in own):
        cells = []
        for r in (r for r in own if r["job"]["optimizer"] == name):
            ends = f"{statistics.fmean(r['learnt']):.3f} to {final_error(r):.3f}" if r["end"] else "diverged"
            cells.append(f"{r['job']['lr']:g}: {ends}")
        rows.append([name, "; ".join(cells)])
    return markdown_table(["optimizer", "rate: error when learnt to error at the end"], rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """The error on the first task, while it and then the others are learnt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), dpi=150, layout="constrained")
    for panel, network in zip(figure.subplots(1, len(NETWORKS)), NETWORKS, strict=True):
        own = [r for r in records if r["job"]["network"] == network and r["first"]]
        for i, name in enumerate(dict.fromkeys(r["job"]["optimizer"] for r in own)):
            curves = [r["first"] for r in own if r["job"]["optimizer"] == name]
            length = min(map(len, curves))
            total = own[0]["job"]["steps"] * own[0]["job"]["tasks"]
            x = [(j + 1) * total / length for j in range(length)]
            y = [mean_and_error([curve[j] for curve in curves])[0] for j in range(length)]
            panel.plot(x, y, color=f"C{i % 10}", linestyle="-" if i < 10 else "--", linewidth=1.2, label=name)
        for task in range(1, own[0]["job"]["tasks"] if own else 0):
            panel.axvline(task * own[0]["job"]["steps"], color="grey", linewidth=0.6)
        panel.set_yscale("log")
        panel.set_xlabel("steps; a line where the next task begins")
        panel.set_title(network)
        panel.grid(alpha=0.25)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.supylabel("error on the first task")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def compare(names: Sequence[str], *, scale: str, seeds: int, out: Path, runs: Path, processes: int) -> str:
    """Runs what is not done yet and writes `out`.json, `out`.md and `out`.png; returns the page."""
    settings = {**SIZES[scale], "seeds": seeds}
    jobs = [
        {
            "name": f"{network}-{name}".replace(" ", "_").replace(",", ""),
            "network": network,
            "optimizer": name,
            "rates": OPTIMIZERS[name][1],
            **settings,
        }
        for network in NETWORKS
        for name in names
    ]
    found = run_jobs(tune_and_learn, jobs, runs, processes=processes)
    tuning, records = ([record for own in found for record in own[key]] for key in ("tuning", "runs"))
    figure = out.with_name(out.name + ".png")
    plot(records, figure)
    tables = "\n\n".join(
        f"## {network}\n\n{table(records, network)}\n\nLearning rates tried, one seed:\n\n{rate_table(tuning, network)}"
        for network in NETWORKS
    )
    text = (
        f"Scale {scale}. {settings['tasks']} regression tasks of {settings['steps']} steps each, one after another, "
        f"batch {BATCH}; inputs of {settings['dim']} numbers, those of each task in a subspace of its own at right "
        f"angles to the others. Errors are mean squared errors over the targets' variance; forgotten is by how much "
        f"those of all tasks but the last have grown since each was learnt. The learning rate, constant, has the "
        f"lowest error at the end, for a seed of its own, of those below. ± is the standard error over {seeds} seeds."
        f"\n\n{tables}\n\n![error on the first task]({figure.name})"
    )
    return write_report(out, "Orthogonal tasks", text, {"scale": scale, "tuning": tuning, "runs": records})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimizers", default=";".join(OPTIMIZERS), help="which, separated by ';'")
    add("--scale", choices=list(SIZES), default="small")
    add("--seeds", type=int, default=5)
    add("--jobs", type=int, default=2, help="processes, one thread each")
    add("--out", type=Path, default=Path("results/orthogonal_tasks"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the records; by default runs/orthogonal-tasks-SCALE")
    given = parser.parse_args()
    names = [name.strip() for name in given.optimizers.split(";")]
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        parser.error(f"unknown optimizers {', '.join(unknown)}; known: {'; '.join(OPTIMIZERS)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    runs = given.runs or Path("runs") / f"orthogonal-tasks-{given.scale}"
    print(compare(names, scale=given.scale, seeds=given.seeds, out=given.out, runs=runs, processes=given.jobs))


if __name__ == "__main__":
    main()
