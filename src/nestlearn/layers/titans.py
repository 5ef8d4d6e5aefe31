"""Titans (2501.00663): one two-layer memory with static projections, retention and momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    check_gates,
    decode_main,
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
from nestlearn.memory.mlp import InnerRule, MLPMemory, write_mlp_chunk
from nestlearn.memory.token import write_mlp_token_


class Titans(ChunkedMemoryLayer):
    """The neural memory of Titans: W1 silu(W2 k) learns the map from k to v by gradient descent with momentum.

        q, k, v = norm(u_q), norm(u_k), norm(u_v);  write gate, momentum and retention linear in x       Eq. 76
        error = M(k) - v at the snapshot;  S_t = momentum S_{t-1} - write error a^T;  M_t = alpha M_{t-1} + S_t

    It differs from self-modifying Titans in that the projections do not learn in context and the targets are given.
    Gates, bound, chunks and reads are the same, so that the two compare fairly.

    Args: as `SelfModifyingTitans`; by default the inner rule is "gd", with momentum, as in the Titans paper.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        inner_rule: InnerRule = "gd",
        momentum: bool = True,
        read: Read = "token",
        chunk_size: int = 64,
        retain_to: RetainTo = "initial",
        write_scale: float = 1.0,
        write_bound: float | None = 4.0,
        memory_hidden: int | None = None,
        initial_gate: float = 0.5,
        conv_width: int = 4,
        detach_every: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_gates(heads, initial_gate, None)
        head_dim = dim // heads
        super().__init__(
            heads=heads,
            streams=Streams(dim, heads, streams=3, conv_width=conv_width),
            memory=MLPMemory(heads, head_dim, hidden=memory_hidden),
            readout=GatedReadout(dim, heads, head_dim),
            inner_rule=inner_rule,
            momentum=momentum,
            read=read,
            retain_to=retain_to,
            chunk_size=chunk_size,
            projection_chunk_size=chunk_size,
            write_scale=write_scale,
            projection_write_scale=write_scale,
            write_bound=write_bound,
            detach_every=detach_every,
            backend=backend,
        )
        # One linear map for the logits of all gates: write, retention, and momentum if it is on.
        self.gates = nn.Linear(dim, heads * (3 if momentum else 2), bias=False)
        self.gate_bias = nn.Parameter(spread_gates(heads, initial_gate, None, LARGEST_GATE))
        self.retain_bias = nn.Parameter(spread_retention(heads))
        if momentum:
            self.momentum_bias = nn.Parameter(torch.zeros(heads))

    def _inputs(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u, tail = self.streams(x, tail, lengths=lengths, document_starts=document_starts)
        return torch.cat([u, self.gates(x)], dim=-1), tail

    def _walk_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, GateReadouts | None]:
        width = inputs.shape[-1] - self.gates.out_features
        logits = inputs[..., width:].unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)  # (gates, B, H, T)
        biases: list[Tensor] = [self.gate_bias, self.retain_bias, *([self.momentum_bias] if self.momentum else [])]
        logits = logits + torch.stack(biases)[:, None, :, None]
        return normalize(self.streams.split(inputs[..., :width])), logits, None

    def _walk_options(self) -> dict[str, Any]:
        return {
            "largest_gate": LARGEST_GATE,
            "negative_eigenvalues": False,
            "retention": True,
            "own_targets": False,
            "residual_memory": False,
            "adaptive_query": False,
        }

    def _segment(self, inputs: Tensor, state: MemoryState, segment: Segment) -> tuple[Tensor, MemoryState]:
        width = inputs.shape[-1] - self.gates.out_features
        queries, keys, values = normalize(self.streams.split(inputs[..., :width]))
        logits = inputs[..., width:].unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)  # (gates, B, H, C)
        gates = write_gates(
            logits[0] + self.gate_bias[:, None],
            logits[1] + self.retain_bias[:, None],
            logits[2] + self.momentum_bias[:, None] if self.momentum else None,
            segment.active,
            largest_gate=LARGEST_GATE,
        )
        base = base_weights(self.memory, self.retain_to)
        whole = state.snapshot.add(base)
        z = (keys @ whole.inner[:, :, 0].mT).unsqueeze(2)
        hidden = F.silu(z)
        error = hidden @ whole.outer.mT - values.unsqueeze(2)
        chunk = write_mlp_chunk(
            state.running,
            state.snapshot,
            state.momentum,
            whole.outer,
            keys,
            z,
            hidden,
            error,
            gates,
            rule=self.inner_rule,
            bound=self.write_bound,
            scale=self._scale(keys),
        )
        out = read_main(chunk, base, state, keys, queries, gates, self.read)
        return out, self._after(state, chunk, segment)

    def _decode_inputs(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        u, tail = self.streams.decode_step(x, tail)
        return torch.cat([u, self.gates(x)], dim=-1), tail

    def _token(self, inputs: Tensor, state: MemoryState) -> Tensor:
        # The same for one token; N = B H rows.
        running = state.running
        base = base_weights(self.memory, self.retain_to)
        whole = state.snapshot if base is None else add_base(state.snapshot, self.memory)
        batch, heads, _, width, dim = running.inner.shape
        rows = batch * heads
        inner, outer = whole.inner.view(rows, width, dim), whole.outer.view(rows, dim, width)
        u = inputs[:, : -self.gates.out_features].view(batch, 3, heads, dim)
        query, key, value = (x.reshape(rows, 1, dim) for x in normalize_token(u).unbind(1))
        logits = inputs[:, -self.gates.out_features :].view(batch, -1, heads)
        gates = token_gates(
            logits[:, 0] + self.gate_bias,
            logits[:, 1] + self.retain_bias,
            logits[:, 2] + self.momentum_bias if self.momentum else None,
            largest_gate=LARGEST_GATE,
        )
        z = torch.bmm(key, inner.mT)
        hidden = F.silu(z)
        surprise = torch.baddbmm(value, hidden, outer.mT, alpha=-1)
        if self.read == "chunk":
            out = decode_main(None, whole, query)
        elif self.read == "previous":
            out = decode_main(base, running, query)
        write_mlp_token_(
            running,
            state.snapshot,
            state.momentum,
            outer,
            key,
            z,
            hidden,
            surprise,
            gates,
            rule=self.inner_rule,
            bound=self.write_bound,
            scales=self._scales(),
        )
        if self.read == "token":
            out = decode_main(base, running, query)
        return out.view(batch, heads, dim)
