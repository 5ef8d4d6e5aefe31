"""One step of each optimizer on the same parameters and gradients, as a ratio to AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evaluation.benchmarks.equality import NotEqual, small_config
from nestlearn.evaluation.benchmarks.machine import Machine, Needs
from nestlearn.evaluation.benchmarks.run import Report, Save, measuring, quiet
from nestlearn.evaluation.benchmarks.settings import CommonSettings, at_least_one, model_config, several
from nestlearn.evaluation.benchmarks.turns import Notice, Progress, take_turns, timing_row
from nestlearn.evaluation.benchmarks.work import FLOAT, Work
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import LevelOptimizer

Build = Callable[[nn.Module], torch.optim.Optimizer]

BASELINE = "adamw"
LR = 1e-4  # keeps weights that take thousands of steps by the same gradient finite

# What can be timed: add an optimizer here, in one line.
OPTIMIZERS: dict[str, Build] = {
    BASELINE: lambda model: torch.optim.AdamW(model.parameters(), lr=LR),
    "adamw_fused": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
    "level": lambda model: LevelOptimizer.for_model(model, lr=LR),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerBenchmark(CommonSettings):
    """Optimizer steps on the parameters of a model, gradients given.

    Attributes:
        optimizers: beside `BASELINE`, names in `OPTIMIZERS`.
        model: whose parameters, as in `ModelBenchmark.models`.
        dims: D, widths of the model, one size of the benchmark each.
        turn_steps: steps in a turn; many, since slow levels and slow parts of optimizers work at some steps only.

    Raises:
        ValueError: for an unknown optimizer, mixer or setting, or a number out of range.
    """

    optimizers: tuple[str, ...] = tuple(name for name in OPTIMIZERS if name != BASELINE)
    model: str = "self_modifying_titans"
    dims: tuple[int, ...] = (256,)
    turn_steps: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [name for name in OPTIMIZERS if name != BASELINE]
        for name in self.optimizers:
            if name not in others:
                raise ValueError(f"optimizers: expected names among {', '.join(others)}; got {name!r}")
        if len(set(self.optimizers)) < len(self.optimizers) or not self.optimizers:
            raise ValueError(f"optimizers: expected one or more different names, got {', '.join(self.optimizers)}")
        at_least_one("turn_steps", self.turn_steps)
        several("dims", self.dims, least=1)
        for dim in self.dims:
            self.config(dim)

    def config(self, dim: int) -> HopeConfig:
        """The model of a width."""
        return model_config(self.model, dim=dim, depth=self.depth, heads=self.heads)


def check_optimizer(name: str, config: HopeConfig, *, steps: int = 10, seed: int = 0) -> None:
    """Refuses an optimizer that does not go on from its saved state as it would have, bit for bit.

    Args:
        name: in `OPTIMIZERS`.
        config: of a model, made small.
        steps: in all; the state is saved and loaded at every one of them.
        seed: of weights and gradients.

    Raises:
        NotEqual: if the parameters differ, are not finite, or one never moved.
    """
    straight, resumed = (_small(config, seed) for _ in range(2))
    start = [p.detach().clone() for p in straight.parameters()]
    optimizer, other = OPTIMIZERS[name](straight), OPTIMIZERS[name](resumed)
    for step in range(steps):
        for model, own in ((straight, optimizer), (resumed, other)):
            _set_gradients(model, seed + step)
            own.step()
        saved = other.state_dict()
        other = OPTIMIZERS[name](resumed)
        other.load_state_dict(saved)
    for (parameter, a), b, before in zip(straight.named_parameters(), resumed.parameters(), start, strict=True):
        if not torch.equal(a, b) or not bool(a.isfinite().all()) or torch.equal(a, before):
            raise NotEqual(
                f"{name}: after {steps} steps {parameter} is not finite, did not move, or depends on whether the "
                f"optimizer's state was saved and loaded in between. No speed is given for an optimizer that is wrong; "
                f"the tests in tests/optim say where"
            )


def benchmark_optimizers(settings: OptimizerBenchmark, *, notice: Notice = quiet, save: Save = quiet) -> Report:
    """Times a step of all optimizers in turns.

    Args:
        settings: which, on what, and how often.
        notice: called with a line about what is being done.
        save: called with the report after each size.

    Returns:
        As `benchmark_models`; a row for each width and optimizer: optimizer, dim, parameters, nanoseconds (per
        parameter), state_megabytes (gathered gradients included), all of `nestlearn.evaluation.benchmarks.turns.
        timing_row`. The floor is AdamW's for all: weight, gradient and two moments read, three of them written.

    Raises:
        NotEqual: if an optimizer is wrong; nothing was timed then.
    """
    names = (BASELINE, *settings.optimizers)
    for name in names:
        notice(f"{name}: does it go on from a saved state bit for bit?")
        check_optimizer(name, settings.config(settings.dims[0]), seed=settings.seed)
    with measuring(settings, "optimizer", notice) as (report, machine):
        total = len(names) * (settings.alternations + 1) * sum(dim * dim for dim in settings.dims)
        progress = Progress(total, notice)
        for dim in settings.dims:
            report["rows"] += _point(settings, names, dim, machine, progress)
            save(report)
        report["complete"] = True
        save(report)
    return report


def _point(
    settings: OptimizerBenchmark, names: tuple[str, ...], dim: int, machine: Machine, progress: Progress
) -> list[Report]:
    works, optimizers = {}, {}
    for name in names:
        torch.manual_seed(settings.seed)
        model = HopeLM(settings.config(dim)).to(settings.torch_device)
        _set_gradients(model, settings.seed)
        optimizers[name] = OPTIMIZERS[name](model)
        needs = Needs(linear_flops=0.0, mixer_flops=0.0, bytes=7 * FLOAT * model.num_parameters())
        works[name] = Work(step=optimizers[name].step, tokens=0, needs=needs)
    parameters = model.num_parameters()
    seconds = take_turns(
        works,
        alternations=settings.alternations,
        repeats=settings.turn_steps,
        device=settings.torch_device,
        what=f"{parameters:,} parameters",
        progress=progress,
        costs=dict.fromkeys(names, dim * dim),
    )
    rows = []
    for name, work in works.items():
        row: Report = {"optimizer": name, "dim": dim, "parameters": parameters}
        row |= timing_row(work, seconds[name], seconds[BASELINE], machine)
        row["nanoseconds"] = 1e6 * row["milliseconds"] / parameters
        work.step()  # into the next period, where levels hold gathered gradients
        held = sum(x.numel() * x.element_size() for x in _tensors(optimizers[name].state_dict()))
        rows.append({**row, "state_megabytes": held / 1e6})
    return rows


def _small(config: HopeConfig, seed: int) -> HopeLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HopeLM(small_config(config))


def _set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
