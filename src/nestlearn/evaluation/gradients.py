"""How the outer gradient grows with the length of the sequence, at initialisation.

    python -m nestlearn.evaluation.gradients --out results/gradients

The outer loss reaches the initial states through every write. If writes amplify what they are made of, the gradient
grows exponentially with the number of chunks and long sequences cannot be trained (decision 19 of docs/decisions.md).
For each mixer, write gate, inner rule, momentum, retention and read this measures the norm of the gradient of the mean
cross-entropy a token with respect to all parameters, on the beginning of one text, in float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.evaluation.jobs import Job, Record, provenance, run_jobs
from nestlearn.evaluation.language_modeling import parse_settings
from nestlearn.evaluation.report import described, finite_or_none, markdown_table, write_report
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.data import ByteTokenizer, read_documents

MIXERS = (
    "self_modifying_titans",
    "tnt",
    "titans",
    "gated_delta_net",
    "delta_net",
    "linear_attention",
    "attention",
    "plain_attention",
)
GATES = (0.02, 0.1, 0.5, 0.9)
LENGTHS = (128, 512, 2048, 8192)


class OuterGradient(NamedTuple):
    """The outer gradient at one length.

    Attributes:
        length: T.
        loss: mean cross-entropy, nats a token.
        norm: Euclidean norm of the gradient with respect to all parameters.
        norms: the same for each parameter by name.
        memory: largest absolute entry of the memories' state at the end, 0 without memories.
    """

    length: int
    loss: float
    norm: float
    norms: dict[str, float]
    memory: float


def outer_gradient(
    config: HopeConfig, tokens: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float64, recompute: bool = False
) -> OuterGradient:
    """Gradient of the mean cross-entropy of an untrained model on one sequence.

    Args:
        config: of the model; its seed fixes the initial weights.
        tokens: (T + 1,) int64; the first T are read, the last T predicted.
        seed: of the initial weights.
        dtype: in which everything is computed.
        recompute: activation checkpointing, for sequences that do not fit into memory otherwise.
    """
    torch.manual_seed(seed)
    model = HopeLM(config).to(dtype)
    model.set_activation_checkpointing(recompute)
    logits, state = model(tokens[None, :-1])
    loss = F.cross_entropy(logits[0], tokens[1:])
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    written = [value.abs().max().item() for name, value in state.items() if name.endswith(("inner", "outer", "memory"))]
    return OuterGradient(
        length=len(tokens) - 1,
        loss=loss.item(),
        norm=math.hypot(*norms.values()),
        norms=norms,
        memory=max(written, default=0.0),
    )


def opening(source: str, length: int) -> Tensor:
    """The first `length` bytes of a text (`read_documents`), or as many random ones if `source` is "random", (length,)
    int64.

    Raises:
        ValueError: if the text is shorter.
    """
    if source == "random":
        return torch.randint(256, (length,), generator=torch.Generator().manual_seed(0))
    found = np.concatenate(
        [ByteTokenizer().encode(text) for text in read_documents(source, max_bytes=4 * length, notice=_ignore)]
    )
    if len(found) < length:
        raise ValueError(f"{source}: expected at least {length:,} bytes of text, got {len(found):,}")
    return torch.from_numpy(found[:length].astype(np.int64))


def measure(job: Job) -> Record:
    """The gradients of one setting at all lengths."""
    config = HopeConfig.from_dict(job["config"])
    tokens = opening(job["text"], max(job["lengths"]) + 1)
    points = [
        outer_gradient(config, tokens[: length + 1], seed=job["seed"], recompute=length > 2048)
        for length in job["lengths"]
    ]
    first, last = points[0], points[-1]
    growth = {
        name: last.norms[name] / norm
        for name, norm in first.norms.items()
        if norm > 1e-6 * first.norm and math.isfinite(last.norms[name])
    }
    return {
        "norms": [finite_or_none(point.norm) for point in points],
        "losses": [finite_or_none(point.loss) for point in points],
        "memories": [finite_or_none(point.memory) for point in points],
        "growth": finite_or_none(last.norm / first.norm),
        "fastest": max(growth, key=lambda name: growth[name], default=None),
    }


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """All combinations of what was asked for; choices that a mixer does not have are not varied for it."""
    jobs: list[Job] = []
    for mixer in arguments.mixers:
        memory = mixer in ("self_modifying_titans", "tnt", "titans")
        own = memory and mixer != "titans"
        choices = itertools.product(
            arguments.gates if memory else [None],
            arguments.rules if own else [None],
            arguments.momentum if own else [None],
            arguments.retain_to if memory else [None],
            arguments.reads if memory else [None],
        )
        for gate, rule, momentum, retain_to, read in choices:
            named = {
                "initial_gate": gate,
                "inner_rule": rule,
                "momentum": None if momentum is None else momentum == "on",
                "retain_to": retain_to,
                "read": read,
            }
            chosen = {name: value for name, value in named.items() if value is not None}
            settings: dict[str, Any] = {**chosen, **arguments.settings}
            config = HopeConfig(
                mixer=mixer, dim=arguments.dim, depth=arguments.depth, heads=arguments.heads, **settings
            )
            parts = [mixer, gate, rule, None if momentum is None else f"momentum-{momentum}", retain_to, read]
            jobs.append(
                {
                    "name": "-".join(str(part) for part in parts if part is not None),
                    "config": config.to_dict(),
                    "settings": {"mixer": mixer, **named},
                    "text": arguments.text,
                    "lengths": arguments.lengths,
                    "seed": arguments.seed,
                }
            )
    return jobs


def table(records: Sequence[Record], lengths: Sequence[int]) -> str:
    """Markdown: one line a setting, the gradient's norm at each length, and its growth from the first to the last."""
    header = [
        "mixer",
        "gate",
        "rule",
        "momentum",
        "retain to",
        "read",
        *(f"T={length}" for length in lengths),
        "growth",
    ]
    rows = []
    for record in records:
        settings = record["job"]["settings"]
        momentum = settings["momentum"]
        rows.append(
            [
                settings["mixer"],
                settings["initial_gate"],
                settings["inner_rule"],
                None if momentum is None else "on" if momentum else "off",
                settings["retain_to"],
                settings["read"],
                *("not finite" if norm is None else norm for norm in record["norms"]),
                "not finite" if record["growth"] is None else record["growth"],
            ]
        )
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    add = parser.add_argument
    add("--mixers", type=several(str), default=list(MIXERS))
    add("--gates", type=several(float), default=list(GATES), help="initial write gates of memory mixers")
    add("--rules", type=several(str), default=["dgd", "gd", "delta"])
    add("--momentum", type=several(str), default=["off", "on"])
    add("--retain-to", type=several(str), default=["initial", "zero"])
    add("--reads", type=several(str), default=["token"])
    add("--lengths", type=several(int), default=list(LENGTHS))
    add("--text", default="stdlib", help="file, folder, .jsonl(.gz), datasets name, stdlib or random")
    add("--dim", type=int, default=32)
    add("--depth", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings of HopeConfig")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, help="processes, one thread each")
    add("--out", type=Path, default=Path("results/gradients"), help="path of the results, without suffix")
    add("--runs", type=Path, default=None, help="folder of the records; by default runs/<name of --out>-<commit>")
    arguments = parser.parse_args()
    arguments.settings = parse_settings(arguments.set, ["all"])["all"]
    runs = arguments.runs or Path("runs") / f"{arguments.out.name}-{provenance()['commit']}"
    records = run_jobs(measure, make_jobs(arguments), runs, processes=arguments.jobs)
    text = (
        f"Norm of the gradient of the mean cross-entropy a token with respect to all parameters of an untrained model "
        f"(width {arguments.dim}, depth {arguments.depth}, {arguments.heads} heads, chunk "
        f"{HopeConfig().chunk_size}, float64), on the first T bytes of {Path(arguments.text).name}. "
        f"{described(arguments.settings)}A growth of "
        f"at most 4 is what docs/decisions.md asks for (decision 19).\n\n{table(records, arguments.lengths)}"
    )
    print(write_report(arguments.out, "Growth of the outer gradient with length", text, {"runs": records}))


def _ignore(notice: str) -> None:
    """That a text was read only in part is what was asked for."""


if __name__ == "__main__":
    main()
