"""Self-modifying Titans (Eq. 83-91): keys, values, learning rate, retention and memory are all memories that write
themselves, each with targets that it makes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.recomputed import not_kept
from nestlearn.functional.rms_norm import normalize_token
from nestlearn.functional.surprise import normalize
from nestlearn.layers.chunked_memory import (
    LARGEST_GATE,
    Backend,
    ChunkedMemoryLayer,
    MemoryState,
    Read,
    RetainTo,
    base_weights,
    check_choice,
    check_gates,
    decode_main,
    gate_hidden,
    read_main,
    spread_gates,
    spread_retention,
    token_gates,
    write_gates,
)
from nestlearn.layers.compiled_walk import GateReadouts
from nestlearn.layers.decoding import add_base
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.streams import Streams
from nestlearn.layers.timeline import Segment
from nestlearn.memory.mlp import STABLE_SCALES, InnerRule, MLPMemory, MLPWeights, read_mlp, write_mlp_chunk
from nestlearn.memory.token import read_token, write_mlp_token_

Projection = Literal["key", "value", "rate", "retention"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


def check_static(static_projections: Sequence[str], retain_to: RetainTo) -> None:
    """Refuses what is no memory of a projection, and decay to zero, which changes a memory that is never written.

    Raises:
        ValueError: saying what was expected.
    """
    if isinstance(static_projections, str):
        raise ValueError(f'static_projections: expected names, for example ("{static_projections}",)')
    for name in static_projections:
        check_choice("static_projections", name, Projection)
    if len(set(static_projections)) < len(static_projections):
        raise ValueError(f"static_projections: expected each name once, got {', '.join(static_projections)}")
    if static_projections and retain_to != "initial":
        raise ValueError(
            f"static_projections: a memory stays as it is only where it decays to its initial state; with retain_to="
            f'"{retain_to}" choose retain_to="initial" or static_projections=()'
        )


def check_empty(empty_memory: bool, residual_memory: bool) -> None:
    """Refuses a residual on a memory that is to give back only what was written.

    Raises:
        ValueError: saying what to choose.
    """
    if empty_memory and residual_memory:
        raise ValueError(
            "empty_memory: with residual_memory the query is read beside what was written; choose one of the two"
        )


class SelfModifyingTitans(ChunkedMemoryLayer):
    """The sequence layer of Hope.

    Per head there are M = 5 two-layer memories of one shape, in this order: key, value, rate, retention (and query, if
    q is adaptive: M = 6), memory. With u the slow projections of x behind a short convolution, and everything read
    from the snapshot at the end of the previous chunk (decision 1 of docs/decisions.md):

        k = norm(M_key(u_k)),  v = norm(M_value(u_v)),  q = norm(u_q) or norm(M_query(u_q))          Eq. 83, 90
        gate = 0.99 sigmoid(<r, M_rate(u_g)> + b),  alpha = sigmoid(<r', M_retention(u_g)> + b')
        target_i = M_i(v),  error_i = M_i(k) - target_i  for every memory i                           Eq. 84, 85
        every linear map W of every memory, with a its own input and e the error at its output:
        W_t = alpha_t W_{t-1} - erase_t (W_{t-1} a_t) a_t^T - write_t e_t a_t^T                       Eq. 86-88, 90
        (e bounded and scaled; with momentum the last term is averaged over the tokens first)
        o_t = M_memory,t(q_t)                                                                         Eq. 78, 83

    The projections' memories have the residual of Eq. 89; the main memory has none, and its target is
    v + M_memory(v) (decision 18), unless `residual_memory`.

    Args:
        dim: D, divisible by heads.
        heads: H.
        inner_rule: what erase acts on: "dgd" the whole change of the memory (Eq. 57), "delta" only what was written
            since the snapshot, "gd" nothing.
        momentum: a data-dependent momentum on the writes.
        read: which memory token t reads: "token" M_t, "previous" M_{t-1}, "chunk" the snapshot.
        chunk_size: tokens between snapshots of the main memory.
        projection_chunk_size: the same for the other memories; None for chunk_size. One must divide the other.
        retain_to: what a memory decays towards, its "initial" state or "zero".
        retention: whether memories decay at all.
        negative_eigenvalues: lets an erasure overshoot, which state tracking needs (decision 4).
        adaptive_query: makes q a memory too.
        static_projections: which of "key", "value", "rate" and "retention" are never written: slow weights, as in an
            ablation of Table 6.
        residual_memory: gives the main memory the residual of Eq. 89 too.
        empty_memory: keeps the initial W1 of the main memory at zero, so that what is read was written in the context:
            a sum of writes, whatever its size, which the norm behind makes a ratio (decision 43).
        write_scale: the fraction of its error that the main memory writes, under "gd" of the chunk's mean error; None
            for what keeps the inner rule stable (`nestlearn.memory.mlp.STABLE_SCALES`).
        projection_write_scale: the same for the other memories.
        write_bound: largest norm of a written error, and of its image at the inner map; None for no bound.
        memory_hidden: hidden width of the memories; None for the head's width.
        gate_hidden_ratio: that of the memories for rate and retention, as a part of it: they hold one number a token
            (decision 26).
        initial_gate: write gate s at initialisation, in (0, 1).
        slowest_gate: that of the last head, with a geometric series between it and `initial_gate` of the first; None
            for `initial_gate` in all heads. A head with a small gate sums over as many tokens as the gate's inverse
            before it saturates, so it can count (decision 43). With `empty_memory` the epsilon of the norm behind the
            heads, which no weight holds, shrinks with the square of its part of `initial_gate`; fp16 cannot do that.
        conv_width: taps of the short convolutions.
        detach_every: cut the gradient through the writes every so many chunks, counted in each call; None never.
        backend: what walks the memories, with the same results to rounding: "torch" operations, the specification,
            which can be differentiated twice; "cpp", code for the CPU that the machine's own C++ compiler builds when
            it is first needed; "triton" kernels, which have never been run on a GPU yet; "auto" is "cpp" where that can
            be, and otherwise "torch".

    Raises:
        ValueError: if a number is out of range or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        inner_rule: InnerRule = "dgd",
        momentum: bool = False,
        read: Read = "token",
        chunk_size: int = 64,
        projection_chunk_size: int | None = None,
        retain_to: RetainTo = "initial",
        retention: bool = True,
        negative_eigenvalues: bool = False,
        adaptive_query: bool = False,
        static_projections: Sequence[Projection] = (),
        residual_memory: bool = False,
        empty_memory: bool = False,
        write_scale: float | None = None,
        projection_write_scale: float | None = None,
        write_bound: float | None = 4.0,
        memory_hidden: int | None = None,
        gate_hidden_ratio: float = 0.25,
        initial_gate: float = 0.5,
        slowest_gate: float | None = None,
        conv_width: int = 4,
        detach_every: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_gates(heads, initial_gate, slowest_gate)
        check_empty(empty_memory, residual_memory)
        check_choice("inner_rule", inner_rule, InnerRule)
        check_static(static_projections, retain_to)
        head_dim = dim // heads
        hidden = head_dim if memory_hidden is None else memory_hidden
        super().__init__(
            heads=heads,
            streams=Streams(dim, heads, streams=4, conv_width=conv_width),
            memory=MLPMemory(
                heads,
                head_dim,
                memories=6 if adaptive_query else 5,
                hidden=hidden,
                narrow=(2, 4),
                narrow_hidden=gate_hidden(hidden, gate_hidden_ratio),
                empty=empty_memory,
            ),
            readout=GatedReadout(dim, heads, head_dim, eps=_epsilon(initial_gate, slowest_gate, empty_memory)),
            inner_rule=inner_rule,
            momentum=momentum,
            read=read,
            retain_to=retain_to,
            chunk_size=chunk_size,
            projection_chunk_size=chunk_size if projection_chunk_size is None else projection_chunk_size,
            write_scale=STABLE_SCALES[inner_rule].main if write_scale is None else write_scale,
            projection_write_scale=(
                STABLE_SCALES[inner_rule].projections if projection_write_scale is None else projection_write_scale
            ),
            write_bound=write_bound,
            detach_every=detach_every,
            backend=backend,
        )
        self.retention = retention
        self.negative_eigenvalues = negative_eigenvalues
        self.adaptive_query = adaptive_query
        self.static_projections = tuple(static_projections)
        self.residual_memory = residual_memory
        # The exact step of an ordinary gate divides by 1 - s; with negative eigenvalues nothing does.
        self.largest_gate = 1.0 if negative_eigenvalues else LARGEST_GATE
        self.gate_readout = nn.Parameter(torch.randn(heads, head_dim) * head_dim**-0.5)
        self.gate_bias = nn.Parameter(spread_gates(heads, initial_gate, slowest_gate, self.largest_gate))
        if retention:
            self.retain_readout = nn.Parameter(torch.randn(heads, head_dim) * head_dim**-0.5)
            self.retain_bias = nn.Parameter(spread_retention(heads))
        if momentum:
            self.momentum_readout = nn.Parameter(torch.randn(heads, head_dim) * head_dim**-0.5)
            self.momentum_bias = nn.Parameter(torch.zeros(heads))

    def _inputs(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.streams.by_heads(x, tail, lengths=lengths, document_starts=document_starts)

    def _compiled_walk(
        self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, MemoryState]:
        with not_kept(inputs):
            return super()._compiled_walk(inputs, memory, segments)

    def _walk_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, GateReadouts | None]:
        retain = (self.retain_readout, self.retain_bias) if self.retention else (None, None)
        momentum = (self.momentum_readout, self.momentum_bias) if self.momentum else (None, None)
        readouts = (self.gate_readout, self.gate_bias, *retain, *momentum)
        given = GateReadouts(*(None if r is None else r.to(inputs.dtype) for r in readouts))  # type: ignore[arg-type]
        return self.streams.split(inputs), None, given

    def _scales(self) -> tuple[float, ...]:
        scales = list(super()._scales())
        for name in self.static_projections:
            scales[PROJECTIONS.index(name)] = 0.0
        return tuple(scales)

    def _walk_options(self) -> dict[str, Any]:
        return {
            "largest_gate": self.largest_gate,
            "negative_eigenvalues": self.negative_eigenvalues,
            "retention": self.retention,
            "own_targets": True,
            "residual_memory": self.residual_memory,
            "adaptive_query": self.adaptive_query,
        }

    def _segment(self, inputs: Tensor, state: MemoryState, segment: Segment) -> tuple[Tensor, MemoryState]:
        whole = state.snapshot.add(base_weights(self.memory, self.retain_to))
        return self._learn(self._project(inputs, whole), whole, state, segment)

    def _learn(
        self, projected: tuple[Tensor, ...], whole: MLPWeights, state: MemoryState, segment: Segment
    ) -> tuple[Tensor, MemoryState]:
        """The segment, from its q, k, v, rate and retention (B, H, C, K), and the whole memories at the snapshot."""
        base = base_weights(self.memory, self.retain_to)
        queries, keys, values, rate, retention = projected
        gates = write_gates(
            gate_logits(rate, self.gate_readout, self.gate_bias),
            gate_logits(retention, self.retain_readout, self.retain_bias) if self.retention else None,
            gate_logits(rate, self.momentum_readout, self.momentum_bias) if self.momentum else None,
            segment.active,
            largest_gate=self.largest_gate,
        )

        # Eq. 84, 85: every memory's error against the target that it makes itself, for k and v in one product.
        width = whole.inner.shape[-2]
        both = torch.cat([keys, values], dim=2) @ whole.inner.flatten(2, 3).mT
        z = both.unflatten(-1, (-1, width)).transpose(2, 3).contiguous()  # (B, H, M, 2 C, hidden)
        z_k = z.chunk(2, dim=3)[0]
        hidden_k, hidden_v = F.silu(z).chunk(2, dim=3)
        error = (hidden_k - hidden_v) @ whole.outer.mT + self._residual(keys, values)

        # Eq. 88, 90.
        chunk = write_mlp_chunk(
            state.running,
            state.snapshot,
            state.momentum,
            whole.outer,
            keys,
            z_k,
            hidden_k,
            error,
            gates,
            rule=self.inner_rule,
            negative_eigenvalues=self.negative_eigenvalues,
            bound=self.write_bound,
            scale=self._scale(keys),
        )
        out = read_main(chunk, base, state, keys, queries, gates, self.read)
        if self.residual_memory:
            out = out + queries
        return out, self._after(state, chunk, segment)

    def _token(self, inputs: Tensor, state: MemoryState) -> Tensor:
        # The same in the same order for one token; N = B H rows.
        running = state.running
        base = base_weights(self.memory, self.retain_to)
        whole = state.snapshot if base is None else add_base(state.snapshot, self.memory)
        batch, heads, memories, width, dim = running.inner.shape
        rows = batch * heads
        inner, outer = whole.inner.view(-1, width, dim), whole.outer.view(-1, dim, width)

        # Eq. 83. Every memory is read, which is cheaper than to leave one out; q takes the fifth place.
        u_q, u_k, u_v, u_g = inputs.view(batch, 4, heads, dim).unbind(1)
        u = torch.stack([u_k, u_v, u_g, u_g, u_q, u_q][:memories], dim=2)
        projected = read_token(inner, outer, u.view(-1, 1, dim), residual=True).view(batch, heads, memories, dim)
        rate, retention = projected[:, :, 2], projected[:, :, 3]
        if not self.adaptive_query:
            projected[:, :, 4] = u_q
        unit = normalize_token(projected).view(rows, memories, dim)
        pair, key, value, query = unit[:, :2], unit[:, :1], unit[:, 1:2], unit[:, 4:5]
        gates = token_gates(
            _logit(rate, self.gate_readout, self.gate_bias),
            _logit(retention, self.retain_readout, self.retain_bias) if self.retention else None,
            _logit(rate, self.momentum_readout, self.momentum_bias) if self.momentum else None,
            largest_gate=self.largest_gate,
        )

        # Eq. 84, 85: target - M(k).
        z = torch.bmm(pair, inner.view(rows, -1, dim).mT)
        hidden = F.silu(z).view(rows, 2, memories, width)
        difference = hidden[:, 1] - hidden[:, 0]
        surprise = torch.bmm(difference.view(-1, 1, width), outer.mT).view(rows, memories, dim)
        surprise += value
        residual = surprise if self.residual_memory else surprise[:, :-1]
        residual -= key

        if self.read == "chunk":
            out = decode_main(None, whole, query)
        elif self.read == "previous":
            out = decode_main(base, running, query)
        # Eq. 88, 90.
        write_mlp_token_(
            running,
            state.snapshot,
            state.momentum,
            outer,
            key,
            z[:, 0].view(rows, memories, width),
            hidden[:, 0],
            surprise,
            gates,
            rule=self.inner_rule,
            negative_eigenvalues=self.negative_eigenvalues,
            bound=self.write_bound,
            scales=self._scales(),
        )
        if self.read == "token":
            out = decode_main(base, running, query)
        if self.residual_memory:
            out = out + query
        return out.view(batch, heads, dim)

    def _project(self, inputs: Tensor, whole: MLPWeights) -> tuple[Tensor, ...]:
        """Eq. 83: q, k, v, rate and retention (B, H, C, K) of streams (B, C, 4 D), from the snapshot."""
        u_q, u_k, u_v, u_g = self.streams.split(inputs).unbind(0)
        slow = [u_k, u_v, u_g, u_g, u_q] if self.adaptive_query else [u_k, u_v, u_g, u_g]
        u = torch.stack(slow, dim=2)  # (B, H, M - 1, C, K)
        projected = (u + read_mlp(MLPWeights(whole.inner[:, :, :-1], whole.outer[:, :, :-1]), u)).unbind(2)
        queries = normalize(projected[4] if self.adaptive_query else u_q)
        return queries, normalize(projected[0]), normalize(projected[1]), projected[2], projected[3]

    def _residual(self, keys: Tensor, values: Tensor) -> Tensor:
        """What the residuals add to the errors M(k) - M(v), (B, H, M, C, K): k - v, and -v for the main memory."""
        projections = keys - values
        main = projections if self.residual_memory else -values
        count = len(self.memory.hidden) - 1
        return torch.cat([projections.unsqueeze(2).expand(-1, -1, count, -1, -1), main.unsqueeze(2)], dim=2)


def _epsilon(initial_gate: float, slowest_gate: float | None, empty_memory: bool) -> float:
    """Of the norm behind the heads. What slow heads of empty memories read is small; where W1 starts at zero and is
    learnt, a smaller epsilon would only make its first gradients large."""
    if slowest_gate is None or not empty_memory:
        return 1e-6
    return max(1e-6 * (slowest_gate / initial_gate) ** 2, 1e-30)  # below, fp32 has no numbers left


def gate_logits(x: Tensor, readout: Tensor, bias: Tensor) -> Tensor:
    """<r, x> + b for each head: x (B, H, C, K) -> (B, H, C)."""
    return (x * readout.to(x.dtype)[:, None]).sum(-1) + bias.to(x.dtype)[:, None]


def _logit(x: Tensor, readout: Tensor, bias: Tensor) -> Tensor:
    """`_logits` of one token: x (B, H, K) -> (B, H)."""
    return (x * readout.to(x.dtype)).sum(-1).add_(bias)
