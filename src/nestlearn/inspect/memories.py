"""What the memories of a model do while it reads a text: how strongly they are written, how wrong they are, how far
they have moved from where they started, and how long they remember."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from nestlearn.functional.surprise import normalize
from nestlearn.io import atomic_path
from nestlearn.layers import SelfModifyingTitans, Titans
from nestlearn.layers.chunked_memory import LARGEST_GATE, MemoryState, base_weights
from nestlearn.memory.mlp import MLPWeights, read_mlp
from nestlearn.models import HopeLM

State = dict[str, Tensor]

# Half-lives beyond this are drawn and printed as this; alpha rounds to 1 there.
LONGEST_HALF_LIFE = 1e6


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """What was seen while T tokens were read: L layers, H heads, M memories, P looks, one after each chunk.

    Attributes:
        names: of the M memories.
        write: (L, H, T), the gate s in (0, 1): how far a write goes towards its target for a key of norm 1.
        half_life: (L, H, T), tokens after which retention at this token's rate has halved what was written.
        error: (L, H, M, T), |M(k) - target|, before it is bounded and scaled.
        bound: the norm beyond which an error is scaled down before it is written; None for none.
        positions: (P,), tokens read at each look.
        change: (L, H, M, P), the norm of all that the memory's two matrices differ by from their initial state.
    """

    names: tuple[str, ...]
    write: Tensor
    half_life: Tensor
    error: Tensor
    bound: float | None
    positions: Tensor
    change: Tensor


@torch.no_grad()
def describe_memories(model: HopeLM, tokens: Tensor) -> MemoryRecord:
    """Reads a text and looks at the memories of every layer, of TNT at the global ones.

    Args:
        model: with the mixer "self_modifying_titans", "tnt" or "titans", in evaluation mode.
        tokens: (T,) int64, T at least 1.

    Raises:
        ValueError: for another mixer, or no tokens.
    """
    mixers: list[Any] = [block.mixer for block in model.blocks]
    if not all(isinstance(mixer, SelfModifyingTitans | Titans) for mixer in mixers):
        raise ValueError(
            f'expected a model with two-layer memories (mixer "self_modifying_titans", "tnt" or "titans"), '
            f"got the mixer {model.config.mixer!r}"
        )
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens: expected at least one, of shape (T,), got shape {tuple(tokens.shape)}")
    inputs: dict[int, Tensor] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda _, arguments, index=index: inputs.update({index: arguments[0]}))
        for index, mixer in enumerate(mixers)
    ]
    looks: list[dict[str, Tensor]] = []
    state = model.init_state(1)
    chunk = min(mixers[0].chunk_size, mixers[0].projection_chunk_size)
    try:
        # The snapshot that a whole chunk is written against is in the state before it.
        for part in tokens[None].split(chunk, dim=1):
            before = state
            _, state = model(part, before)
            own = [_look(mixer, inputs[i], _of_block(before, i), _of_block(state, i)) for i, mixer in enumerate(mixers)]
            looks.append({name: torch.stack([layer[name] for layer in own]) for name in own[0]})
    finally:
        for hook in hooks:
            hook.remove()
    first = mixers[0]
    adaptive = isinstance(first, SelfModifyingTitans) and first.adaptive_query
    projections = ("key", "value", "rate", "retention", *(("query",) if adaptive else ()))
    ends = torch.tensor([look["write"].shape[-1] for look in looks]).cumsum(0)
    return MemoryRecord(
        names=("memory",) if isinstance(first, Titans) else (*projections, "memory"),
        write=torch.cat([look["write"] for look in looks], dim=-1),
        half_life=torch.cat([look["half_life"] for look in looks], dim=-1),
        error=torch.cat([look["error"] for look in looks], dim=-1),
        bound=first.write_bound,
        positions=ends,
        change=torch.stack([look["change"] for look in looks], dim=-1),
    )


def memories_table(record: MemoryRecord) -> Table:
    """A row for each layer and memory: over tokens and heads the mean write strength, the mean error, how many errors
    met the bound, the change at the end; and the half-lives, from the head that forgets fastest to the slowest."""
    table = Table(
        title=f"Memories after {int(record.positions[-1]):,} tokens", title_justify="left", title_style="bold"
    )
    table.add_column("layer", justify="right")
    table.add_column("memory")
    for column in ("write strength", "|error|", "bounded", "|change|", "half-life (tokens)"):
        table.add_column(column, justify="right")
    layers = record.write.shape[0]
    for layer in range(layers):
        lives = record.half_life[layer].median(dim=-1).values
        for number, name in enumerate(record.names):
            error = record.error[layer, :, number]
            bounded = 0.0 if record.bound is None else float((error > record.bound).double().mean())
            table.add_row(
                str(layer) if number == 0 else "",
                name,
                f"{float(record.write[layer].mean()):.2f}" if number == 0 else "",
                f"{float(error.mean()):.2f}",
                f"{bounded:.0%}",
                f"{float(record.change[layer, :, number, -1].mean()):.2f}",
                f"{_tokens(float(lives.min()))} to {_tokens(float(lives.max()))}" if number == 0 else "",
                end_section=number == len(record.names) - 1,
            )
    return table


def plot_memories(record: MemoryRecord, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws errors, changes, write strengths and half-lives over the tokens, a row of panes for each layer.

    Lines are means over the heads; where a pane shows heads, each has a line.

    Args:
        record: from `describe_memories`.
        path: the picture, a PNG or what its suffix says; written atomically.
        title: above all panes.
    """
    from matplotlib.figure import Figure

    layers, heads, tokens = record.write.shape
    at = torch.arange(1, tokens + 1)
    figure = Figure(figsize=(12, 1.2 + 1.75 * layers), dpi=130, layout="constrained")
    panes = figure.subplots(layers, 4, sharex=True, squeeze=False)
    for layer, row in enumerate(panes):
        for number, name in enumerate(record.names):
            row[0].plot(at, _smooth(record.error[layer, :, number].mean(0)), color=f"C{number}", label=name)
            row[1].plot(record.positions, record.change[layer, :, number].mean(0), color=f"C{number}")
        for head in range(heads):
            label = f"head {head}" if heads <= 6 else None
            row[2].plot(at, _smooth(record.write[layer, head]), color=f"C{head}", linewidth=1, label=label)
            row[3].plot(at, _smooth(record.half_life[layer, head].log()).exp(), color=f"C{head}", linewidth=1)
        row[0].set_ylabel(f"layer {layer}")
        row[0].set_ylim(bottom=0)
        row[2].set_ylim(0, 1)
        row[3].set_yscale("log")
        for ax in row:
            ax.grid(alpha=0.25)
            ax.tick_params(labelsize=7)
    for ax, text in zip(
        panes[0],
        ("error |M(k) - target|", "|change| since the start", "write strength", "half-life (tokens)"),
        strict=True,
    ):
        ax.set_title(text, fontsize=9)
    for ax in panes[-1]:
        ax.set_xlabel("tokens read", fontsize=8)
    panes[0][0].legend(fontsize=6)
    if heads <= 6:
        panes[0][2].legend(fontsize=6)
    if title:
        figure.suptitle(title, fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _look(mixer: Any, x: Tensor, before: State, after: State) -> dict[str, Tensor]:
    """One chunk of one layer, x (1, C, D), batch dimension dropped: write (H, C), half_life (H, C), error (H, M, C),
    change (H, M)."""
    base = base_weights(mixer.memory, mixer.retain_to)
    whole = MemoryState.of(before).snapshot.add(base)
    streams = mixer.streams.split(mixer.streams(x, before["convolution"])[0]).to(whole.inner.dtype)
    if isinstance(mixer, SelfModifyingTitans):
        write, retain, error = _look_at_self_modifying(mixer, streams, whole)
    else:
        write, retain, error = _look_at_titans(mixer, x, streams, whole)
    change = MemoryState.of(after).running
    if base is None:  # the state holds the memories themselves
        change = MLPWeights(*(now - start for now, start in zip(change, mixer.memory.initial, strict=True)))
    squares = change.inner.square().sum((-2, -1)) + change.outer.square().sum((-2, -1))
    return {
        "write": write[0],
        # TNT writes, and so forgets, with every so many-th token only.
        "half_life": (getattr(mixer, "global_stride", 1) * math.log(0.5) / retain.log()).clamp(max=LONGEST_HALF_LIFE)[
            0
        ],
        "error": error[0].norm(dim=-1),
        "change": squares.sqrt()[0],
    }


def _look_at_self_modifying(
    mixer: SelfModifyingTitans, streams: Tensor, whole: MLPWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 83 to 85 from the snapshot: gates (B, H, C), retention (B, H, C), errors (B, H, M, C, V)."""
    _, u_k, u_v, u_g = streams

    def project(number: int, u: Tensor) -> Tensor:
        return u + read_mlp(MLPWeights(whole.inner[:, :, number], whole.outer[:, :, number]), u)

    keys, values = normalize(project(0, u_k)), normalize(project(1, u_v))
    gate = mixer.largest_gate * _sigmoid(project(2, u_g), mixer.gate_readout, mixer.gate_bias)
    retain = torch.ones_like(gate)
    if mixer.retention:
        retain = _sigmoid(project(3, u_g), mixer.retain_readout, mixer.retain_bias)
    k, v = keys.unsqueeze(2), values.unsqueeze(2)
    residual = (k - v).repeat(1, 1, whole.inner.shape[2], 1, 1)
    if not mixer.residual_memory:
        residual[:, :, -1] = -values
    return gate, retain, read_mlp(whole, k) - read_mlp(whole, v) + residual


def _look_at_titans(mixer: Titans, x: Tensor, streams: Tensor, whole: MLPWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The same where keys, values and gates come from x alone."""
    _, keys, values = normalize(streams)
    logits = mixer.gates(x).unflatten(-1, (-1, mixer.heads)).permute(2, 0, 3, 1).to(whole.inner.dtype)
    gate = LARGEST_GATE * torch.sigmoid(logits[0] + mixer.gate_bias[:, None])
    retain = torch.sigmoid(logits[1] + mixer.retain_bias[:, None])
    return gate, retain, read_mlp(whole, keys.unsqueeze(2)) - values.unsqueeze(2)


def _sigmoid(x: Tensor, readout: Tensor, bias: Tensor) -> Tensor:
    """One number for each head: x (B, H, C, K) -> (B, H, C)."""
    return torch.sigmoid((x * readout[:, None]).sum(-1) + bias[:, None])


def _of_block(state: State, index: int) -> State:
    prefix = f"blocks.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _smooth(values: Tensor, width: int = 32) -> Tensor:
    """A running mean over the last `width` tokens, so that a line of thousands of tokens can be read."""
    padded = F.pad(values[None, None].double(), (width - 1, 0), mode="replicate")
    return F.avg_pool1d(padded, width, stride=1)[0, 0]


def _tokens(number: float) -> str:
    return f"{number:,.0f}" if number < LONGEST_HALF_LIFE else f"over {LONGEST_HALF_LIFE:,.0f}"
