"""What the tables of learners that go on learning share: base models trained on novels, methods, and their tuning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestlearn.evaluation.continual_jobs import run_job
from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import TUNING_SEED, final_bits, model_config, schedule, train_one
from nestlearn.evaluation.language_modeling import make_job as make_base_job
from nestlearn.evaluation.report import mean_and_error, write_report
from nestlearn.evaluation.reproduce import novels
from nestlearn.evaluation.reproduce.table import Order, Scale
from nestlearn.training.config import DataConfig

# Settings to be tried of a method; the best by the table's score is the method's.
Candidates = Sequence[Mapping[str, Any]]

SGD = {"kind": "fine-tuning", "optimizer": "sgd"}
ADAMW = {"kind": "fine-tuning", "optimizer": "adamw"}
# Learning rates of SGD are on the mean loss of 512 tokens, those of levels on the sum over a period; and momentum 0.9
# makes of a rate ten times as much.
SGD_RATES, ADAMW_RATES, LEVEL_RATES = (0.01, 0.03, 0.1), (1e-4, 3e-4, 1e-3), (1e-5, 2e-5, 5e-5)
DELTA_RATES = (0.03, 0.1, 0.3)


def tried(settings: Mapping[str, Any], rates: Sequence[float], **others: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Candidates with each learning rate, and each value of one other setting if it is given."""
    found: list[Mapping[str, Any]] = [{**settings, "lr": rate} for rate in rates]
    for name, values in others.items():
        found = [{**one, name: value} for one in found for value in values]
    return found


def level_candidates(*periods: int, rates: Sequence[float] = LEVEL_RATES) -> list[Mapping[str, Any]]:
    """Levels that descend on the summed gradient with momentum, unclipped."""
    return tried({"kind": "levels", "periods": periods, "rule": "momentum", "clip": None}, rates)


def delta_candidates(*periods: int, rates: Sequence[float] = DELTA_RATES) -> list[Mapping[str, Any]]:
    """Levels under delta gradient descent, clipped to norm 1, at which a rate is the length of a step."""
    return tried({"kind": "levels", "periods": periods, "rule": "dgd"}, rates)


GRADIENT_DESCENT = tried({"kind": "levels", "periods": (512,), "clip": None}, [10 * rate for rate in LEVEL_RATES])


# What levels are compared to in every table.
BASELINES: dict[str, Candidates] = {
    "frozen": ({"kind": "frozen"},),
    "in context": ({"kind": "in context"},),
    "SGD": tried(SGD, SGD_RATES),
    "SGD on MLP blocks": tried({**SGD, "mlps": True}, (0.03, 0.1, 0.3)),
    "AdamW": tried(ADAMW, ADAMW_RATES),
    "EWC": tried({**SGD, "kind": "ewc"}, (0.03, 0.1), strength=(10.0, 1000.0)),
    "replay": tried({**SGD, "kind": "replay", "capacity": 64}, (0.03, 0.1)),
    "LoRA": tried({**ADAMW, "kind": "lora", "rank": 8}, (1e-3, 3e-3)),
}


@dataclass(frozen=True, kw_only=True)
class ContinualPlan:
    """A table at one scale.

    Attributes:
        jobs: what every run is told, see `nestlearn.evaluation.continual_jobs`; one for each column.
        seeds: how many; each has a base model of its own.
        base: how the base models are trained, as the "hope" of the other tables of language models.
    """

    jobs: Mapping[str, Mapping[str, Any]]
    seeds: int
    base: novels.NovelsPlan


@dataclass(frozen=True, kw_only=True)
class ContinualTable:
    """A table of methods that go on learning.

    Attributes:
        title: heading of the page.
        methods: by name, with what is tried of each.
        plan: the table at a scale.
        score: of a run, the lower the better; chooses among candidates.
        page: (records, tuning, plan) -> Markdown.
        plot: (records, tuning, path of the picture).
        note: on the protocol.
    """

    title: str
    methods: Mapping[str, Candidates]
    plan: Callable[[Scale], ContinualPlan]
    score: Callable[[Record], float]
    page: Callable[[Sequence[Record], Sequence[Record], ContinualPlan], str]
    plot: Callable[[Sequence[Record], Sequence[Record], Path], None]
    note: str


def reproduce_continual(table: ContinualTable, order: Order) -> str:
    """`nestlearn.evaluation.reproduce.reproduce` for a table of methods.

    Raises:
        ValueError: for an unknown method or column.
        FileNotFoundError: if data are not there.
        JobsFailed: if runs failed; the others are kept.
    """
    plan = table.plan(order.scale)
    for what, given, known in (("models", order.models, table.methods), ("columns", order.columns, plan.jobs)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{what}: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    methods = {name: table.methods[name] for name in order.models or table.methods}
    columns = order.columns or tuple(plan.jobs)
    seeds = range(order.seeds or plan.seeds)
    bases = [_base_job(plan, seed, order.runs) for seed in seeds]
    trained = run_jobs(train_one, bases, order.runs / "records", processes=order.processes)

    def make_job(column: str, method: str, settings: Mapping[str, Any], seed: int) -> Job:
        tuning = seed == TUNING_SEED
        base = bases[0 if tuning else seed]["name"]
        job = {**plan.jobs[column], "method": dict(settings), "seed": seed, "base": base, "tuning": tuning}
        digest = hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=5).hexdigest()
        words = "".join(c if c.isalnum() else "_" for c in f"{column}-{method}")
        return {**job, "name": f"{words}-seed{seed}-{digest}", "column": column, "label": method,
                "folder": str(order.runs)}  # fmt: skip

    def run(jobs: list[Job]) -> list[Record]:
        return run_jobs(run_job, jobs, order.runs / "records", processes=order.processes)

    tuning = run([
        make_job(column, name, settings, TUNING_SEED)
        for column in columns for name, several in methods.items() if len(several) > 1 for settings in several
    ])  # fmt: skip
    chosen = {(column, name): several[0] for column in columns for name, several in methods.items()}
    best: dict[tuple[str, str], float] = {}
    for record in tuning:
        key, score = (record["job"]["column"], record["job"]["label"]), table.score(record)
        if key not in best or score < best[key]:
            best[key], chosen[key] = score, record["job"]["method"]
    records = run(
        [make_job(column, name, chosen[column, name], seed) for seed in seeds for column, name in chosen]
    )  # fmt: skip
    figure = order.out.with_name(order.out.name + ".png")
    table.plot(records, tuning, figure)
    text = f"{_protocol(plan, trained, order.scale)} {table.note}\n\n{table.page(records, tuning, plan)}"
    results = {"scale": order.scale, "bases": trained, "tuning": tuning, "runs": records}
    return write_report(order.out, table.title, f"{text}\n\n![{table.title}]({figure.name})", results)


def _base_job(plan: ContinualPlan, seed: int, runs: Path) -> Job:
    """The same run as that of the other tables of language models, if the folder is theirs."""
    base = plan.base
    text, held_out = (f"$NESTLEARN_DATA/{name}" for name in (novels.TEXT, novels.HELD_OUT))
    data = DataConfig(text=text, held_out=held_out, max_bytes=base.max_bytes)
    training = schedule(lr=base.rates[-1], seed=seed, **base.runs)
    return make_base_job("hope", model_config("hope", **base.size), data, training, runs)


def _protocol(plan: ContinualPlan, trained: Sequence[Record], scale: Scale) -> str:
    bits, _ = mean_and_error([final_bits(record) for record in trained])
    return (
        f"Scale {scale}. The base models are Hope, {trained[0]['parameters']:,} parameters, trained on "
        f"{trained[0]['train'][-1]['tokens']:,} bytes of ELTeC's English novels (learning rate "
        f"{plan.base.rates[-1]:g}; {bits:.3f} bits per byte on other novels), one for each seed. ± is the standard "
        "error over seeds."
    )


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the method's name, in their order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["job"]["label"], []).append(record)
    return found


def shown(settings: Mapping[str, Any]) -> str:
    """What was chosen, in a few words."""
    words = [f"lr {settings['lr']:g}"] if "lr" in settings else []
    words += [f"strength {settings['strength']:g}"] if "strength" in settings else []
    return ", ".join(words)
