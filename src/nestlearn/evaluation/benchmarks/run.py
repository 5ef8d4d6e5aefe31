"""Models against a Transformer: the gate, then memory and time at every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from nestlearn.evaluation.benchmarks.equality import check_equality
from nestlearn.evaluation.benchmarks.machine import Machine, measure_machine
from nestlearn.evaluation.benchmarks.peak_memory import peak_memory
from nestlearn.evaluation.benchmarks.settings import REFERENCE, CommonSettings, ModelBenchmark
from nestlearn.evaluation.benchmarks.turns import Notice, Progress, take_turns, timing_row
from nestlearn.evaluation.benchmarks.work import build_model, make_work
from nestlearn.models import HopeLM
from nestlearn.training.distributed import Processes
from nestlearn.training.process import prepare_process
from nestlearn.training.record import describe_environment

Report = dict[str, Any]
Save = Callable[[Report], None]


def quiet(*_: object) -> None:
    """Says and saves nothing."""


def benchmark_models(settings: ModelBenchmark, *, notice: Notice = quiet, save: Save = quiet) -> Report:
    """Times all models in turns in this process, and measures their memory in others.

    Args:
        settings: what, at which sizes and how often.
        notice: called with a line about what is being done.
        save: called with the report after each size, so that a long run that is cut off leaves what it has.

    Returns:
        As plain JSON types: "benchmark", "complete", "settings", "environment" (commit, versions, device, threads),
        "machine" (measured rates), and "rows", one for each batch, length and model: model, batch, tokens (T),
        tokens_per_second, microseconds_per_token (over all rows of the batch), parameters, equality (largest relative
        difference of the gate), all of `timing_row`, for "decode" the size of the state and how it was made, and with
        memory peak_megabytes, growth_megabytes and memory_ratio (growth over the reference's).

    Raises:
        NotEqual: if a model is wrong; nothing was timed then.
    """
    device = settings.torch_device
    equality = {}
    for name, config in settings.configs.items():
        notice(f"{name}: is it equal to reading token by token?")
        equality[name] = check_equality(config, settings.kind, seed=settings.seed, device=device)
    with measuring(settings, settings.kind, notice) as (report, machine):
        models = {name: build_model(config, settings) for name, config in settings.configs.items()}
        points = list(product(settings.batches, settings.lengths))
        costs = {point: _costs(settings, models, machine, *point) for point in points}
        steps = settings.alternations + 1 + (1 if settings.memory else 0)
        progress = Progress(steps * sum(sum(cost.values()) for cost in costs.values()), notice)
        for batch, tokens in points:
            rows = _point(settings, models, batch, tokens, machine, progress, costs[batch, tokens])
            report["rows"] += [{**row, "equality": equality[row["model"]]} for row in rows]
            save(report)
        report["complete"] = True
        save(report)
    return report


@contextmanager
def measuring(settings: CommonSettings, kind: str, notice: Notice) -> Iterator[tuple[Report, Machine]]:
    """The report to fill and the machine's rates, with the threads that the settings name.

    Freed memory stays with the process from here on, as in training: see `prepare_process`.
    """
    before = torch.get_num_threads()
    prepare_process(settings.threads)
    try:
        notice("what the machine can do")
        device = settings.torch_device
        machine = measure_machine(device)
        report: Report = {
            "benchmark": kind,
            "complete": False,
            "settings": settings.to_dict(),
            "environment": describe_environment(Processes(device=device)),
            "machine": machine.to_dict(),
            "rows": [],
        }
        yield report, machine
    finally:
        torch.set_num_threads(before)


def _point(
    settings: ModelBenchmark,
    models: dict[str, HopeLM],
    batch: int,
    tokens: int,
    machine: Machine,
    progress: Progress,
    costs: dict[str, float],
) -> list[Report]:
    what = f"T = {tokens:,}, batch {batch}"
    rows: dict[str, Report] = {name: {"model": name, "batch": batch, "tokens": tokens} for name in models}
    if settings.memory:  # first: while this process holds next to nothing itself
        for name, row in rows.items():
            progress.say(f"{what}: memory of {name}")
            row |= peak_memory(settings, name, batch, tokens)
            progress.advance(costs[name])
        reference = rows[REFERENCE]["growth_megabytes"]
        for row in rows.values():
            own = row["growth_megabytes"]
            row["memory_ratio"] = own / reference if own is not None and reference else None
    repeats = settings.turn_tokens if settings.kind == "decode" else 1
    works = {name: make_work(settings.kind, model, batch, tokens, room=repeats) for name, model in models.items()}
    seconds = take_turns(
        works,
        alternations=settings.alternations,
        repeats=repeats,
        device=settings.torch_device,
        what=what,
        progress=progress,
        costs=costs,
    )
    for name, row in rows.items():
        row |= timing_row(works[name], seconds[name], seconds[REFERENCE], machine)
        row["tokens_per_second"] = works[name].tokens * 1000 / row["milliseconds"]
        row["microseconds_per_token"] = 1e6 / row["tokens_per_second"]
        row["parameters"] = models[name].num_parameters()
        row |= works[name].facts
    return list(rows.values())


def _costs(
    settings: ModelBenchmark, models: dict[str, HopeLM], machine: Machine, batch: int, tokens: int
) -> dict[str, float]:
    """About how long a turn takes, in units that only compare: each model's operations at the machine's rate."""
    costs = {}
    for name, model in models.items():
        if settings.kind == "decode":
            flops = settings.turn_tokens * batch * model.decode_flops(tokens)
        else:
            flops = batch * tokens * model.flops_per_token(tokens)
        costs[name] = flops / machine.product_flops
    return costs
