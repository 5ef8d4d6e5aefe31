"""TNT's two stages beside plain training with the small chunks that its local memories use (2511.07343).

    python -m nestlearn.evaluation.sequence_parallel --text train.jsonl.gz --held-out valid.jsonl.gz --steps 190 \\
        --fine-tune-steps 10 --seeds 0,1,2 --tune 4e-3,8e-3 --out results/tnt

times training steps of all models in turns in one process, after each has shown that it reads a sequence whole as it
does token by token; then trains self-modifying Titans with each of the plain chunk sizes, and TNT in two stages with as
many tokens in all, each run in a process of its own with one thread. `--steps 0` measures speed alone, `--alternations
0` loss alone. Runs go on where they were stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nestlearn.evaluation.benchmarks import check_equality
from nestlearn.evaluation.benchmarks.work import make_work
from nestlearn.evaluation.jobs import Job, Record, run_jobs
from nestlearn.evaluation.language_modeling import (
    TUNING_SEED,
    choose_rates,
    final_bits,
    make_job,
    parse_settings,
    train_one,
)
from nestlearn.evaluation.matching import count_parameters, match_parameters
from nestlearn.evaluation.report import markdown_table, with_error, write_report
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.config import DataConfig, TrainingConfig
from nestlearn.training.process import prepare_process


def make_configs(
    size: Mapping[str, Any],
    local: Sequence[int],
    fine: Sequence[int],
    plain: Sequence[int],
    settings: Mapping[str, Any],
) -> dict[str, HopeConfig]:
    """The models by name: TNT in its first and its second stage, and plain ones, all with as many parameters.

    Args:
        size: dim, depth and heads.
        local: chunk sizes of the local memories in the first stage.
        fine: those in the second stage.
        plain: chunk sizes of the plain models.
        settings: others of TNT.
    """
    others = {f"chunk {chunk}": HopeConfig(chunk_size=chunk, **size) for chunk in plain}
    target = count_parameters(next(iter(others.values())))
    first = match_parameters(HopeConfig(mixer="tnt", local_chunk_sizes=tuple(local), **{**size, **settings}), target)
    second = dataclasses.replace(first, local_chunk_sizes=tuple(fine))
    return {f"TNT {tuple(local)}": first, f"TNT {tuple(fine)}": second, **others}


def time_models(
    configs: Mapping[str, HopeConfig], *, tokens: int, batch: int, alternations: int, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of a training step of each model on random bytes, one value a turn; the first, untimed turn warms up.

    Args:
        configs: the models; each is checked first.
        tokens: T.
        batch: B.
        alternations: turns.
        seed: of weights and tokens.

    Raises:
        NotEqual: if a model does not read whole sequences as it reads tokens.
    """
    for config in configs.values():
        check_equality(config)
    torch.manual_seed(seed)
    steps = {name: make_work("train", HopeLM(config), batch, tokens).step for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(alternations + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
            print(f"turn {turn} of {alternations}: {name} {time.perf_counter() - begin:.1f} s", flush=True)
    return seconds


def speed_table(seconds: Mapping[str, Sequence[float]], tokens_per_step: int) -> str:
    """A line a model, and how many times as fast the first one is (its median and range over the turns)."""
    first = next(iter(seconds))
    rows: list[list[Any]] = []
    for name, taken in seconds.items():
        ratios = [other / own for other, own in zip(taken, seconds[first], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        median = statistics.median(taken)
        rows.append([name, f"{median:.2f}", f"{tokens_per_step / median:,.0f}", None if name == first else spread])
    return markdown_table(["model", "seconds a step", "tokens/s", f"{first} is faster by"], rows)


def train_stages(job: Job) -> Record:
    """The run of a job, and of its second stage if it has one: "stages", with held-out bits after each."""
    stages = [train_one(job)]
    if job["second"] is not None and not stages[0]["diverged"]:
        stages.append(train_one(job["second"]))
    return {"stages": stages}


def loss_table(records: Sequence[Record], reference: str) -> str:
    """A line a model: held-out bits per byte after each stage, the paired difference to the reference, and the time."""
    by_model: dict[str, dict[int, Record]] = {}
    for record in records:
        by_model.setdefault(record["job"]["model"], {})[record["job"]["seed"]] = record
    rows: list[list[Any]] = []
    for name, runs in by_model.items():
        ends = {seed: [final_bits(stage) for stage in record["stages"]] for seed, record in runs.items()}
        pairs = [bits[-1] - final_bits(by_model[reference][seed]["stages"][-1]) for seed, bits in ends.items()]
        last = [[stage["train"][-1] for stage in record["stages"]] for record in runs.values()]
        two = all(len(bits) > 1 for bits in ends.values())
        rows.append(
            [
                name,
                f"{next(iter(runs.values()))['stages'][0]['parameters']:,}",
                f"{next(iter(runs.values()))['job']['lr']:g}",
                len(runs),
                f"{sum(row['tokens'] for row in last[0]):,}",
                with_error([bits[0] for bits in ends.values()]) if two else None,
                with_error([bits[-1] for bits in ends.values()]),
                None if name == reference else with_error(pairs, signed=True),
                with_error([sum(row["seconds"] for row in rows_) / 60 for rows_ in last], 1),
            ]
        )
    header = ["model", "parameters", "lr", "seeds", "tokens", "bits/byte after stage 1", "held-out bits/byte"]
    return markdown_table([*header, f"paired difference to {reference}", "minutes of training"], rows)


def schedule(given: argparse.Namespace, steps: int, lr: float, seed: int, **others: Any) -> TrainingConfig:
    """That of all runs, but for their length, learning rate and seed."""
    return TrainingConfig(
        steps=steps,
        batch_size=given.batch_size,
        sequence_length=given.sequence_length,
        lr=lr,
        warmup=max(1, steps // 10),
        log_every=max(1, steps // 50),
        eval_every=0,
        eval_tokens=given.eval_tokens,
        checkpoint_every=max(1, steps // 10),
        keep_checkpoints=1,
        seed=seed,
        device="cpu",
        precision="fp32",
        threads=1,
        activation_checkpointing=given.activation_checkpointing,
        **others,
    )


def tune(given: argparse.Namespace, configs: Mapping[str, HopeConfig], runs: Path) -> list[Record]:
    """Short runs of TNT's first stage and of the plain models at each learning rate, on the training side alone."""
    data = DataConfig(text=given.text, max_bytes=given.max_bytes)
    second = list(configs)[1]
    jobs = [
        make_job(name, config, data, schedule(given, given.tune_steps or given.steps // 4, lr, TUNING_SEED), runs)
        for lr in given.tune
        for name, config in configs.items()
        if name != second
    ]
    return run_jobs(train_one, jobs, runs / "records", processes=given.jobs)


def make_jobs(
    given: argparse.Namespace, configs: Mapping[str, HopeConfig], rates: Mapping[str, float], runs: Path
) -> list[Job]:
    """A run of each model for each seed at its learning rate; that of TNT has a second stage."""
    data = DataConfig(text=given.text, held_out=given.held_out, max_bytes=given.max_bytes)
    stages, plain = list(configs.items())[:2], list(configs.items())[2:]
    jobs: list[Job] = []
    for seed in map(int, given.seeds.split(",")):
        lr = rates[stages[0][0]]
        first = make_job("tnt", stages[0][1], data, schedule(given, given.steps, lr, seed), runs)
        second = None
        if given.fine_tune_steps:
            # The second stage reads the text in another order, as `nestlearn train --from` does.
            lr *= given.fine_tune_lr
            later = schedule(given, given.fine_tune_steps, lr, seed + 1, start_from=first["folder"])
            second = make_job("tnt_fine_tuned", stages[1][1], data, later, runs)
        jobs.append({**first, "model": stages[0][0], "second": second})
        for name, config in plain:
            training = schedule(given, given.steps + given.fine_tune_steps, rates[name], seed)
            job = make_job(name.replace(" ", "_"), config, data, training, runs)
            jobs.append({**job, "model": name, "second": None})
    return jobs


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", default="stdlib", help="what to train on: file, folder, .jsonl(.gz), datasets name or stdlib")
    add("--held-out", default="", help="what to evaluate on; by default 5%% of the documents of --text")
    add("--max-bytes", type=int, default=0, help="read about this much of --text; 0 for all")
    add("--sequence-length", type=int, default=16384)
    add("--batch-size", type=int, default=1)
    add("--dim", type=int, default=128)
    add("--depth", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--local-chunks", type=_numbers, default=(16,), help="of TNT's local memories in the first stage")
    add("--fine-tune-chunks", type=_numbers, default=(8,), help="of the same in the second stage")
    add("--plain-chunks", type=_numbers, default=(8, 16), help="of the plain models, one each")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of TNT, as in HopeConfig")
    add("--alternations", type=int, default=3, help="how often all models are timed in turn; 0: no timing")
    add("--threads", type=int, default=1, help="of the timing; training takes one")
    add("--steps", type=int, default=190, help="of the first stage; 0: no training")
    add("--fine-tune-steps", type=int, default=10, help="of the second, 0: none; plain models take both together")
    add("--lr", type=float, default=4e-3)
    add("--tune", type=_rates, default=(), metavar="LR,LR,...", help="try these for every model, and use its best")
    add("--tune-steps", type=int, default=0, help="steps of each of these runs; by default a quarter of --steps")
    add("--fine-tune-lr", type=float, default=0.1, help="of the second stage, as a fraction of the first one's")
    add("--seeds", default="0")
    add("--eval-tokens", type=int, default=131_072)
    add("--activation-checkpointing", action="store_true", help="train with less memory")
    add("--jobs", type=int, default=1, help="processes, one thread each")
    add("--out", type=Path, default=Path("results/sequence_parallel"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the runs; by default runs/<name of --out>")
    return parser


def main() -> None:
    parser = _parser()
    given = parser.parse_args()
    size = {"dim": given.dim, "depth": given.depth, "heads": given.heads}
    try:
        settings = parse_settings(given.set, ["tnt"])["tnt"]
        configs = make_configs(size, given.local_chunks, given.fine_tune_chunks, given.plain_chunks, settings)
    except ValueError as error:
        parser.error(str(error))
    prepare_process(threads=given.threads)
    tokens, tnt = given.batch_size * given.sequence_length, next(iter(configs.values()))
    parts = [
        f"Hope of width {given.dim}, {given.depth} blocks, {given.heads} heads on bytes, sequences of "
        f"{given.sequence_length:,} tokens, batch {given.batch_size}, fp32; parameter counts matched by the width "
        f"of the CMS levels. TNT: global chunk {tnt.global_chunk_size:,}, global stride {tnt.global_stride}, shards of "
        f"{tnt.shard_length:,}, local chunks in brackets; plain: self-modifying Titans with one chunk size."
    ]
    results: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}}
    if given.alternations:
        seconds = time_models(
            configs, tokens=given.sequence_length, batch=given.batch_size, alternations=given.alternations
        )
        results["seconds"] = seconds
        parts.append(
            f"A training step with {given.threads} threads, median of {given.alternations} turns:\n\n"
            f"{speed_table(seconds, tokens)}"
        )
    if given.steps:
        runs = given.runs or Path("runs") / given.out.name
        rates, chosen = dict.fromkeys(configs, given.lr), ""
        if given.tune:
            results["tuning"] = tune(given, configs, runs)
            rates |= choose_rates(results["tuning"])
            tried = ", ".join(f"{rate:g}" for rate in given.tune)
            chosen = (
                f" Learning rates: the best of {tried} for each model after {given.tune_steps or given.steps // 4:,} "
                f"steps with a seed of its own, on documents held out of the training side."
            )
        jobs = make_jobs(given, configs, rates, runs)
        results["runs"] = records = run_jobs(train_stages, jobs, runs / "records", processes=given.jobs)
        table = loss_table(records, f"chunk {given.plain_chunks[0]}")
        parts.append(
            f"Trained on {Path(given.text).name} with one thread: TNT {given.steps:,} steps, then "
            f"{given.fine_tune_steps:,} with the smaller chunks at {given.fine_tune_lr:g} of the learning rate; the "
            f"others as many steps in all.{chosen} ± is the standard error over seeds.\n\n{table}"
        )
    print(write_report(given.out, "Sequence-parallel training", "\n\n".join(parts), results))


if __name__ == "__main__":
    main()
