"""One step of each optimizer on the same parameters and gradients, as a ratio to AdamW.

Two costs have a floor of their own and are compared with it in the same turns: M3's step with one bare Newton-Schulz
pass over the same matrices and a step of AdamW, and a training step under delta gradient descent with one under SGD.
"""

from __future__ import annotations

import statistics
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
from nestlearn.evaluation.benchmarks.work import FLOAT, Work, training_work
from nestlearn.functional import newton_schulz
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import M3, DeltaGradientDescent, LevelOptimizer

Build = Callable[[nn.Module], torch.optim.Optimizer]

BASELINE = "adamw"
LR = 1e-4  # keeps weights that take thousands of steps by the same gradient finite

# What can be timed: add an optimizer here, in one line.
OPTIMIZERS: dict[str, Build] = {
    BASELINE: lambda model: torch.optim.AdamW(model.parameters(), lr=LR),
    "adamw_fused": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
    "level": lambda model: LevelOptimizer.for_model(model, lr=LR),
    "m3": lambda model: M3.for_model(model, lr=LR, notice=quiet),
}
# Beside M3: what its step cannot do without.
BARE = "newton_schulz"
# What needs the inputs of the layers is timed in a training step, beside the first of these.
TRAININGS: dict[str, Build] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=LR),
    "dgd": lambda model: DeltaGradientDescent(model, lr=LR, others="sgd"),
    "dgd_delta": lambda model: DeltaGradientDescent(model, lr=LR, others="sgd", rule="delta"),
}


@dataclass(frozen=True, kw_only=True)
class OptimizerBenchmark(CommonSettings):
    """Optimizer steps on the parameters of a model, gradients given.

    Attributes:
        optimizers: beside `BASELINE`, names in `OPTIMIZERS`.
        model: whose parameters, as in `ModelBenchmark.models`.
        dims: D, widths of the model, one size of the benchmark each.
        turn_steps: steps in a turn; many, since slow levels and slow parts of optimizers work at some steps only.
        training_batch, training_tokens: B and T of the training steps under `TRAININGS`; B of 0 leaves them out.
        training_steps: of them in a turn.

    Raises:
        ValueError: for an unknown optimizer, mixer or setting, or a number out of range.
    """

    optimizers: tuple[str, ...] = tuple(name for name in OPTIMIZERS if name != BASELINE)
    model: str = "self_modifying_titans"
    dims: tuple[int, ...] = (256,)
    turn_steps: int = 16
    training_batch: int = 4
    training_tokens: int = 512
    training_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [name for name in OPTIMIZERS if name != BASELINE]
        for name in self.optimizers:
            if name not in others:
                raise ValueError(f"optimizers: expected names among {', '.join(others)}; got {name!r}")
        if len(set(self.optimizers)) < len(self.optimizers) or not self.optimizers:
            raise ValueError(f"optimizers: expected one or more different names, got {', '.join(self.optimizers)}")
        for name in ("turn_steps", "training_steps"):
            at_least_one(name, getattr(self, name))
        if self.training_batch:
            several("training_tokens", (self.training_tokens,), least=2)
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
        parameter), state_megabytes (gathered gradients included), state_floats (per parameter, the most that one has),
        all of `nestlearn.evaluation.benchmarks.turns.timing_row`. The floor is AdamW's for all: weight, gradient and
        two moments read, three of them written. "m3" has bare_ratio, bare_ratio_min and bare_ratio_max too, its time
        over that of `BARE`. Rows with training true are whole training steps, as ratios to SGD's.

    Raises:
        NotEqual: if an optimizer is wrong; nothing was timed then.
    """
    names = (BASELINE, *settings.optimizers)
    for name in names:
        notice(f"{name}: does it go on from a saved state bit for bit?")
        check_optimizer(name, settings.config(settings.dims[0]), seed=settings.seed)
    if settings.training_batch:
        notice("dgd: is its step the least of what it minimises?")
        check_delta_gradient_descent(settings.seed)
    with measuring(settings, "optimizer", notice) as (report, machine):
        kinds = len(names) + ("m3" in names) + (len(TRAININGS) if settings.training_batch else 0)
        progress = Progress(kinds * (settings.alternations + 1) * sum(dim * dim for dim in settings.dims), notice)
        for dim in settings.dims:
            report["rows"] += _point(settings, names, dim, machine, progress)
            if settings.training_batch:
                report["rows"] += _training_point(settings, dim, machine, progress)
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
    if "m3" in names:
        works[BARE] = Work(step=_bare_step(settings, dim), tokens=0, needs=needs)
    seconds = take_turns(
        works,
        alternations=settings.alternations,
        repeats=settings.turn_steps,
        device=settings.torch_device,
        what=f"{parameters:,} parameters",
        progress=progress,
        costs=dict.fromkeys(works, dim * dim),
    )
    rows = []
    for name, work in works.items():
        if name == BARE:
            continue
        row: Report = {"optimizer": name, "dim": dim, "parameters": parameters}
        row |= timing_row(work, seconds[name], seconds[BASELINE], machine)
        row["nanoseconds"] = 1e6 * row["milliseconds"] / parameters
        work.step()  # into the next period, where levels hold gathered gradients
        held = sum(x.numel() * x.element_size() for x in _tensors(optimizers[name].state_dict()))
        row |= {"state_megabytes": held / 1e6, "state_floats": _state_floats(optimizers[name])}
        if name == "m3":
            ratios = [own / bare for own, bare in zip(seconds[name], seconds[BARE], strict=True)]
            row |= {"bare_ratio": statistics.median(ratios)}
            row |= {"bare_ratio_min": min(ratios), "bare_ratio_max": max(ratios)}
        rows.append(row)
    return rows


def _bare_step(settings: OptimizerBenchmark, dim: int) -> Callable[[], None]:
    """A step of AdamW, and Newton-Schulz of the gradients of all matrices that M3 would move."""
    torch.manual_seed(settings.seed)
    model = HopeLM(settings.config(dim)).to(settings.torch_device)
    _set_gradients(model, settings.seed)
    groups = M3.for_model(model, notice=quiet).param_groups
    matrices = [p.grad for group in groups if group["rule"] == "m3" for p in group["params"]]
    adamw = torch.optim.AdamW(model.parameters(), lr=LR)

    @torch.no_grad()
    def step() -> None:
        adamw.step()
        for matrix in matrices:
            newton_schulz(matrix)

    return step


def _training_point(settings: OptimizerBenchmark, dim: int, machine: Machine, progress: Progress) -> list[Report]:
    works, optimizers = {}, {}
    for name, build in TRAININGS.items():
        torch.manual_seed(settings.seed)
        model = HopeLM(settings.config(dim)).to(settings.torch_device)
        optimizers[name] = build(model)
        works[name] = training_work(model, settings.training_batch, settings.training_tokens, optimizers[name])
    seconds = take_turns(
        works,
        alternations=settings.alternations,
        repeats=settings.training_steps,
        device=settings.torch_device,
        what=f"training steps of {settings.training_batch} x {settings.training_tokens} tokens",
        progress=progress,
        costs=dict.fromkeys(works, dim * dim),
    )
    rows = []
    for name, work in works.items():
        row: Report = {"optimizer": name, "dim": dim, "parameters": model.num_parameters(), "training": True}
        row |= timing_row(work, seconds[name], next(iter(seconds.values())), machine)
        row["nanoseconds"] = 1e6 * row["milliseconds"] / model.num_parameters()
        held = sum(x.numel() * x.element_size() for x in _tensors(optimizers[name].state_dict()))
        rows.append({**row, "state_megabytes": held / 1e6, "state_floats": _state_floats(optimizers[name])})
    return rows


def _state_floats(optimizer: torch.optim.Optimizer) -> float:
    """Numbers that the state has for a number of a parameter, where it has most."""
    found = [
        sum(x.numel() for name, x in state.items() if torch.is_tensor(x) and name != "step") / parameter.numel()
        for parameter, state in optimizer.state.items()
    ]
    return max(found, default=0.0)


def check_delta_gradient_descent(seed: int = 0) -> None:
    """Refuses a delta gradient descent whose step does not minimise Eq. 56.

    Raises:
        NotEqual: if the slope of Eq. 56 is not zero at the new weights.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(20, width, generator=generator, dtype=torch.float64) for width in (6, 4))
    layer = nn.Linear(6, 4, bias=False).double()
    before, lr = layer.weight.detach().clone(), 0.5
    optimizer = DeltaGradientDescent(layer, lr=lr)
    u = y - layer(x).detach()  # minus the gradient of 1/2 |W x - y|^2
    (0.5 * (layer(x) - y).square().sum(-1)).mean().backward()
    optimizer.step()
    slope = (layer(x) - u).mT @ x / len(x) + (layer.weight - before) / lr
    if not float(slope.detach().abs().max()) < 1e-10:
        raise NotEqual(
            "dgd: its step is not the argmin of Eq. 56. No speed is given for an optimizer that is wrong; the tests in "
            "tests/optim say where"
        )


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
