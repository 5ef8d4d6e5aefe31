"""Self-modifying Titans (Eq. 86-91) as a listing: one token after another, one memory after another.

What `SelfModifyingTitans` must equal, in outputs, states and gradients. It shares no code with the layer's fast form
and nobody optimises it; the numbers in brackets are the decisions of docs/decisions.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.layers.chunked_memory import Read
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans

State = dict[str, Tensor]


class Memory(NamedTuple):
    """The two linear maps of one memory (Eq. 89), or something of their shape.

    Attributes:
        inner: W2 (B, H, hidden, K).
        outer: W1 (B, H, K, hidden).
    """

    inner: Tensor
    outer: Tensor

    def plus(self, other: Memory) -> Memory:
        return Memory(self.inner + other.inner, self.outer + other.outer)

    def __call__(self, x: Tensor) -> Tensor:
        """W1 silu(W2 x) for one token (B, H, K), without residual."""
        return apply(self.outer, F.silu(apply(self.inner, x)))


class Memories(NamedTuple):
    """All memories of a layer, by name: what no write changes, what does, its snapshots and its momentum."""

    names: list[str]
    fixed: dict[str, Memory]
    running: dict[str, Memory]
    snapshot: dict[str, Memory]
    momentum: dict[str, Memory]

    @staticmethod
    def of(layer: SelfModifyingTitans, batch: int, state: State | None = None) -> Memories:
        """From a state, or those of a fresh context."""
        names = ["key", "value", "rate", "retention", *(["query"] if layer.adaptive_query else []), "memory"]
        initial = {
            name: Memory(
                layer.memory.initial.inner[:, i].expand(batch, -1, -1, -1),
                layer.memory.initial.outer[:, i].expand(batch, -1, -1, -1),
            )
            for i, name in enumerate(names)
        }
        nothing = {name: Memory(torch.zeros_like(m.inner), torch.zeros_like(m.outer)) for name, m in initial.items()}
        # (11) Retention to the initial state: M_t = M_0 + D_t and the rule acts on D_t. To zero: it acts on M_t.
        fixed, start = (initial, nothing) if layer.retain_to == "initial" else (nothing, initial)
        if state is None:
            return Memories(names, fixed, dict(start), dict(start), dict(nothing))
        momentum = unstack(names, state, "_momentum") if layer.momentum else dict(nothing)
        return Memories(names, fixed, unstack(names, state, ""), unstack(names, state, "_snapshot"), momentum)

    def named(self, layer: SelfModifyingTitans) -> State:
        """As the layer names them in its state."""
        state = stack(self.names, self.running, "") | stack(self.names, self.snapshot, "_snapshot")
        return state | (stack(self.names, self.momentum, "_momentum") if layer.momentum else {})


def specify(layer: SelfModifyingTitans, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The layer's outputs and final state, token by token.

    Args:
        layer: holds the parameters and settings; its `forward` is not used.
        x: (B, T, D).
        state: as the layer's; None for a fresh context.

    Returns:
        y (B, T, D) and the state after the last token, differentiable in x, the parameters and the incoming state.

    Raises:
        ValueError: if the layer truncates gradients, which has no counterpart here.
    """
    reads, after = specify_reads(layer, x, state)
    return reads[layer.read], after


def specify_reads(
    layer: SelfModifyingTitans, x: Tensor, state: State | None = None
) -> tuple[dict[Read, Tensor], State]:
    """As `specify`, with the outputs of every timing of the reads, whatever the layer's own: no write depends on it."""
    if layer.detach_every is not None:
        raise ValueError(f"detach_every: expected None, got {layer.detach_every}; the specification cuts no gradient")
    batch, tokens, _ = x.shape
    width = layer.streams.convolution.width
    memories = Memories.of(layer, batch, state)
    if state is None:
        position = torch.zeros(batch, dtype=torch.long, device=x.device)
        window = x.new_zeros(batch, width - 1, layer.streams.projection.out_features)
    else:
        position, window = state["position"], state["convolution"]

    outputs: dict[Read, list[Tensor]] = {"token": [], "previous": [], "chunk": []}
    for t in range(tokens):
        # (18) Slow projections of the token behind a short causal convolution.
        window = torch.cat([window, x[:, t : t + 1] @ layer.streams.projection.weight.T], dim=1)
        u = F.silu((window * layer.streams.convolution.weight).sum(dim=1))
        u_q, u_k, u_v, u_g = u.unflatten(-1, (4, layer.heads, -1)).unbind(dim=1)
        window = window[:, 1:]

        position = position + 1
        for read, answer in specify_token(layer, memories, (u_q, u_k, u_v, u_g), position).items():
            outputs[read].append(answer)

    period = max(layer.chunk_size, layer.projection_chunk_size)
    after = {"position": position % period, "convolution": window, **memories.named(layer)}
    return {read: readout(layer, answers, x) for read, answers in outputs.items()}, after


def specify_token(
    layer: SelfModifyingTitans, memories: Memories, streams: tuple[Tensor, Tensor, Tensor, Tensor], position: Tensor
) -> dict[Read, Tensor]:
    """One token: writes it into the memories, which it changes, and reads them under every timing.

    Args:
        layer: holds the parameters and settings of the memories and their gates.
        memories: before the token; after the call, those after it.
        streams: u_q, u_k, u_v, u_g (B, H, K).
        position: (B,), tokens since the reset, this one included.

    Returns:
        o (B, H, K) by the timing of the read.
    """
    names, fixed, running, snapshot, momentum = memories

    # (1) Everything that follows is made by M_xi, the memories at the end of the previous chunk.
    xi = {name: fixed[name].plus(snapshot[name]) for name in names}

    q, k, v, rate, retention = project(layer, memories, streams)
    gates = gates_of(layer, rate, retention)

    before = {name: running[name] for name in names}
    for name in names:
        # (18) The main memory has no residual, its target has.
        residual = name != "memory" or layer.residual_memory
        # (20) Written by a fraction; where nothing is erased, by that fraction of the mean over a chunk.
        fraction = layer.write_scale if name == "memory" else layer.projection_write_scale
        if name in layer.static_projections:
            fraction = 0.0
        if layer.inner_rule == "gd":
            fraction /= layer.chunk_size if name == "memory" else layer.projection_chunk_size
            fraction *= getattr(layer, "global_stride", 1)
        running[name], momentum[name] = write_token(
            layer, xi[name], before[name], snapshot[name], momentum[name], k, v, gates, residual, fraction
        )

    # (2) Which state of the main memory the token reads.
    main: dict[Read, Memory] = {
        "token": fixed["memory"].plus(running["memory"]),  # Eq. 78, 82
        "previous": fixed["memory"].plus(before["memory"]),  # Eq. 83, 86
        "chunk": xi["memory"],  # Eq. 90
    }
    answers: dict[Read, Tensor] = {}
    for read, memory in main.items():
        o = memory(q)
        answers[read] = o + q if layer.residual_memory else o

    # (10) Where a chunk ends, for each row on its own, a new snapshot is taken.
    for name in names:
        chunk = layer.chunk_size if name == "memory" else layer.projection_chunk_size
        ended = (position % chunk == 0)[:, None, None, None]
        snapshot[name] = Memory(
            torch.where(ended, running[name].inner, snapshot[name].inner),
            torch.where(ended, running[name].outer, snapshot[name].outer),
        )
    return answers


def project(
    layer: SelfModifyingTitans, memories: Memories, streams: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq. 83, 90: q, k, v, rate and retention (B, H, K), read from snapshots of memories with a residual (Eq. 89)."""
    u_q, u_k, u_v, u_g = streams
    xi = {name: memories.fixed[name].plus(memories.snapshot[name]) for name in memories.names}
    k = unit(u_k + xi["key"](u_k))
    v = unit(u_v + xi["value"](u_v))  # (5)
    q = unit(u_q + xi["query"](u_q)) if layer.adaptive_query else unit(u_q)
    return q, k, v, u_g + xi["rate"](u_g), u_g + xi["retention"](u_g)


def gates_of(layer: Any, rate: Tensor, retention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(7) The write gate, alpha and the momentum: one number for each head, (B, H)."""
    gate = torch.sigmoid((layer.gate_readout * rate).sum(-1) + layer.gate_bias)
    alpha = torch.ones_like(gate)
    if layer.retention:
        alpha = torch.sigmoid((layer.retain_readout * retention).sum(-1) + layer.retain_bias)
    mu = torch.zeros_like(gate)
    if layer.momentum:
        mu = torch.sigmoid((layer.momentum_readout * rate).sum(-1) + layer.momentum_bias)
    return gate, alpha, mu


def write_token(
    layer: Any,
    xi: Memory,
    before: Memory,
    snapshot: Memory,
    momentum: Memory,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    residual: bool,
    fraction: float,
) -> tuple[Memory, Memory]:
    """One memory and its momentum after one token: its snapshot xi makes the error, the rule writes what changes."""
    gate, alpha, mu = gates

    # Eq. 84: the memory makes its own target.
    target = v + xi(v)

    # Eq. 85: inner loss 1/2 |M(k) - target|^2, its gradient at the output of each linear map.
    hidden_input = apply(xi.inner, k)
    hidden = F.silu(hidden_input)
    error, image = surprises(xi.outer, hidden_input, k if residual else 0.0, target, layer.write_bound, fraction)

    # Eq. 88, 90, (3): each linear map, with its own input as the key.
    maps, moments = [], []
    for which, key, written in (("inner", k, image), ("outer", hidden, error)):
        old, at_snapshot, moment = (getattr(m, which) for m in (before, snapshot, momentum))
        erase, write = strengths(layer, gate, alpha, key.square().sum(-1))
        if layer.inner_rule == "dgd":
            erased = apply(old, key)
        elif layer.inner_rule == "delta":
            erased = apply(old - at_snapshot, key)
        else:
            erased = torch.zeros_like(written)
        # (7) Momentum enters averaged.
        moment = scale(mu, moment) - scale(write * (1 - mu), product(written, key))
        maps.append(scale(alpha, old) - scale(erase, product(erased, key)) + moment)
        moments.append(moment)
    return Memory(*maps), Memory(*moments)


def readout(layer: SelfModifyingTitans, outputs: list[Tensor], x: Tensor) -> Tensor:
    """RMSNorm of each head, a gate from the layer's input, back to the model's width: T of (B, H, K) -> (B, T, D)."""
    o = torch.stack(outputs, dim=1) if outputs else x.new_zeros(*x.shape[:2], layer.heads, x.shape[2] // layer.heads)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + layer.readout.norm.eps) * layer.readout.norm.weight
    return (o.flatten(2) * F.silu(x @ layer.readout.gate.weight.T)) @ layer.readout.output.weight.T


def surprises(
    outer: Tensor, hidden_input: Tensor, residual: Tensor | float, target: Tensor, bound: float | None, fraction: float
) -> tuple[Tensor, Tensor]:
    """Gradients of 1/2 |M(k) - target|^2 at the output of W1 and, through it, at the output of W2, by autograd.

    The target is a constant for them, yet they stay differentiable in everything, the target too. (5, 20) The first
    is bounded before it goes back through W1, the second after that; then each is taken by its fraction.
    """
    outer_loop = torch.is_grad_enabled()
    with torch.enable_grad():
        if not hidden_input.requires_grad:
            hidden_input = hidden_input.detach().requires_grad_()
        read = residual + apply(outer, F.silu(hidden_input))
        loss = (read - target).square().sum() / 2
        (error,) = torch.autograd.grad(loss, read, create_graph=outer_loop, retain_graph=True)
        error = bounded(error, bound)
        (image,) = torch.autograd.grad(read, hidden_input, error, create_graph=outer_loop)
        return fraction * error, fraction * bounded(image, bound)


def strengths(layer: Any, gate: Tensor, alpha: Tensor, squared_norm: Tensor) -> tuple[Tensor, Tensor]:
    """How strongly a map erases and writes at an input of this squared norm: all (B, H)."""
    if layer.negative_eigenvalues:  # (4)
        most = (1 + alpha) / torch.where(squared_norm > 1, squared_norm, torch.ones_like(squared_norm))
        erase = gate * most
        return erase, torch.where(erase <= most - erase, erase, most - erase)
    gate = 0.99 * gate  # (3)
    erase = gate / (1 - gate + gate * squared_norm)
    return erase, erase


def bounded(x: Tensor, bound: float | None) -> Tensor:
    """x, or bound x / |x| where |x| is larger."""
    return x if bound is None else x * (bound / x.norm(dim=-1, keepdim=True).clamp_min(bound))


def unit(x: Tensor) -> Tensor:
    """x / |x|, smooth at zero."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """W x for each row and head: (B, H, out, in), (B, H, in) -> (B, H, out)."""
    return (matrix @ x[..., None])[..., 0]


def product(value: Tensor, key: Tensor) -> Tensor:
    """value key^T: (B, H, out), (B, H, in) -> (B, H, out, in)."""
    return value[..., :, None] * key[..., None, :]


def scale(number: Tensor, matrix: Tensor) -> Tensor:
    """number (B, H) times matrix (B, H, out, in)."""
    return number[..., None, None] * matrix


def unstack(names: list[str], state: State, suffix: str) -> dict[str, Memory]:
    inner, outer = state[f"inner{suffix}"], state[f"outer{suffix}"]
    return {name: Memory(inner[:, :, i], outer[:, :, i]) for i, name in enumerate(names)}


def stack(names: list[str], memories: dict[str, Memory], suffix: str) -> State:
    return {
        f"inner{suffix}": torch.stack([memories[name].inner for name in names], dim=2),
        f"outer{suffix}": torch.stack([memories[name].outer for name in names], dim=2),
    }
