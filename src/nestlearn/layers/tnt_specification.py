"""TNT (2511.07343) as a listing: one token after another, no shard beside another.

What `TNT` must equal, in outputs, states and gradients. The numbers in brackets are the decisions of docs/decisions.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.layers.chunked_memory import Read
from nestlearn.layers.self_modifying_specification import (
    Memories,
    Memory,
    apply,
    gates_of,
    product,
    project,
    readout,
    specify_token,
    unit,
    write_token,
)
from nestlearn.layers.tnt import TNT, LocalMemory

State = dict[str, Tensor]


def specify_tnt(layer: TNT, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The layer's outputs and final state, token by token.

    Args:
        layer: holds the parameters and settings; its `forward` is not used.
        x: (B, T, D).
        state: as the layer's; None for a fresh context.

    Returns:
        y (B, T, D) and the state after the last token, differentiable in x, the parameters and the incoming state.
    """
    batch, tokens, _ = x.shape
    state = layer.init_state(batch, dtype=x.dtype) if state is None else state
    window, position, in_shard = (state[name] for name in ("convolution", "position", "shard_position"))
    keys = state.get("key_projection")
    memories = Memories.of(layer, batch, state)
    modules: list[LocalMemory] = list(layer.local_memories)  # type: ignore[arg-type]
    locals_ = [
        Local(
            module, batch, {n.removeprefix(f"local.{i}."): v for n, v in state.items() if n.startswith(f"local.{i}.")}
        )
        for i, module in enumerate(modules)
    ]
    outputs = []
    for t in range(tokens):
        # (18) One set of slow projections behind a short causal convolution.
        window = torch.cat([window, x[:, t : t + 1] @ layer.streams.projection.weight.T], dim=1)
        u = F.silu((window * layer.streams.convolution.weight).sum(dim=1))
        u_q, u_k, u_v, u_g = u.unflatten(-1, (4, layer.heads, -1)).unbind(dim=1)
        streams, window = (u_q, u_k, u_v, u_g), window[:, 1:]

        # (23) The global memories make q, k, v and the gates of all, from their snapshot, which is also what is read.
        q, k, v, rate, retention = project(layer, memories, streams)
        position = position + 1
        running, momentum = dict(memories.running), dict(memories.momentum)
        o = specify_token(layer, memories, streams, position)["chunk"]
        # (23) They learn from every n-th token. A chunk ends with one, so the snapshot is right.
        written = position % layer.global_stride == 0
        for name in memories.names:
            memories.running[name] = choose(written, memories.running[name], running[name])
            memories.momentum[name] = choose(written, memories.momentum[name], momentum[name])

        # (24) P_t q_t, towards the keys since the reset, this token's included.
        towards = q
        if keys is not None:
            keys = keys + product(k, k)
            towards = unit(apply(keys, q))
        in_shard = in_shard + 1
        for local in locals_:
            o = o + local.token(towards, k, v, rate, retention, in_shard)
        outputs.append(o)

        # The end of a shard: all local memories and P begin afresh.
        ended = in_shard == layer.shard_length
        in_shard = torch.where(ended, 0, in_shard)
        keys = None if keys is None else torch.where(ended[:, None, None, None], 0, keys)
        for local in locals_:
            local.reset(ended)

    after = {"position": position % layer.chunk_size, "convolution": window, **memories.named(layer)}
    after |= {"shard_position": in_shard} | ({} if keys is None else {"key_projection": keys})
    for i, local in enumerate(locals_):
        after |= {f"local.{i}.{name}": value for name, value in local.named().items()}
    return readout(layer, outputs, x), after


class Local:
    """One local memory inside a context.

    Args:
        module: its parameters and settings.
        batch: B.
        state: its part of the layer's state, without the prefix.
    """

    def __init__(self, module: LocalMemory, batch: int, state: State) -> None:
        self.module = module
        initial = Memory(*(w[:, 0].expand(batch, -1, -1, -1) for w in module.memory.initial))
        nothing = Memory(torch.zeros_like(initial.inner), torch.zeros_like(initial.outer))
        # (11) What no write changes, and what a shard starts from.
        self.fixed, self.start = (initial, nothing) if module.retain_to == "initial" else (nothing, initial)
        self.nothing = nothing
        self.running, self.snapshot = (
            Memory(state[f"inner{suffix}"][:, :, 0], state[f"outer{suffix}"][:, :, 0]) for suffix in ("", "_snapshot")
        )
        self.momentum = nothing
        if module.momentum:
            self.momentum = Memory(state["inner_momentum"][:, :, 0], state["outer_momentum"][:, :, 0])

    def token(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, retention: Tensor, position: Tensor) -> Tensor:
        """Writes one token, whose place in the shard is `position` (B,), counted from 1, and reads: (B, H, K)."""
        module, before, xi = self.module, self.running, self.fixed.plus(self.snapshot)
        fraction = module.write_scale / (module.chunk_size if module.inner_rule == "gd" else 1)  # (20)
        self.running, self.momentum = write_token(
            module,
            xi,
            before,
            self.snapshot,
            self.momentum,
            k,
            v,
            gates_of(module, rate, retention),
            module.residual_memory,
            fraction,
        )
        read: dict[Read, Memory] = {  # (2)
            "token": self.fixed.plus(self.running),
            "previous": self.fixed.plus(before),
            "chunk": xi,
        }
        self.snapshot = choose(position % module.chunk_size == 0, self.running, self.snapshot)
        o = read[module.read](q)
        return o + q if module.residual_memory else o

    def reset(self, rows: Tensor) -> None:
        """Back to the initial state in the chosen rows (B,)."""
        self.running, self.snapshot = choose(rows, self.start, self.running), choose(rows, self.start, self.snapshot)
        self.momentum = choose(rows, self.nothing, self.momentum)

    def named(self) -> State:
        """As the layer names them in its state."""
        parts = {"": self.running, "_snapshot": self.snapshot}
        parts |= {"_momentum": self.momentum} if self.module.momentum else {}
        return {
            f"{kind}{suffix}": getattr(part, kind).unsqueeze(2)
            for suffix, part in parts.items()
            for kind in ("inner", "outer")
        }


def choose(rows: Tensor, one: Memory, other: Memory) -> Memory:
    """One memory in the chosen rows (B,), the other elsewhere."""
    mask = rows[:, None, None, None]
    return Memory(torch.where(mask, one.inner, other.inner), torch.where(mask, one.outer, other.outer))
