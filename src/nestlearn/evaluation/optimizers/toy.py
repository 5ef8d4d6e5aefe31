"""The toy of Eq. 53 (Fig. 4): a curved valley, in which momentum overshoots.

    python -m nestlearn.evaluation.optimizers.toy --out results/delta_momentum_toy

psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2, from (-3.5, 2). The paper gives neither k, a, omega nor any step
size; the constants here make a narrow valley with bends, and every optimizer takes its best settings of a grid.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.evaluation.report import markdown_table, mean_and_error, write_report
from nestlearn.io import atomic_path
from nestlearn.optim import DeepMomentum, DeltaMomentum, HigherOrderMomentum

CONSTANTS = {"k": 5.0, "a": 1.0, "omega": 2.0}
START = (-3.5, 2.0)
STEPS, CLOSE = 1500, 1e-3
EVERY = 2  # steps between two points of a path that is kept
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.99)

Build = Callable[..., torch.optim.Optimizer]


def _delta_momentum(params: Any, *, lr: float, rate: float, **own: Any) -> DeltaMomentum:
    """A rate of the memory scales what it says: divided by it, lr is comparable with the others'."""
    return DeltaMomentum(params, lr / rate, rate=rate, **own)


# How each is built, and the settings of its grid.
OPTIMIZERS: Mapping[str, tuple[Build, Mapping[str, tuple[float, ...]]]] = {
    "gradient descent": (torch.optim.SGD, {"lr": RATES}),
    "momentum": (torch.optim.SGD, {"lr": RATES, "momentum": MOMENTA}),
    "delta momentum": (
        lambda p, **own: _delta_momentum(p, form="implicit", **own),
        {"lr": RATES, "momentum": (*MOMENTA, 1.0), "rate": (1e-5, 1e-4, 1e-3, 1e-2)},
    ),
    "delta momentum, explicit": (
        lambda p, **own: _delta_momentum(p, form="explicit", **own),
        {"lr": RATES, "momentum": (*MOMENTA, 1.0), "rate": (1e-6, 1e-5, 1e-4)},
    ),
    "higher-order momentum": (HigherOrderMomentum, {"lr": RATES, "momentum": MOMENTA}),
    "deep momentum": (lambda p, **own: DeepMomentum(p, hidden=8, **own), {"lr": RATES, "rate": (0.1, 0.5)}),
    "adam": (
        lambda p, lr, momentum: torch.optim.Adam(p, lr, betas=(momentum, 0.99)),
        {"lr": (*RATES, 0.3), "momentum": MOMENTA},
    ),
}


def psi(point: Tensor) -> Tensor:
    """Eq. 53 at (r, theta)."""
    r, theta = point
    k, a, omega = (CONSTANTS[name] for name in ("k", "a", "omega"))
    return r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2


def descend(
    build: Build, start: tuple[float, float], steps: int, **settings: float
) -> list[tuple[float, float, float]]:
    """(r, theta, psi) before each step and after the last; cut off where it is not finite."""
    point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = build([point], **settings)
    path = []
    for _ in range(steps + 1):
        value = psi(point)
        if not math.isfinite(float(value.detach())) or float(value.detach()) > 1e12:
            break
        path.append((*point.detach().tolist(), float(value.detach())))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return path


def steps_needed(path: list[tuple[float, float, float]], steps: int) -> float:
    """Steps after which psi stays below `CLOSE`; infinite if it does not."""
    if len(path) <= steps or path[-1][2] > CLOSE:
        return math.inf
    return next(i for i in range(len(path), 0, -1) if path[i - 1][2] > CLOSE)


def grid(settings: Mapping[str, tuple[float, ...]]) -> Iterator[dict[str, float]]:
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def starts(seeds: int) -> list[tuple[float, float]]:
    """The paper's, and as many around it: noise of half a unit."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(seeds, 2, generator=generator, dtype=torch.float64)
    return [START, *((START[0] + r, START[1] + theta) for r, theta in noise.tolist())]


def compare(*, steps: int, seeds: int, names: tuple[str, ...] = tuple(OPTIMIZERS)) -> dict[str, Any]:
    """For each optimizer the settings with the fewest steps from the paper's start, and what they need elsewhere."""
    found: dict[str, Any] = {}
    for name in names:
        build, settings = OPTIMIZERS[name]
        tried = []
        for own in grid(settings):
            path = descend(build, START, steps, **own)
            # Where none gets there, the one that ends lowest.
            tried.append((steps_needed(path, steps), path[-1][2] if len(path) > steps else math.inf, own))
        fewest, _, best = min(tried, key=lambda item: item[:2])
        paths = [descend(build, start, steps, **best) for start in starts(seeds)]
        counts = [steps_needed(path, steps) for path in paths]
        found[name] = {
            "settings": best,
            "tried": len(tried),
            "converged": sum(math.isfinite(count) for count, _, _ in tried),
            "steps": None if math.isinf(fewest) else fewest,
            "elsewhere": [None if math.isinf(count) else count for count in counts[1:]],
            "path": [list(point) for point in paths[0][::EVERY]],
        }
    return found


def table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, own in found.items():
        met = [count for count in own["elsewhere"] if count is not None]
        mean, error = mean_and_error(met) if met else (math.nan, None)
        text = f"{mean:.0f}" + ("" if error is None else f" ± {error:.0f}") if met else None
        settings = ", ".join(f"{key} {value:g}" for key, value in own["settings"].items())
        rows.append([name, settings, f"{own['converged']} of {own['tried']}", own["steps"], text,
                     f"{len(met)} of {len(own['elsewhere'])}"])  # fmt: skip
    header = [
        "optimizer",
        "best settings",
        "settings that converge",
        "steps",
        "steps from other starts",
        "of which converge",
    ]
    return markdown_table(header, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The valley with the paths, and psi over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    valley, curves = figure.subplots(1, 2)
    r, theta = torch.meshgrid(torch.linspace(-4.5, 2, 200), torch.linspace(-5, 4, 200), indexing="xy")
    valley.contour(r, theta, psi(torch.stack([r, theta])).log1p(), levels=18, colors="lightgrey", linewidths=0.6)
    for i, (name, own) in enumerate(found.items()):
        points = own["path"]
        valley.plot([p[0] for p in points], [p[1] for p in points], color=f"C{i}", linewidth=1.0)
        steps = [EVERY * j + 1 for j in range(len(points))]
        curves.plot(steps, [max(p[2], 1e-8) for p in points], color=f"C{i}", linewidth=1.2, label=name)
    curves.axhline(CLOSE, color="grey", linestyle=":", linewidth=0.8)
    valley.set_xlim(-4.5, 2)
    valley.set_ylim(-5, 4)
    valley.set_xlabel("r")
    valley.set_ylabel("theta")
    curves.set_xscale("log")
    curves.set_yscale("log")
    curves.set_xlabel("steps, from 1")
    curves.set_ylabel("psi")
    curves.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS)
    add("--seeds", type=int, default=8, help="other starts beside the paper's")
    add("--out", type=Path, default=Path("results/delta_momentum_toy"), help="path of the results, without suffix")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = compare(steps=given.steps, seeds=given.seeds)
    figure = given.out.with_name(given.out.name + ".png")
    plot(found, figure)
    constants = ", ".join(f"{name} = {value:g}" for name, value in CONSTANTS.items())
    text = (
        f"psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2 with {constants}, which the paper does not give, "
        f"from {START}. Steps until psi stays below {CLOSE:g}, at most {given.steps}, with the best settings of a "
        f"grid; then with the same from {given.seeds} other starts around (noise of half a unit), ± the standard "
        f"error. The delta momenta's learning rate is given times the memory's rate, which makes it comparable with "
        f"the others'.\n\n{table(found)}\n\n![paths]({figure.name})"
    )
    print(write_report(given.out, "Delta momentum in a curved valley", text, {"optimizers": found}))


if __name__ == "__main__":
    main()
