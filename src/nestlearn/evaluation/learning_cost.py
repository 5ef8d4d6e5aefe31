"""What it costs a stacked model to learn while it reads, and whether that stays the same over a long stream.

    python -m nestlearn.evaluation.learning_cost --tokens 1000000 --out results/learning_cost

Cost: `ContinualLearner.observe` beside the same model that reads the same tokens and learns nothing, in turns in one
process: with the learner's own window, and in one forward pass for each window. Stream: random tokens in one `observe`,
with the resident memory of the process and the speed of every twentieth of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.continual.learner import ContinualLearner
from nestlearn.evaluation.jobs import Job, Record, provenance, run_jobs
from nestlearn.evaluation.report import markdown_table, write_report
from nestlearn.io import atomic_path
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.stacking import stack_levels

VOCABULARY = 256
PARTS = 20
PERIODS = (512, 2048, 8192)
# Width and blocks.
SIZES = {"tiny": (32, 4), "small": (256, 8)}


def build(kind: str, size: str) -> nn.Module:
    """A model with random weights: "llama" of `transformers`, or "hope"."""
    torch.manual_seed(0)
    dim, depth = SIZES[size]
    if kind == "hope":
        return HopeLM(HopeConfig(vocab_size=VOCABULARY, dim=dim, depth=depth, heads=4, cms_periods=(1, 4))).eval()
    from transformers import AutoModelForCausalLM, LlamaConfig

    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=depth,
            num_attention_heads=4,
            max_position_embeddings=2048,
        )
    ).eval()


def measure(job: Job) -> Record:
    """A job's record."""
    learner = ContinualLearner(
        stack_levels(build(job["model"], job["size"]), PERIODS, strategy=job["strategy"], notice=None),
        lr=0.05,
        rule=job["rule"],
        window=job["window"],
    )
    tokens = torch.randint(VOCABULARY, (job["tokens"],), generator=torch.Generator().manual_seed(0))
    return stream(learner, tokens) if job["what"] == "stream" else cost(learner, tokens, job["turns"])


def cost(learner: ContinualLearner, tokens: Tensor, turns: int) -> Record:
    """Seconds of reading with learning, without it, and in whole windows; medians, after a turn that warms up."""

    @torch.no_grad()
    def whole() -> None:
        for piece in tokens.split(learner.window):
            learner.model(piece[None])

    works: dict[str, Callable[[], object]] = {
        "observe": lambda: learner.observe(tokens),
        "loss": lambda: learner.loss(tokens),
        "forward": whole,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    ratios = {
        name: [own / other for own, other in zip(seconds["observe"], seconds[name], strict=True)]
        for name in ("loss", "forward")
    }
    return {"times": seconds, "ratios": ratios}


def stream(learner: ContinualLearner, tokens: Tensor) -> Record:
    """Resident memory and speed of every part of one `observe`."""
    marks: list[tuple[int, float, float]] = [(0, time.perf_counter(), resident_megabytes())]

    def progress(done: int, loss: float) -> None:
        if done * PARTS // len(tokens) > marks[-1][0] * PARTS // len(tokens):
            marks.append((done, time.perf_counter(), resident_megabytes()))

    found = learner.observe(tokens, progress=progress)
    speeds = [(later - before) / (end - begin) for (before, begin, _), (later, end, _) in pairwise(marks)]
    return {
        "loss": found.loss,
        "updates": list(found.updates),
        "tokens": [done for done, _, _ in marks[1:]],
        "speeds": speeds,
        "megabytes": [size for _, _, size in marks[1:]],
    }


def resident_megabytes() -> float:
    """What this process holds in memory now, in units of 1e6 bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def flatness(record: Record) -> tuple[float, float]:
    """How far memory and speed go from their medians after the first part, as fractions."""
    worst = []
    for values in (record["megabytes"][1:], record["speeds"][1:]):
        middle = statistics.median(values)
        worst.append(max(abs(value - middle) for value in values) / middle)
    return worst[0], worst[1]


def page(records: list[Record]) -> str:
    """Markdown of both tables."""
    costs, streams = [], []
    for record in records:
        job = record["job"]
        head = [job["model"], job["size"], job["strategy"], job["rule"], f"{job['tokens']:,}"]
        if job["what"] == "cost":
            speed = job["tokens"] / statistics.median(record["times"]["observe"])
            ratios = [record["ratios"][name] for name in ("loss", "forward")]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
            costs.append([*head, f"{speed:,.0f}", *shown])
        else:
            memory, speed = flatness(record)
            sizes = [record["megabytes"][0], record["megabytes"][1], record["megabytes"][-1]]
            streams.append(
                [*head, *(f"{size:.1f}" for size in sizes), f"{memory:.1%}",
                 f"{statistics.median(record['speeds']):,.0f}", f"{speed:.1%}"]
            )  # fmt: skip
    names = ["model", "size", "strategy", "rule", "tokens"]
    return (
        f"Levels with periods {', '.join(f'{p:,}' for p in PERIODS)}, one row, one thread, fp32, random tokens and "
        f"weights; tiny is width {SIZES['tiny'][0]} with {SIZES['tiny'][1]} blocks, small is width "
        f"{SIZES['small'][0]} with {SIZES['small'][1]}.\n\n"
        "Cost of `observe` over that of reading the same tokens without learning, median of the turns (least to most): "
        "with the same segments and window, and in one forward pass a window.\n\n"
        + markdown_table([*names, "tokens/s", "over the same reading", "over plain forward passes"], costs)
        + "\n\nOne stream: resident memory in megabytes after the first and second twentieth and at the end, how far "
        "any later twentieth goes from the median, and the same of the speed.\n\n"
        + markdown_table([*names, "MB, first", "second", "end", "memory", "tokens/s", "speed"], streams)
    )


def plot(records: list[Record], path: Path) -> None:
    """Memory and speed along the streams."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for record in records:
        if record["job"]["what"] == "stream":
            label = f"{record['job']['model']}, {record['job']['strategy']}"
            left.plot(record["tokens"], record["megabytes"], label=label)
            right.plot(record["tokens"], record["speeds"], label=label)
    for axes, title in ((left, "resident memory, MB"), (right, "tokens/s")):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens read")
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=1_000_000, help="of a stream")
    add("--cost-tokens", type=int, default=16_384, help="read in each turn of a measurement of cost")
    add("--turns", type=int, default=5)
    add("--window", type=int, default=512)
    add("--out", type=Path, default=Path("results/learning_cost"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the records; by default runs/<name of --out>-<commit>")
    arguments = parser.parse_args()
    jobs: list[dict[str, Any]] = [
        {"what": "cost", "model": model, "size": size, "strategy": strategy, "rule": rule, "turns": arguments.turns,
         "tokens": arguments.cost_tokens}
        for size in SIZES
        for model in ("llama", "hope")
        for strategy, rule in (("last_quarter", "gd"), ("whole_depth", "gd"), ("whole_depth", "dgd"))
    ]  # fmt: skip
    jobs += [
        {"what": "stream", "model": model, "size": "tiny", "strategy": "whole_depth", "rule": "gd",
         "tokens": arguments.tokens}
        for model in ("llama", "hope")
    ]  # fmt: skip
    for job in jobs:
        job["window"] = arguments.window
        job["name"] = "-".join(str(job[key]) for key in ("what", "model", "size", "strategy", "rule", "tokens"))
    runs = arguments.runs or Path("runs") / f"{arguments.out.name}-{provenance()['commit']}"
    records = run_jobs(measure, jobs, runs, processes=1)
    figure = arguments.out.with_name(arguments.out.name + ".png")
    plot(records, figure)
    text = f"{page(records)}\n\n![Memory and speed along a stream]({figure.name})"
    print(write_report(arguments.out, "What learning costs while reading", text, {"runs": records}))


if __name__ == "__main__":
    main()
