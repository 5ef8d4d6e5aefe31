"""What the tables of language models share: the novels that they read, and how they are trained and measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.evaluation.context_use import Reader, learning_reader, loss_by_position, windows
from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import (
    TUNING_SEED,
    make_job,
    model_config,
    schedule,
    train_one,
    try_rates,
)
from nestlearn.evaluation.matching import count_parameters
from nestlearn.evaluation.report import finite_or_none, write_report
from nestlearn.evaluation.reproduce.table import Order, Scale
from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.evaluation.zero_shot import FILES, ask, read_questions
from nestlearn.io import missing_file
from nestlearn.memory.adaptation import LearningRule
from nestlearn.models.stacking import stack_levels
from nestlearn.training.checkpoint import load_model
from nestlearn.training.config import DataConfig
from nestlearn.training.data import PackedTokens, Tokenizer, read_documents, tokenize_documents

TEXT, HELD_OUT = "eltec_eng/train.jsonl.gz", "eltec_eng/valid.jsonl.gz"
LEARNS = "context use while learning"
LEARNING: tuple[Mapping[str, Any], ...] = (
    *({"period": period, "rule": "gd", "lr": lr} for period in (128, 512) for lr in (0.1, 0.2, 0.4)),
    {"period": 128, "rule": "dgd", "lr": 0.3},
)


@dataclass(frozen=True, kw_only=True)
class NovelsPlan:
    """Language models at one scale.

    Attributes:
        size: of the models, settings of `HopeConfig`.
        runs: of `language_modeling.schedule`: steps, batch_size, sequence_length and others.
        rates: learning rates; each model takes the best of them, tried with a seed of its own.
        tune_steps: of the runs that try them.
        seeds: how many by default.
        max_bytes: of the training text; 0 for all of it.
        measure: what the measures need: "window" and "window_tokens" of context use, and where levels learn meanwhile
            "choosing_tokens" of a text of "choosing_bytes"; "questions" of each set.
        learning: what is tried where levels learn: a period in tokens, and settings of `LearningRule`.
    """

    size: Mapping[str, Any]
    runs: Mapping[str, Any]
    rates: tuple[float, ...]
    tune_steps: int
    seeds: int
    max_bytes: int
    measure: Mapping[str, int]
    learning: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class NovelsTable:
    """A table of language models, trained on novels.

    Attributes:
        title: heading of the page.
        models: names as in `language_modeling.MODELS`, or variants "hope/no momentum" of them, with their own settings
            of `HopeConfig`; "hope" is the reference, whose number of parameters all take.
        plan: the table at a scale.
        page: (records, measured by the records' names, plan) -> Markdown.
        plot: (records, measured, path of the picture).
        measure: one of `MEASURES`, of the trained models; None for their held-out loss alone.
        learners: models that are measured once more while their levels learn, see `while_learning`.
        one_rate: whether all take the learning rate that is best for "hope", as variants of one model do.
    """

    title: str
    models: Mapping[str, Mapping[str, Any]]
    plan: Callable[[Scale], NovelsPlan]
    page: Callable[[Sequence[Record], Mapping[str, Any], NovelsPlan], str]
    plot: Callable[[Sequence[Record], Mapping[str, Any], Path], None]
    measure: str | None = None
    learners: tuple[str, ...] = ()
    one_rate: bool = False


def plan(scale: Scale) -> NovelsPlan:
    """Bytes of ELTeC's English novels at every scale; "paper" reads all of them with a model of 10M parameters."""
    size = {"dim": 128, "depth": 2, "heads": 2, "cms_periods": (1, 4), "cms_expansion": 2.0}
    runs: dict[str, Any] = {"steps": 400, "batch_size": 4, "sequence_length": 512, "eval_tokens": 131_072}
    runs["eval_every"] = 100
    small = NovelsPlan(
        size=size,
        runs=runs,
        rates=(2e-3, 4e-3),
        tune_steps=100,
        seeds=3,
        max_bytes=20_000_000,
        measure={
            "window": 16 * 512,
            "window_tokens": 64 * 16 * 512,
            "choosing_tokens": 8 * 16 * 512,
            "choosing_bytes": 8_000_000,
            "questions": 512,
        },
        learning=LEARNING,
    )
    if scale == "smoke":
        return NovelsPlan(
            size={**size, "dim": 16},
            runs={"steps": 2, "batch_size": 2, "sequence_length": 32, "eval_tokens": 128},
            rates=(4e-3,),
            tune_steps=1,
            seeds=1,
            max_bytes=100_000,
            measure={
                "window": 128,
                "window_tokens": 1024,
                "choosing_tokens": 512,
                "choosing_bytes": 100_000,
                "questions": 4,
            },
            learning=LEARNING[:1],
        )
    if scale == "small":
        return small
    return NovelsPlan(
        size={"dim": 320, "depth": 6, "heads": 5, "cms_periods": (1, 4), "cms_expansion": 2.0},
        runs={
            **runs,
            "steps": 6000,
            "batch_size": 16,
            "sequence_length": 2048,
            "eval_every": 600,
            "device": "auto",
            "precision": "auto",
        },
        rates=(1e-3, 2e-3, 4e-3),
        tune_steps=600,
        seeds=3,
        max_bytes=0,
        measure={
            "window": 16 * 2048,
            "window_tokens": 2**22,
            "choosing_tokens": 2**19,
            "choosing_bytes": 80_000_000,
            "questions": 10_000,
        },
        learning=LEARNING,
    )


def reproduce_novels(table: NovelsTable, order: Order) -> str:
    """Runs what is not done yet and writes `out`.json, `out`.md and `out`.png; returns the page.

    Runs of the same models lie in the same folders for every table, so that one table goes on with another's.

    Raises:
        ValueError: for an unknown model, or columns, which these tables have not.
        FileNotFoundError: if the novels are not there.
        JobsFailed: if runs failed; the others are kept.
    """
    plan = table.plan(order.scale)
    names = order.models or tuple(table.models)
    unknown = [name for name in names if name not in table.models]
    if unknown:
        raise ValueError(f"models: expected some of {', '.join(table.models)}; got {', '.join(unknown)}")
    if order.columns:
        raise ValueError("columns: this table has one task only; leave --columns out")
    for name in (TEXT, HELD_OUT):
        if not (find_data_root() / name).exists():
            raise missing_file(find_data_root() / name, what="novels")
    reference = model_config("hope", **plan.size, **table.models["hope"])
    target = count_parameters(reference)
    configs = {
        name: reference if name == "hope" else model_config(name, target=target, **{**plan.size, **table.models[name]})
        for name in names
    }
    text, held_out = (f"$NESTLEARN_DATA/{name}" for name in (TEXT, HELD_OUT))
    tuned = {"hope": reference} if table.one_rate else configs
    rates, tuning = dict.fromkeys(tuned, plan.rates[0]), list[Record]()
    if len(plan.rates) > 1:
        rates, tuning = try_rates(
            tuned,
            DataConfig(text=text, max_bytes=plan.max_bytes),
            lambda rate: schedule(lr=rate, seed=TUNING_SEED, **{**plan.runs, "steps": plan.tune_steps}),
            plan.rates,
            order.runs,
            processes=order.processes,
        )
    data = DataConfig(text=text, held_out=held_out, max_bytes=plan.max_bytes)
    jobs = [
        make_job(
            name,
            config,
            data,
            schedule(lr=rates["hope" if table.one_rate else name], seed=seed, **plan.runs),
            order.runs,
        )
        for seed in range(order.seeds or plan.seeds)
        for name, config in configs.items()
    ]
    records = run_jobs(train_one, jobs, order.runs / "records", processes=order.processes)
    measured: dict[str, Any] = {}
    if table.measure is not None:
        fit = [record["job"] for record in records if not record["diverged"]]
        measuring = [_measuring(job, table.measure, plan) for job in fit]
        found = run_jobs(measure_one, measuring, order.runs / "records", processes=order.processes)
        measured = {job["name"]: record["measured"] for job, record in zip(fit, found, strict=True)}
    if table.learners:
        fit = [
            record["job"] for record in records if not record["diverged"] and record["job"]["model"] in table.learners
        ]
        learning = [_measuring(job, LEARNS, plan, rules=[dict(rule) for rule in plan.learning]) for job in fit]
        found = run_jobs(measure_one, learning, order.runs / "records", processes=order.processes)
        measured |= {while_learning(job["name"]): r["measured"] for job, r in zip(fit, found, strict=True)}
    figure = order.out.with_name(order.out.name + ".png")
    table.plot(records, measured, figure)
    page = f"{_protocol(table, plan, [*records, *tuning], order.scale)} {table.page(records, measured, plan)}"
    results = {"scale": order.scale, "tuning": tuning, "runs": records, "measured": measured}
    return write_report(order.out, table.title, f"{page}\n\n![{table.title}]({figure.name})", results)


def _measuring(job: Job, measure: str, plan: NovelsPlan, **others: Any) -> Job:
    needed = {
        "zero-shot": ("questions",),
        LEARNS: ("window", "window_tokens", "choosing_tokens", "choosing_bytes"),
    }.get(measure, ("window", "window_tokens"))
    settings = {"sequence_length": plan.runs["sequence_length"], **{name: plan.measure[name] for name in needed}}
    label = "-".join(str(value) for value in settings.values())
    if others:
        label += "-" + hashlib.blake2b(json.dumps(others, sort_keys=True).encode(), digest_size=4).hexdigest()
    return {
        "name": f"{job['name']}-{measure}-{label}",
        "folder": job["folder"],
        "measure": measure,
        **settings,
        **others,
    }


def measure_one(job: Job) -> Record:
    """What a measure finds in the newest checkpoint of a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(job["folder"], device=device)
    return {"measured": MEASURES[job["measure"]](model, tokenizer, job)}


def _windows(name: str, tokenizer: Tokenizer, job: Job, max_bytes: int | None = None) -> PackedTokens:
    documents = tokenize_documents(read_documents(find_data_root() / name, max_bytes=max_bytes), tokenizer)
    return PackedTokens(documents, sequence_length=job["window"])


def _context_use(model: nn.Module, tokenizer: Tokenizer, job: Job, reader: Reader | None = None) -> Any:
    data = _windows(HELD_OUT, tokenizer, job)
    found = loss_by_position(
        model, data, fresh_every=job["sequence_length"], max_tokens=job["window_tokens"], reader=reader
    )
    return [stretch.to_dict() for stretch in found]


def _context_use_while_learning(model: nn.Module, tokenizer: Tokenizer, job: Job) -> Any:
    """The best of some rules, tried on novels of the training side, and what it finds in the others."""
    model.eval()
    readers = []
    for rule in job["rules"]:
        settings = {name: value for name, value in rule.items() if name != "period"}
        stacked = stack_levels(model, (rule["period"],), strategy="whole_depth", notice=None)
        readers.append(learning_reader(stacked, [LearningRule(**settings)], window=2 * job["sequence_length"]))
    chosen_on = _windows(TEXT, tokenizer, job, job["choosing_bytes"])
    tried = []
    for reader in readers:
        bits = torch.cat([reader(*given) for given in windows(chosen_on, max_tokens=job["choosing_tokens"])])
        tried.append(finite_or_none(bits.mean().item()))
    finite = [bits for bits in tried if bits is not None]
    if not finite:
        return {"tried": tried, "chosen": None, "stretches": None}
    best = tried.index(min(finite))
    stretches = _context_use(model, tokenizer, job, readers[best])
    return {"tried": tried, "chosen": job["rules"][best], "stretches": stretches}


def while_learning(name: str) -> str:
    """What a model is called whose levels learn while it is measured: all its MLP blocks (Eq. 71), in each window from
    the trained weights on."""
    return f"{name}, levels learn"


def _zero_shot(model: nn.Module, tokenizer: Tokenizer, job: Job) -> Any:
    return {name: ask(model, tokenizer, read_questions(name, limit=job["questions"])) for name in FILES}


MEASURES: dict[str, Callable[[nn.Module, Tokenizer, Job], Any]] = {
    "context use": _context_use,
    LEARNS: _context_use_while_learning,
    "zero-shot": _zero_shot,
}


def _protocol(table: NovelsTable, plan: NovelsPlan, records: Sequence[Record], scale: Scale) -> str:
    runs, size = plan.runs, plan.size
    threads = "One thread a run, " if runs.get("device", "cpu") == "cpu" else ""
    tokens = runs["steps"] * runs["batch_size"] * runs["sequence_length"]
    seconds = [record["train"][-1]["seconds"] for record in records if record["train"]]
    chosen = f"learning rate {plan.rates[0]:g}"
    if len(plan.rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in plan.rates)
        whose = "the one that is best for Hope for all" if table.one_rate else "the best for each model"
        chosen = (
            f"of the learning rates {tried} {whose}, after {plan.tune_steps:,} steps with a seed of its own, on a part "
            f"of the training side"
        )
    return (
        f"Scale {scale}. Byte-level models of width {size['dim']}, {size['depth']} blocks and {size['heads']} heads "
        f"with equal numbers of parameters (by the width of the CMS levels), trained on {tokens:,} bytes of ELTeC's "
        f"English novels (batch {runs['batch_size']} x {runs['sequence_length']}, {runs['steps']:,} steps of AdamW, "
        f"warm-up and cosine), and evaluated on other novels; {chosen}. ± is the standard error over seeds, which fix "
        f"initial weights and the order of the text; differences are between runs of the same seed. {threads}"
        f"{sum(seconds) / 3600:.1f} hours of training in all, the longest run {max(seconds) / 60:.1f} minutes."
    )
