"""`nestlearn bench`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.cli.benchmark_tables import benchmark_lines
from nestlearn.cli.shared import print_json, say, teaching
from nestlearn.evaluation.benchmarks import MIXERS, ModelBenchmark, benchmark_models
from nestlearn.evaluation.benchmarks.optimizers import (
    BASELINE,
    OPTIMIZERS,
    OptimizerBenchmark,
    benchmark_optimizers,
)
from nestlearn.evaluation.benchmarks.plots import plot_benchmark
from nestlearn.evaluation.benchmarks.settings import DEFAULT_MODELS, Kind, split_models
from nestlearn.io import atomic_write_json

Mixers = Annotated[
    str,
    typer.Option(
        help="Models beside the Transformer, separated by commas; settings of HopeConfig stand behind colons, as in "
        f"delta_net,titans:read=chunk. Mixers: {', '.join(MIXERS)}.",
        show_default="Hope without and with momentum",
    ),
]
Lengths = Annotated[str, typer.Option(help="T: tokens in a sequence; several separated by commas.")]
Contexts = Annotated[str, typer.Option(help="T: tokens that were read before; several separated by commas.")]
Batches = Annotated[str, typer.Option(help="Sequences at a time; several separated by commas.")]
Dim = Annotated[int, typer.Option(help="Model width.")]
Depth = Annotated[int, typer.Option(help="Blocks.")]
Heads = Annotated[int, typer.Option(help="Heads.")]
Alternations = Annotated[int, typer.Option(help="How often all take their turn; results are medians over the turns.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Of weights and tokens.")]
PeakMemory = Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too, in fresh processes.")]
Out = Annotated[
    Path | None, typer.Option(help="A .json file for the results; a .png of cost against size goes beside it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

MODELS = ",".join(DEFAULT_MODELS)


@teaching
def bench_train(
    mixers: Mixers = MODELS,
    lengths: Lengths = "512,2048",
    batch: Batches = "4",
    dim: Dim = 256,
    depth: Depth = 4,
    heads: Heads = 4,
    alternations: Alternations = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    seed: Seed = 0,
    memory: PeakMemory = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step: forward, backward, clipping and optimizer.

    Every number is compared with a plain Transformer of the same width and depth, in fp32 and in the same process,
    where all models take turns. A model that does not read a whole sequence as it does its tokens one by one,
    gradients included, is refused, and no speed is printed.
    """
    _bench_models("train", mixers, lengths, batch, out, as_json, dim=dim, depth=depth, heads=heads,
                  alternations=alternations, threads=threads, device=device, seed=seed, memory=memory)  # fmt: skip


@teaching
def bench_prefill(
    mixers: Mixers = MODELS,
    lengths: Lengths = "512,2048",
    batch: Batches = "1",
    dim: Dim = 256,
    depth: Depth = 4,
    heads: Heads = 4,
    alternations: Alternations = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    seed: Seed = 0,
    memory: PeakMemory = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time the reading of a whole prompt to a state, without gradients: what comes before the first generated token.

    Compared with a plain Transformer as in 'nestlearn bench train', and refused if a prompt read whole and in pieces
    differ.
    """
    _bench_models("prefill", mixers, lengths, batch, out, as_json, dim=dim, depth=depth, heads=heads,
                  alternations=alternations, threads=threads, device=device, seed=seed, memory=memory)  # fmt: skip


@teaching
def bench_decode(
    mixers: Mixers = MODELS,
    lengths: Contexts = "100,2048,8192",
    batch: Batches = "1",
    turn_tokens: Annotated[int, typer.Option(help="Tokens that each model decodes in its turn.")] = 64,
    dim: Dim = 256,
    depth: Depth = 4,
    heads: Heads = 4,
    alternations: Alternations = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    seed: Seed = 0,
    memory: PeakMemory = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time the decoding of one token after a context of T tokens: what each generated token costs.

    A memory's state has one size; a Transformer's cache grows with the context. Compared with a plain Transformer as
    in 'nestlearn bench train', and refused if decoding and reading differ.
    """
    _bench_models("decode", mixers, lengths, batch, out, as_json, dim=dim, depth=depth, heads=heads,
                  turn_tokens=turn_tokens, alternations=alternations, threads=threads, device=device, seed=seed,
                  memory=memory)  # fmt: skip


@teaching
def bench_optimizer(
    optimizers: Annotated[
        str, typer.Option(help=f"Optimizers beside {BASELINE}, torch.optim.AdamW, separated by commas.")
    ] = ",".join(name for name in OPTIMIZERS if name != BASELINE),
    mixer: Annotated[
        str, typer.Option(help="The model whose parameters are moved, as in 'nestlearn bench train'.")
    ] = DEFAULT_MODELS[0],
    dims: Annotated[str, typer.Option(help="Model widths; several separated by commas.")] = "256",
    depth: Depth = 4,
    heads: Heads = 4,
    turn_steps: Annotated[int, typer.Option(help="Steps that each optimizer makes in its turn.")] = 16,
    training_batch: Annotated[
        int, typer.Option(help="Sequences of a training step under SGD and delta gradient descent; 0 leaves it out.")
    ] = 4,
    training_tokens: Annotated[int, typer.Option(help="Tokens of each of them.")] = 512,
    alternations: Alternations = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time a step of each optimizer on the same parameters and gradients, compared with AdamW.

    M3 is also compared with one bare Newton-Schulz pass over its matrices and a step of AdamW, and a training step
    under delta gradient descent with one under SGD. An optimizer that does not go on from its saved state bit for bit
    is refused.
    """
    settings = OptimizerBenchmark(
        optimizers=tuple(name.strip() for name in optimizers.split(",")),
        model=mixer,
        dims=_numbers("--dims", dims),
        depth=depth,
        heads=heads,
        turn_steps=turn_steps,
        training_batch=training_batch,
        training_tokens=training_tokens,
        alternations=alternations,
        threads=threads,
        device=device,
        seed=seed,
    )
    _bench(partial(benchmark_optimizers, settings), out, as_json)


def _bench_models(
    kind: Kind, mixers: str, lengths: str, batch: str, out: Path | None, as_json: bool, **settings: Any
) -> None:
    benchmark = ModelBenchmark(
        kind=kind,
        models=split_models(mixers),
        lengths=_numbers("--lengths", lengths),
        batches=_numbers("--batch", batch),
        **settings,
    )
    _bench(partial(benchmark_models, benchmark), out, as_json)


def _bench(run: Callable[..., dict[str, Any]], out: Path | None, as_json: bool) -> None:
    if out is not None:
        _check_out(out)

    def save(report: dict[str, Any]) -> None:
        if out is not None:
            atomic_write_json(out, report)
            plot_benchmark(report, out.with_suffix(".png"))

    report = run(notice=say, save=save)
    if as_json:
        print_json(report)
        return
    print("\n".join(benchmark_lines(report)))
    if out is not None:
        print(f"\nwritten to {out}\n{'':11}{out.with_suffix('.png')}")


def _check_out(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix != ".json":
        raise ValueError(f"--out: expected a name that ends in .json, got {str(out)!r}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent} to write {out.name} into; make it first")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        raise ValueError(f"{option}: expected whole numbers separated by commas, got {text!r}") from None
