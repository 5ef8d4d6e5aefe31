"""Language models trained from scratch at equal parameters, equal tokens and equal data order (Sec. 9 of the paper).

    python -m nestlearn.evaluation.language_modeling --text train.jsonl.gz --held-out valid.jsonl.gz \\
        --models hope,titans,gated_delta_net,hope_attention,transformer --seeds 0,1,2 --out results/novels

trains every model with every seed, each run in a process of its own with one thread. A seed fixes the initial weights
and the order of the data, so that two models with one seed form a pair. Runs live in folders of their own and go on
where they were stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.matching import count_parameters, match_parameters
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error, write_report
from nestlearn.io import atomic_path
from nestlearn.models import HopeConfig
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.loop import TrainingDiverged, train
from nestlearn.training.plots import read_log

# What each name stands for: a mixer inside the layout of Hope, or a plain Transformer.
MODELS: dict[str, dict[str, Any]] = {
    "hope": {"mixer": "self_modifying_titans"},
    "tnt": {"mixer": "tnt"},
    "titans": {"mixer": "titans"},
    "gated_delta_net": {"mixer": "gated_delta_net"},
    "delta_net": {"mixer": "delta_net"},
    "linear_attention": {"mixer": "linear_attention"},
    "hope_attention": {"mixer": "attention"},
    "transformer": {"mixer": "plain_attention"},
}

# Seed of the runs that choose a learning rate; it takes no part in the comparison.
TUNING_SEED = 1000


def model_config(name: str, *, target: int | None = None, **settings: Any) -> HopeConfig:
    """The configuration of one of `MODELS`, or of a variant of it.

    Args:
        name: of the model; what follows a slash only tells variants apart ("hope/wide").
        target: parameter count to match by the width of the CMS levels; None leaves the width as it is.
        settings: of `HopeConfig`.

    Raises:
        ValueError: if there is no such model.
    """
    kind = name.partition("/")[0]
    if kind not in MODELS:
        raise ValueError(f"models: expected some of {', '.join(MODELS)}; got {name!r}")
    make = HopeConfig.transformer if kind == "transformer" else HopeConfig
    config = make(**{**settings, **MODELS[kind]})
    return config if target is None else match_parameters(config, target)


def make_job(name: str, config: HopeConfig, data: DataConfig, training: TrainingConfig, folder: Path) -> Job:
    """One run, named by its model, its seed and a digest of everything that it computes."""
    run = RunConfig(model=config.to_dict(), data=data, training=training).to_dict()
    digest = hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=4).hexdigest()
    label = f"{name.replace('/', '_')}-seed{training.seed}-lr{training.lr:g}-{digest}"
    return {"name": label, "model": name, "lr": training.lr, "seed": training.seed, "run": run,
            "folder": str(folder / label)}  # fmt: skip


def train_one(job: Job) -> Record:
    """Trains, or goes on with, the run of a job and returns its curve.

    A run that diverges is a result too: its held-out values end there and `diverged` says why.
    """
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    diverged = None
    model = dict(job["run"]["model"])
    run = RunConfig(
        model=model,
        data=DataConfig(**{name: expanded(value) for name, value in job["run"]["data"].items()}),
        training=TrainingConfig(**{**job["run"]["training"], "betas": tuple(job["run"]["training"]["betas"])}),
    )
    with open(folder / "progress.txt", "a", encoding="utf-8") as progress, contextlib.redirect_stderr(progress):
        try:
            result = train(run, folder, resume=True)
            if result.interrupted:
                raise KeyboardInterrupt
        except TrainingDiverged as error:
            diverged = str(error)
    rows = read_log(folder / "log.jsonl")
    return {
        "parameters": count_parameters(HopeConfig.from_dict(model)),
        "train": [_pick(row, "step", "tokens", "loss", "seconds") for row in rows if row["event"] == "train"],
        "held_out": [_pick(row, "step", "tokens", "loss", "bits_per_byte") for row in rows if row["event"] == "eval"],
        "diverged": diverged,
    }


def expanded(value: Any) -> Any:
    """A path with the environment's variables in it: jobs and records name no folder of this machine."""
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value


def try_rates(
    configs: Mapping[str, HopeConfig],
    data: DataConfig,
    schedule: Callable[[float], TrainingConfig],
    rates: Sequence[float],
    folder: Path,
    *,
    processes: int,
) -> tuple[dict[str, float], list[Record]]:
    """For each model the best of some learning rates, and the runs that showed it.

    Args:
        configs: models by name.
        data: text of the training side alone; a part of it is held out here, so that the text of a comparison stays
            unseen.
        schedule: of a run at a learning rate.
        rates: to be tried.
        folder: of the runs.
        processes: runs at once.
    """
    jobs = [make_job(name, config, data, schedule(rate), folder) for rate in rates for name, config in configs.items()]
    records = run_jobs(train_one, jobs, folder / "records", processes=processes)
    return choose_rates(records), records


def schedule(*, steps: int, lr: float, seed: int, **settings: Any) -> TrainingConfig:
    """A run of a comparison: fp32 on one CPU thread, what is not said in proportion to its steps."""
    others: dict[str, Any] = {
        "warmup": max(1, steps // 20),
        "log_every": max(1, steps // 50),
        "eval_every": max(1, steps // 10),
        "checkpoint_every": max(1, steps // 10),
        "weight_decay": 0.1,
        "keep_checkpoints": 1,
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
    }
    return TrainingConfig(steps=steps, lr=lr, seed=seed, **{**others, **settings})


def final_bits(record: Record) -> float:
    """Held-out bits per byte at the end of a run; infinite if it diverged."""
    return float("inf") if record["diverged"] else float(record["held_out"][-1]["bits_per_byte"])


def choose_rates(records: Sequence[Record]) -> dict[str, float]:
    """The learning rate with the lowest held-out bits per byte for each model."""
    best: dict[str, Record] = {}
    for record in records:
        name = record["job"]["model"]
        if name not in best or final_bits(record) < final_bits(best[name]):
            best[name] = record
    return {name: record["job"]["lr"] for name, record in best.items()}


def comparison_table(records: Sequence[Record], reference: str) -> str:
    """One line a model: mean and standard error over seeds, and the paired difference to the reference model.

    A model that diverged with some seed has no mean; the line says how often.
    """
    by_model: dict[str, dict[int, Record]] = {}
    for record in records:
        by_model.setdefault(record["job"]["model"], {})[record["job"]["seed"]] = record
    rows = []
    for name, runs in by_model.items():
        some = next(iter(runs.values()))
        line: list[Any] = [name, f"{some['parameters']:,}", f"{some['job']['lr']:g}", len(runs)]
        failed = sum(1 for record in runs.values() if record["diverged"])
        if failed:
            rows.append([*line, f"diverged in {failed}", None, None, None, None])
            continue
        pairs = [seed for seed in runs if not by_model.get(reference, {}).get(seed, {"diverged": True})["diverged"]]
        difference = [final_bits(runs[seed]) - final_bits(by_model[reference][seed]) for seed in pairs]
        bits = [final_bits(record) for record in runs.values()]
        loss = [record["train"][-1]["loss"] for record in runs.values()]
        tokens = some["train"][-1]["tokens"]
        speed, _ = mean_and_error([r["train"][-1]["tokens"] / r["train"][-1]["seconds"] for r in runs.values()])
        rows.append(
            [
                *line,
                with_error(bits),
                with_error(difference, signed=True) if difference and name != reference else None,
                with_error(loss, 3),
                f"{tokens:,}",
                f"{speed:,.0f}",
            ]
        )
    header = [
        "model",
        "parameters",
        "lr",
        "seeds",
        "held-out bits/byte",
        f"paired difference to {reference}",
        "training loss (nats)",
        "tokens",
        "tokens/s",
    ]
    return markdown_table(header, rows)


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Held-out bits per byte over tokens: the mean over seeds, and a band of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(record["job"]["model"] for record in records)):
        curves = [record["held_out"] for record in records if record["job"]["model"] == name and record["held_out"]]
        length = min((len(curve) for curve in curves), default=0)
        if not length:
            continue
        tokens = [point["tokens"] for point in curves[0][:length]]
        points = [mean_and_error([curve[j]["bits_per_byte"] for curve in curves]) for j in range(length)]
        means = [mean for mean, _ in points]
        errors = [error or 0.0 for _, error in points]
        axes.plot(tokens, means, "o-", color=f"C{i}", linewidth=1.5, markersize=3, label=name)
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(tokens, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.25, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def parse_rates(text: str, models: Sequence[str]) -> dict[str, float]:
    """ "2e-3" for all models, or "hope=3e-3,transformer=1e-3,2e-3": a number alone is for all that are not named.

    Raises:
        ValueError: if a model has no rate, or a name or number is unknown.
    """
    named: dict[str, float] = {}
    default: float | None = None
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        if equals and name not in models:
            raise ValueError(f"lr: {name!r} is not among the models {', '.join(models)}")
        if equals:
            named[name] = float(value)
        else:
            default = float(value)
    missing = [name for name in models if name not in named and default is None]
    if missing:
        raise ValueError(f"lr: no learning rate for {', '.join(missing)}; add one without a name for all others")
    return {name: named.get(name, default) for name in models}  # type: ignore[misc]


def parse_settings(parts: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by model from "key=value" (all models) and "model:key=value"; values are JSON, or else text."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in models}
    for part in parts:
        where, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f"set: expected key=value or model:key=value, got {part!r}")
        name, colon, key = where.rpartition(":")
        if colon and name not in models:
            raise ValueError(f"set: {name!r} is not among the models {', '.join(models)}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        for model in [name] if colon else models:
            settings[model][key] = value
    return settings


def _pick(row: Mapping[str, Any], *names: str) -> Record:
    return {name: row[name] for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", default="stdlib", help="what to train on: file, folder, .jsonl(.gz), datasets name or stdlib")
    add("--held-out", default="", help="what to evaluate on; by default 5%% of the documents of --text")
    add("--max-bytes", type=int, default=0, help="read about this much of --text; 0 for all")
    add(
        "--models",
        default="hope,titans,gated_delta_net,hope_attention,transformer",
        help="of " + ", ".join(MODELS) + "; name/label is a variant, for --set name/label:key=value",
    )
    add("--reference", default="hope", help="the model that others are compared to, and whose size they take")
    add("--seeds", default="0,1,2")
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=16)
    add("--sequence-length", type=int, default=512)
    add("--dim", type=int, default=128)
    add("--depth", type=int, default=4)
    add("--heads", type=int, default=2)
    add("--set", action="append", default=[], metavar="[MODEL:]KEY=VALUE", help="other settings of HopeConfig")
    add("--lr", default="2e-3", help="a number, or model=number,...,number")
    add("--tune", default="", metavar="LR,LR,...", help="try these rates for every model first, and use the best")
    add("--tune-steps", type=int, default=0, help="steps of each of these runs; by default a quarter of --steps")
    add("--note", default="", help="a sentence for the report, for example how learning rates were chosen")
    add("--warmup", type=int, default=0, help="steps; by default a twentieth of --steps")
    add("--weight-decay", type=float, default=0.1)
    add("--eval-every", type=int, default=0, help="steps; by default a tenth of --steps")
    add("--eval-tokens", type=int, default=131_072, help="held-out tokens of an evaluation, always the same")
    add("--checkpoint-every", type=int, default=0, help="steps; by default a tenth of --steps")
    add("--jobs", type=int, default=2, help="processes, one thread each")
    add("--out", type=Path, default=Path("results/language_modeling"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the runs; by default runs/<name of --out>")
    return parser


def main() -> None:
    parser = _parser()
    given = parser.parse_args()
    models = given.models.split(",")
    try:
        settings = parse_settings(given.set, models)
        rates = parse_rates(given.lr, models)
        size = {"dim": given.dim, "depth": given.depth, "heads": given.heads}
        reference = model_config(given.reference, **{**size, **settings.get(given.reference, {})})
        target = count_parameters(reference)
        configs = {
            name: model_config(name, target=None if name == given.reference else target, **{**size, **settings[name]})
            for name in models
        }
    except ValueError as error:
        parser.error(str(error))
    runs = given.runs or Path("runs") / given.out.name
    data = DataConfig(text=given.text, held_out=given.held_out, max_bytes=given.max_bytes)
    settings_of_runs = {
        "batch_size": given.batch_size,
        "sequence_length": given.sequence_length,
        "weight_decay": given.weight_decay,
        "eval_tokens": given.eval_tokens,
    }
    for name in ("warmup", "eval_every", "checkpoint_every"):
        if getattr(given, name):
            settings_of_runs[name] = getattr(given, name)

    tuning: list[Record] = []
    notes = [given.note] if given.note else []
    if given.tune:
        tried = [float(rate) for rate in given.tune.split(",")]
        steps = given.tune_steps or max(1, given.steps // 4)
        rates, tuning = try_rates(
            configs,
            DataConfig(text=given.text, max_bytes=given.max_bytes),
            lambda rate: schedule(steps=steps, lr=rate, seed=TUNING_SEED, **settings_of_runs),
            tried,
            runs,
            processes=given.jobs,
        )
        notes.append(
            f"Learning rates: the best of {', '.join(f'{rate:g}' for rate in tried)} for each model, after {steps:,} "
            f"steps with a seed of its own, on documents held out of the training side."
        )
    jobs = [
        make_job(
            name,
            configs[name],
            data,
            schedule(steps=given.steps, lr=rates[name], seed=int(seed), **settings_of_runs),
            runs,
        )
        for seed in given.seeds.split(",")
        for name in models
    ]
    records = run_jobs(train_one, jobs, runs / "records", processes=given.jobs)
    tokens = given.steps * given.batch_size * given.sequence_length
    text = (
        f"Byte-level models trained on {tokens:,} tokens of {Path(given.text).name} (batch {given.batch_size} x "
        f"{given.sequence_length}, {given.steps:,} steps of AdamW, linear warm-up and cosine), evaluated on "
        f"{Path(given.held_out).name if given.held_out else 'held-out documents of it'}; width {given.dim}, depth "
        f"{given.depth}, {given.heads} heads; parameter counts matched by the width of the CMS levels. ± is the "
        f"standard error over seeds; differences are between runs with the same initial seed and data order. Tokens/s "
        f"with one thread a run, {given.jobs} runs at once. {' '.join(notes)}".strip()
        + f"\n\n{comparison_table(records, given.reference)}\n\n![curves]({given.out.name}.png)"
    )
    plot_curves(records, given.out.with_name(given.out.name + ".png"))
    print(write_report(given.out, "Language modelling", text, {"tuning": tuning, "runs": records}))


if __name__ == "__main__":
    main()
