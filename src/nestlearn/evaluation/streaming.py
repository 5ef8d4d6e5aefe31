"""A million tokens through one state: does it stay finite, small and of one size?

    python -m nestlearn.evaluation.streaming --tokens 1000000 --out results/streaming

Random bytes, real text and one byte repeated run side by side, as three rows of a batch, through a small Hope: as
initialised, with noise on all parameters, and as trained if checkpoints are given; for every inner rule and several
write gates. Recorded are whether all logits and states are finite, the largest entry and Frobenius norm that a memory
ever has, the norm of every written error against its bound (decision 5 of docs/decisions.md), and the bytes of the
state.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nestlearn.memory.mlp as mlp
from nestlearn.evaluation.jobs import Job, Record, provenance, run_jobs
from nestlearn.evaluation.language_modeling import parse_settings
from nestlearn.evaluation.report import described, finite_or_none, markdown_table, write_report
from nestlearn.functional.surprise import MLPSurprise
from nestlearn.layers.chunked_memory import ChunkedMemoryLayer, base_weights
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.memory.mlp import MLPWeights
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.checkpoint import load_model
from nestlearn.training.data import ByteTokenizer, read_documents

STREAMS = ("random", "text", "repeated")
# A memory whose largest entry passes this is not under control, although it may be finite.
LARGEST_MEMORY = 100.0


class WriteProbe:
    """Sees every error that the memories write, as it is written, while `watching`.

    Attributes:
        largest: largest Euclidean norm so far of a written error or of its image at the inner map; NaN counts as
            infinite.
        written: how many there were.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.written = 0

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[WriteProbe]:
        """Looks over the shoulder of the one function from which all two-layer memories take what they write.

        Meanwhile the model walks in PyTorch operations: compiled code shows nobody what it writes.
        """
        original = mlp.mlp_error_surprise
        layers = [module for module in model.modules() if isinstance(module, ChunkedMemoryLayer)]
        backends = [layer.backend for layer in layers]

        def watched(*args: Any, **kwargs: Any) -> MLPSurprise:
            surprise = original(*args, **kwargs)
            for value in (surprise.outer.value, surprise.inner.value):
                norms = value.detach().norm(dim=-1)
                self.largest = max(self.largest, _largest(norms))
                self.written += norms.numel()
            return surprise

        mlp.mlp_error_surprise = watched
        for layer in layers:
            layer.backend = "torch"
        try:
            yield self
        finally:
            mlp.mlp_error_surprise = original
            for layer, backend in zip(layers, backends, strict=True):
                layer.backend = backend


def stream_bytes(source: str, tokens: int) -> Tensor:
    """The three streams, (3, tokens) uint8, in the order of `STREAMS`.

    A text that is too short is read again from its beginning.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(256, (tokens,), generator=generator, dtype=torch.uint8)
    parts = [ByteTokenizer().encode(text) for text in read_documents(source, max_bytes=tokens, notice=_ignore)]
    text = torch.from_numpy(np.resize(np.concatenate(parts), tokens).astype(np.uint8))
    return torch.stack([random, text, torch.full((tokens,), ord("a"), dtype=torch.uint8)])


def memory_sizes(model: HopeLM, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The largest entry and the largest Frobenius norm of any memory matrix of each row, (B,) each.

    What counts is the whole memory, M_0 + D where the state holds only the change D.
    """
    entries, norms = [], []
    for index, block in enumerate(model.blocks):
        mixer = block.mixer
        prefix = f"blocks.{index}."
        if isinstance(mixer, ChunkedMemoryLayer):
            base = base_weights(mixer.memory, mixer.retain_to)
            weights: Sequence[Tensor] = MLPWeights(state[prefix + "inner"], state[prefix + "outer"]).add(base)
        else:
            weights = [state[prefix + "memory"]]
        for matrix in weights:
            entries.append(matrix.abs().flatten(1).amax(1))
            norms.append(matrix.norm(dim=(-2, -1)).flatten(1).amax(1))
    return torch.stack(entries).amax(0), torch.stack(norms).amax(0)


def perturb(model: HopeLM, size: float, seed: int = 0) -> None:
    """Adds Gaussian noise to every parameter, `size` times the root mean square of its entries, or times 1 over the
    root of its last axis where all are zero (the outer maps of memories)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.square().mean().sqrt().item() or parameter.shape[-1] ** -0.5
            parameter.add_(size * scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def stream(model: HopeLM, tokens: Tensor, *, call: int, notice: Any = None) -> Record:
    """Reads streams (B, T) in calls of `call` tokens with one carried state, and watches it.

    Args:
        model: what reads.
        tokens: (B, T) uint8 or int64; the rows are streams of their own.
        call: tokens a call.
        notice: called with (tokens read, largest entry) after each call.

    Returns:
        tokens (read of each stream; fewer than T if something was not finite), finite, entry and norm (the largest of
        each row at the end of any call), final (largest entries at the end), written (largest norm of a written error)
        and writes (how many), state_bytes (sizes that occurred), tokens_per_second.
    """
    model.eval()
    rows = tokens.shape[0]
    state = model.init_state(rows)
    probe = WriteProbe()
    sizes = {_bytes(state)}
    entry, norm = memory_sizes(model, state)
    final = entry
    finite = True
    read = 0
    started = time.perf_counter()
    with probe.watching(model):
        for start in range(0, tokens.shape[1], call):
            piece = tokens[:, start : start + call].long()
            logits, state = model(piece, state)
            read += piece.shape[1]
            sizes.add(_bytes(state))
            final, now = memory_sizes(model, state)
            entry, norm = torch.fmax(entry, final), torch.fmax(norm, now)
            finite = bool(logits.isfinite().all()) and all(
                bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()
            )
            if notice is not None:
                notice(read, float(final.max()))
            if not finite:
                break
    return {
        "tokens": read,
        "finite": finite,
        "entry": [finite_or_none(x) for x in entry.tolist()],
        "norm": [finite_or_none(x) for x in norm.tolist()],
        "final": [finite_or_none(x) for x in final.tolist()],
        "written": finite_or_none(probe.largest),
        "writes": probe.written,
        "state_bytes": sorted(sizes),
        "tokens_per_second": rows * read / (time.perf_counter() - started),
    }


def verdict(record: Record) -> list[str]:
    """What is wrong with a stream's record; an empty list if nothing is."""
    wrong = []
    if not record["finite"]:
        wrong.append(f"not finite within {record['tokens']:,} tokens")
    bound = record["bound"]
    if bound is not None and (record["written"] is None or record["written"] > bound * (1 + 1e-5)):
        wrong.append(f"wrote {record['written']}, beyond the bound {bound:g}")
    largest = [math.inf if value is None else value for value in record["entry"]]
    if max(largest) >= LARGEST_MEMORY:
        wrong.append(f"a memory reached {max(largest):.3g}")
    if not record["writes"]:
        wrong.append("no written error was seen, so none was checked")
    if len(record["state_bytes"]) != 1:
        wrong.append(f"the state's size changed: {record['state_bytes']}")
    return wrong


def run_stream(job: Job) -> Record:
    """One model, all three streams."""
    if job["kind"] == "trained":
        model, _ = load_model(job["checkpoint"])
    else:
        torch.manual_seed(job["seed"])
        model = HopeLM(HopeConfig.from_dict(job["config"]))
        if job["kind"] == "perturbed":
            perturb(model, job["noise"], job["seed"])
    last = time.monotonic()

    def notice(read: int, largest: float) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"  {job['name']}: {read:,} of {job['tokens']:,} tokens, largest entry {largest:.3g}", flush=True)

    record = stream(model, stream_bytes(job["text"], job["tokens"]), call=job["call"], notice=notice)
    record["bound"] = model.config.write_bound
    return {**record, "wrong": verdict(record)}


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Untrained and perturbed models of every rule and gate, and the checkpoints (their gates are where they began)."""
    common = {
        "text": arguments.text,
        "tokens": arguments.tokens,
        "call": arguments.call,
        "noise": arguments.noise,
        "seed": arguments.seed,
    }
    jobs: list[Job] = []
    for rule, gate, kind in itertools.product(arguments.rules, arguments.gates, arguments.kinds):
        settings = {"inner_rule": rule, "initial_gate": gate, **arguments.settings}
        config = HopeConfig(dim=arguments.dim, depth=arguments.depth, heads=arguments.heads, **settings)
        name = f"{kind}-{rule}-gate{gate:g}-{arguments.tokens}"
        jobs.append({"name": name, "kind": kind, "rule": rule, "gate": gate, "config": config.to_dict(), **common})
    for path in arguments.checkpoint:
        model = load_model(path)[0]
        config = model.config
        if not all(isinstance(block.mixer, SelfModifyingTitans) for block in model.blocks):
            raise ValueError(f"--checkpoint {path}: expected a Hope with self-modifying memories, got {config.mixer!r}")
        name = f"trained-{path.name}-{config.inner_rule}-gate{config.initial_gate:g}-{arguments.tokens}"
        found = {"kind": "trained", "rule": config.inner_rule, "gate": config.initial_gate, "checkpoint": str(path)}
        jobs.append({"name": name, **found, **common})
    return jobs


def table(records: Sequence[Record]) -> str:
    """Markdown: one line a model, the largest entry of a memory for each stream."""
    header = [
        "model",
        "rule",
        "gate",
        "tokens a stream",
        "finite",
        *(f"max entry, {name}" for name in STREAMS),
        "max norm",
        "largest error written",
        "bound",
        "state bytes",
        "verdict",
    ]
    rows = []
    for record in records:
        job = record["job"]
        rows.append(
            [
                job["kind"],
                job["rule"],
                job["gate"],
                f"{record['tokens']:,}",
                "yes" if record["finite"] else "NO",
                *record["entry"],
                max((value for value in record["norm"] if value is not None), default=None),
                record["written"],
                record["bound"],
                ", ".join(f"{size:,}" for size in record["state_bytes"]),
                "; ".join(record["wrong"]) or "ok",
            ]
        )
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    add = parser.add_argument
    add("--tokens", type=int, default=1_000_000, help="of each stream")
    add("--call", type=int, default=8192, help="tokens a call")
    add("--text", default="stdlib", help="file, folder, .jsonl(.gz), datasets name or stdlib")
    add("--rules", type=several(str), default=["dgd", "gd", "delta"])
    add("--gates", type=several(float), default=[0.1, 0.5, 0.95], help="initial write gates")
    add("--kinds", type=several(str), default=["untrained", "perturbed"], help="untrained, perturbed, or both")
    add("--noise", type=float, default=0.5, help="of the perturbed models, over the size of each parameter")
    add("--checkpoint", type=Path, action="append", default=[], help="a trained model too; may be given many times")
    add("--dim", type=int, default=32)
    add("--depth", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of HopeConfig")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="processes, one thread each")
    add("--out", type=Path, default=Path("results/streaming"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the records; by default runs/<name of --out>-<commit>")
    arguments = parser.parse_args()
    unknown = set(arguments.kinds) - {"untrained", "perturbed"}
    if unknown:
        parser.error(f"--kinds: expected untrained or perturbed, got {', '.join(sorted(unknown))}; for a trained model "
                     f"give --checkpoint")  # fmt: skip
    arguments.settings = parse_settings(arguments.set, ["all"])["all"]
    runs = arguments.runs or Path("runs") / f"{arguments.out.name}-{provenance()['commit']}"
    records = run_jobs(run_stream, make_jobs(arguments), runs, processes=arguments.jobs)
    failures = sum(1 for record in records if record["wrong"])
    text = (
        f"Three streams of {arguments.tokens:,} tokens (random bytes, {Path(arguments.text).name}, one byte repeated) "
        f"through a Hope of width {arguments.dim}, depth {arguments.depth}, {arguments.heads} heads (trained ones have "
        f"the size of their run; their gate is the one they started with), in calls of {arguments.call:,} tokens with "
        f"one carried state. Perturbed: noise of {arguments.noise:g} times the root "
        f"mean square of each parameter. {described(arguments.settings)}"
        f"Entries and norms are those of the whole memory M_0 + D, the largest at the "
        f"end of any call; the errors are all that were ever written. {failures} of {len(records)} settings fail "
        f"(a value that is not finite, an error beyond its bound, an entry of {LARGEST_MEMORY:g} or more, a state that "
        f"changes its size).\n\n{table(records)}"
    )
    print(write_report(arguments.out, "A million tokens through one state", text, {"runs": records}))


def _largest(values: Tensor) -> float:
    """The maximum; infinite if any is not a number."""
    largest = values.max().item() if values.numel() else 0.0
    return math.inf if math.isnan(largest) else largest


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _ignore(notice: str) -> None:
    """That a text was read only in part is what was asked for."""


if __name__ == "__main__":
    main()
