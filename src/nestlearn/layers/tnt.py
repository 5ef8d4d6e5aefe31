"""TNT (2511.07343): a slow global memory beside fast local ones that are reset, so that all shards run at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.functional.associative import Written, chunk_decay, read_chunk
from nestlearn.functional.surprise import normalize
from nestlearn.layers.chunked_memory import (
    ChunkedMemory,
    MemoryState,
    Read,
    base_weights,
    read_main,
    write_gates,
)
from nestlearn.layers.compiled_walk import GateReadouts, compiled_read
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans, gate_logits
from nestlearn.layers.shards import Shards, plan_shards
from nestlearn.layers.timeline import Segment
from nestlearn.memory.mlp import MLPMemory, MLPWeights, last_memory, read_mlp, write_mlp_chunk

State = dict[str, Tensor]
Walk = Callable[[Tensor, MemoryState, tuple[Segment, ...]], tuple[Tensor, MemoryState]]

# Tokens of a long chunk that are computed at once: more cost more in products with the chunk than they save in steps.
LONGEST_SEGMENT = 64


class TNT(SelfModifyingTitans):
    """Self-modifying Titans at two resolutions, whose training parallelises over a sequence.

    The global memories are a whole self-modifying Titans with long chunks. Its projections' memories make q, k, v, the
    learning rate and the retention of every token, and its main memory V keeps the whole context. N local memories W^i
    learn the same pairs in short chunks of C_i tokens and return to their own learnt initial state every S tokens (a
    shard). So shards do not depend on each other: all of them run as rows of one batch, and T tokens take S / C_i steps
    instead of T / C_i. What a reset loses V still knows.

        P_t = sum of k_s k_s^T over the tokens s of the shard up to t, |k_s| = 1
        o_t = V_xi(q_t) + sum_i W^i_t(P_t q_t / |P_t q_t|)                              TNT; decisions 23 and 24

    V is read at its snapshot xi. A local memory writes W(k) - W(v) - v by the rule of `SelfModifyingTitans`, with gates
    of its own. P_t turns a query towards the keys that a local memory has seen since its reset; unless
    `project_queries`, q_t takes its place. The global memories are written with every n-th token only, while all tokens
    read them: five memories are most of the work, and little is lost where the local ones write every token.

    A model trained so is fine-tuned for a short while with smaller local chunks (TNT's second stage, `nestlearn train
    --from`): no parameter depends on the chunk sizes.

    Args:
        dim: D, divisible by heads.
        heads: H.
        global_chunk_size: tokens between snapshots of the global memories.
        local_chunk_sizes: C_i, one for each local memory; divisors of shard_length.
        shard_length: S, tokens after which the local memories are reset.
        project_queries: whether local memories are read with P_t q_t / |P_t q_t|; otherwise with q_t.
        global_stride: n; the global memories learn from the last one of every n tokens. A divisor of global_chunk_size.
        read: which state of W^i token t reads: "token" W_t, "previous" W_{t-1}, "chunk" the snapshot.
        detach_every: cut the gradient through the writes every so many chunks of a memory, counted in each call.
        settings: of all memories, as in `SelfModifyingTitans` (not its chunk sizes, nor the backend "triton").

    Raises:
        ValueError: if a number is out of range or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        global_chunk_size: int = 2048,
        local_chunk_sizes: Sequence[int] = (16,),
        shard_length: int = 2048,
        global_stride: int = 16,
        project_queries: bool = False,
        read: Read = "token",
        detach_every: int | None = None,
        **settings: Any,
    ) -> None:
        check_shards(global_chunk_size, local_chunk_sizes, shard_length, global_stride)
        if settings.get("backend") == "triton":
            raise ValueError(
                'backend: the Triton kernels know self-modifying Titans alone, not TNT; "auto", "cpp" and "torch" fit'
            )
        super().__init__(dim, heads, chunk_size=global_chunk_size, read="chunk", detach_every=detach_every, **settings)
        self.shard_length = shard_length
        self.global_stride = global_stride
        self.project_queries = project_queries
        self._global_detach = detach_every
        self.local_memories = nn.ModuleList(LocalMemory(self, chunk_size=size, read=read) for size in local_chunk_sizes)
        for memory, stride in ((self, global_stride), *((local, 1) for local in self._locals())):
            memory.segment_size = stride * segment_size(memory.chunk_size // stride)
            if detach_every is not None:  # the walk counts segments; with a stride it is called for a chunk at a time
                memory.detach_every = detach_every * memory.chunk_size // memory.segment_size

    @property
    def activation_checkpointing(self) -> bool:
        """Whether segments are computed again in the backward pass instead of being kept."""
        return self._recompute

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self._recompute = on
        for memory in getattr(self, "local_memories", ()):
            memory.activation_checkpointing = on

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Named tensors of a fresh context; the memories are at least fp32 whatever `dtype`."""
        state = super().init_state(batch_size, device=device, dtype=dtype)
        state["shard_position"] = state["position"].clone()
        if self.project_queries:
            state["key_projection"] = self._no_keys(batch_size)
        for number, memory in enumerate(self._locals()):
            state |= _prefixed(number, memory.fresh(batch_size))
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, T, D) -> (B, T, D) and the state after each row's last token.

        Args:
            x: inputs.
            state: from `init_state` or an earlier call, which may end anywhere in a shard or chunk; None for a fresh
                context. It is not changed.
            lengths: (B,) valid tokens of right-padded rows.
            document_starts: (B, T) bool, tokens before which the state is reset.
        """
        batch, tokens, _ = x.shape
        tail = None if state is None else state["convolution"]
        state = self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
        if not x.numel():
            return torch.zeros_like(x), dict(state)
        cuts = {"lengths": lengths, "document_starts": document_starts}
        u, tail = self.streams.by_heads(x, tail, **cuts)
        packed, memory, position = self.walk(u, MemoryState.of(state), state["position"], **cuts)
        after = {"position": position, "convolution": tail, **memory.named()}
        shards = plan_shards(state["shard_position"], tokens, shard_length=self.shard_length, **cuts)
        with torch.autocast(x.device.type, enabled=False):
            if self.global_stride == 1:
                packed = self._pack(*packed.unflatten(-1, (self.heads, 6, -1)).permute(3, 0, 2, 1, 4).unbind(0))
            width = self.heads * self.memory.outer.shape[-2]
            o, pairs, *logits = packed.split([width, 3 * width, *(local.gates for local in self._locals())], dim=-1)
            pairs = shards.spread(pairs)
            if self.project_queries:
                pairs, after["key_projection"] = self._project_queries(pairs, state["key_projection"], shards)
            for number, (local, own) in enumerate(zip(self._locals(), logits, strict=True)):
                inputs = torch.cat([pairs, shards.spread(own)], dim=-1)
                read, memory = local.walk_shards(inputs, _of(state, number), shards)
                o = o + shards.collect(read, tokens)
                after |= _prefixed(number, memory)
        after["shard_position"] = shards.after
        return self.readout(o.to(x.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2), x), after

    def _walk_options(self) -> dict[str, Any]:
        return super()._walk_options() | {"made": self.global_stride == 1}

    def _scales(self) -> tuple[float, ...]:
        scales = super()._scales()
        if self.inner_rule == "gd":  # the mean over the tokens of a chunk that are written
            return tuple(scale * self.global_stride for scale in scales)
        return scales

    def _walk(self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]) -> tuple[Tensor, MemoryState]:
        return self._stride(super()._walk, inputs, memory, segments)

    def _compiled_walk(
        self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, MemoryState]:
        return self._stride(super()._compiled_walk, inputs, memory, segments)

    def _stride(
        self, walk: Walk, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, MemoryState]:
        """A walk over all tokens that writes every `global_stride`-th: a chunk is read at once and then written."""
        if self.global_stride == 1:
            return walk(inputs, memory, segments)
        if isinstance(segments[0].end, Tensor):  # one token a row, some of them to be written
            (only,) = segments
            written = (segments[0].end % self.global_stride == 0)[:, None]
            active = written if only.active is None else only.active & written
            o = self._sense(inputs, memory)
            _, memory = walk(inputs, memory, (only._replace(active=active),))
            return o, memory
        outputs = []
        parts = chunks_of(segments, self.chunk_size)
        pieces = inputs.split([part[-1].stop - part[0].start for part in parts], dim=1)
        for number, (part, read) in enumerate(zip(parts, pieces, strict=True), start=1):
            if part[0].reset is not None:
                memory = memory.reset(part[0].reset, self._fresh(len(inputs)))
            outputs.append(self._sense(read, memory))
            places, kept = thin(part, self.global_stride)
            if kept:
                _, memory = walk(read[:, places], memory, kept)
            if self._global_detach is not None and number % self._global_detach == 0:
                memory = memory.detach()
        return torch.cat(outputs, dim=1), memory

    def _sense(self, inputs: Tensor, memory: MemoryState) -> Tensor:
        """What all memories make of tokens that share a snapshot, as `_pack` has it."""
        if self._form(inputs.device) == "cpp":
            streams = self.streams.split(inputs)
            out, made = compiled_read(self._plan(()), streams, self.memory.maps, memory.snapshot)
            return self._pack(out, *made)

        def read(inputs: Tensor, snapshot: MLPWeights) -> Tensor:
            whole = snapshot.add(base_weights(self.memory, self.retain_to))
            made = self._project(inputs, whole)
            out = read_mlp(MLPWeights(last_memory(whole.inner), last_memory(whole.outer)), made[0])
            if self.residual_memory:
                out = out + made[0]
            return self._pack(out, *made)

        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(read, inputs, memory.snapshot, use_reentrant=False)
        return read(inputs, memory.snapshot)

    def _pack(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, retention: Tensor) -> Tensor:
        """What is read, then q, k and v of each head, then the logits of each local memory, in one copy.

        All are (B, H, C, K); returns (B, C, 4 H K + gates).
        """
        pairs = zip(*(x.unbind(1) for x in (q, k, v)), strict=True)
        logits = [local.logits(rate, retention) for local in self._locals()]
        return torch.cat([*out.unbind(1), *(x for head in pairs for x in head), *logits], dim=-1)

    def _segment(self, inputs: Tensor, state: MemoryState, segment: Segment) -> tuple[Tensor, MemoryState]:
        """As there, with the projections beside what is read: (B, H, C, 6 K)."""
        whole = state.snapshot.add(base_weights(self.memory, self.retain_to))
        made = self._project(inputs, whole)
        out, after = self._learn(made, whole, state, segment)
        return torch.cat([out, *made], dim=-1), after

    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x (B, 1, D) by `forward`, without gradients."""
        with torch.no_grad():
            return self(x, state)

    def _project_queries(self, pairs: Tensor, seen: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
        """P_t q_t in place of q_t in the pieces (R, W, H * 3 K), and P (B, H, K, K) after each row's last token."""
        queries, keys, values = pairs.unflatten(-1, (self.heads, 3, -1)).unbind(3)
        if shards.lengths is not None:
            held = torch.arange(shards.width, device=keys.device) < shards.lengths[:, None]
            keys = keys * held[:, :, None, None]
        none = self._no_keys(1)
        start = torch.cat([seen, none]).index_select(0, shards.continues)
        projected, total = project_on_keys(queries.transpose(1, 2), keys.transpose(1, 2), start)
        after = torch.cat([total, none]).index_select(0, shards.final)
        return torch.stack([normalize(projected.transpose(1, 2)), keys, values], dim=3).flatten(2), after

    def _no_keys(self, batch_size: int) -> Tensor:
        inner = self.memory.initial.inner
        return inner.new_zeros(batch_size, self.heads, inner.shape[-1], inner.shape[-1])

    def _locals(self) -> list[LocalMemory]:
        return list(self.local_memories)  # type: ignore[arg-type]


class LocalMemory(ChunkedMemory):
    """The main memory of self-modifying Titans, whose keys, values and gates somebody else makes.

    Args:
        like: whose settings it has, and whose gates it starts with.
        chunk_size: tokens between its snapshots.
        read: which state a token reads.
    """

    def __init__(self, like: SelfModifyingTitans, *, chunk_size: int, read: Read) -> None:
        hidden, width = like.memory.hidden[-1], like.memory.inner.shape[-1]
        super().__init__(
            heads=like.heads,
            memory=MLPMemory(like.heads, width, hidden=hidden, empty=like.memory.empty),
            inner_rule=like.inner_rule,
            momentum=like.momentum,
            read=read,
            retain_to=like.retain_to,
            chunk_size=chunk_size,
            projection_chunk_size=chunk_size,
            write_scale=like.write_scale,
            projection_write_scale=like.projection_write_scale,
            write_bound=like.write_bound,
            detach_every=like.detach_every,
            backend=like.backend,
        )
        self.retention = like.retention
        self.negative_eigenvalues = like.negative_eigenvalues
        self.residual_memory = like.residual_memory
        self.largest_gate = like.largest_gate
        kinds = ("gate", *(["retain"] if like.retention else []), *(["momentum"] if like.momentum else []))
        self.gates = len(kinds) * like.heads
        for kind in kinds:
            self.register_parameter(f"{kind}_readout", nn.Parameter(torch.randn(like.heads, width) * width**-0.5))
            self.register_parameter(f"{kind}_bias", nn.Parameter(getattr(like, f"{kind}_bias").detach().clone()))

    def fresh(self, batch_size: int) -> MemoryState:
        """The memory at the start of a shard."""
        return self._fresh(batch_size)

    def logits(self, rate: Tensor, retention: Tensor) -> Tensor:
        """Of the gates, side by side (B, C, gates * H), from what the global memories made (B, H, C, K)."""
        sources = {"gate": rate, "retain": retention, "momentum": rate}
        found = [
            gate_logits(source, getattr(self, f"{kind}_readout"), getattr(self, f"{kind}_bias"))
            for kind, source in sources.items()
            if hasattr(self, f"{kind}_readout")
        ]
        return torch.cat(found, dim=1).mT

    def walk_shards(self, inputs: Tensor, memory: MemoryState, shards: Shards) -> tuple[Tensor, MemoryState]:
        """All pieces at once.

        Args:
            inputs: q, k, v of each head, then logits, of the pieces: (R, W, 3 D + gates * H).
            memory: of the rows (B, ...), before their first token.
            shards: the pieces.

        Returns:
            what the heads read (R, W, D), and each row's memory after its last token, fresh again where a shard ended.
        """
        fresh = self._fresh(1)
        start = _choose(memory, fresh, shards.continues)
        o, memory, _ = self.walk(inputs, start, shards.position % self.chunk_size, lengths=shards.lengths)
        return o, _choose(memory, fresh, shards.final)

    def _walk_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor, GateReadouts | None]:
        """q, k, v (3, B, H, T, K) and logits (gates, B, H, T) of inputs (B, T, ...)."""
        width = 3 * self.heads * self.memory.outer.shape[-2]
        pairs, logits = inputs.split([width, self.gates], dim=-1)
        pairs = pairs.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return pairs, logits.unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1), None

    def _walk_options(self) -> dict[str, Any]:
        return {
            "largest_gate": self.largest_gate,
            "negative_eigenvalues": self.negative_eigenvalues,
            "retention": self.retention,
            "own_targets": True,
            "residual_memory": self.residual_memory,
            "adaptive_query": False,
        }

    def _segment(self, inputs: Tensor, state: MemoryState, segment: Segment) -> tuple[Tensor, MemoryState]:
        base = base_weights(self.memory, self.retain_to)
        whole = state.snapshot.add(base)
        (queries, keys, values), logits, _ = self._walk_inputs(inputs)
        gates = write_gates(
            logits[0],
            logits[1] if self.retention else None,
            logits[-1] if self.momentum else None,
            segment.active,
            largest_gate=self.largest_gate,
        )

        # Eq. 84, 85 for the main memory: its target is v + W(v).
        z_k, z_v = (torch.cat([keys, values], dim=2) @ last_memory(whole.inner).mT).chunk(2, dim=2)
        hidden = F.silu(z_k)
        error = (hidden - F.silu(z_v)) @ last_memory(whole.outer).mT - values
        if self.residual_memory:
            error = error + keys
        chunk = write_mlp_chunk(
            state.running,
            state.snapshot,
            state.momentum,
            whole.outer,
            keys,
            z_k.unsqueeze(2),
            hidden.unsqueeze(2),
            error.unsqueeze(2),
            gates,
            rule=self.inner_rule,
            negative_eigenvalues=self.negative_eigenvalues,
            bound=self.write_bound,
            scale=self._scale(keys),
        )
        out = read_main(chunk, base, state, keys, queries, gates, self.read)
        return (out + queries if self.residual_memory else out), self._after(state, chunk, segment)


def project_on_keys(queries: Tensor, keys: Tensor, memory: Tensor, *, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    """P_t q_t with P_t = P_0 + sum_{s <= t} k_s k_s^T: linear attention (Eq. 14-15) whose values are its keys.

    Nothing is erased, so what each chunk starts from is a running sum, and all chunks are read at once.

    Args:
        queries: (..., T, K).
        keys: (..., T, K), of norm 1, or zero where there is no token.
        memory: P_0 (..., K, K).
        chunk_size: tokens a chunk; it changes the speed, not the result.

    Returns:
        (..., T, K), and P_T (..., K, K).
    """
    tokens = keys.shape[-2]
    chunk = max(1, min(chunk_size, tokens))
    chunks = -(-tokens // chunk)
    q, k = (F.pad(x, (0, 0, 0, chunks * chunk - tokens)).unflatten(-2, (chunks, chunk)) for x in (queries, keys))
    total = torch.cat([memory.unsqueeze(-3), k.mT @ k], dim=-3).cumsum(-3)
    decay = chunk_decay(keys.new_zeros(chunk))
    projected = read_chunk(total[..., :-1, :, :], q, k, Written(k, None), decay)
    return projected.flatten(-3, -2)[..., :tokens, :], total[..., -1, :, :]


def chunks_of(segments: Sequence[Segment], chunk_size: int) -> list[tuple[Segment, ...]]:
    """The segments of each chunk, whose tokens share a snapshot and whose first one alone may reset."""
    parts: list[list[Segment]] = [[]]
    for segment in segments:
        parts[-1].append(segment)
        if segment.end % chunk_size == 0:
            parts.append([])
    return [tuple(part) for part in parts if part]


def thin(segments: Sequence[Segment], stride: int) -> tuple[slice, tuple[Segment, ...]]:
    """Every stride-th place of the grid, in segments of one chunk: counted from its first one, and segments of these
    places alone, without resets. Their ends stay where they were, so that chunks are completed as before."""
    kept: list[Segment] = []
    firsts = []
    for segment in segments:
        assert isinstance(segment.end, int)
        before = segment.end - (segment.stop - segment.start)
        first, count = -(before + 1) % stride, segment.end // stride - before // stride
        firsts.append(first)
        if count:
            start = kept[-1].stop if kept else 0
            active = None if segment.active is None else segment.active[:, first::stride]
            kept.append(Segment(start, start + count, segment.end, active, None, segment.filled))
    return slice(firsts[0], None, stride), tuple(kept)


def check_shards(
    global_chunk_size: int, local_chunk_sizes: Sequence[int], shard_length: int, global_stride: int = 1
) -> None:
    """Refuses sizes that TNT has no use for.

    Raises:
        ValueError: naming the one that is off, and sizes that fit.
    """
    numbers = {"global_chunk_size": global_chunk_size, "shard_length": shard_length, "global_stride": global_stride}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if global_chunk_size % global_stride:
        raise ValueError(
            f"global_stride: expected a divisor of global_chunk_size, got {global_stride} and {global_chunk_size}; for "
            f"example {math.gcd(global_stride, global_chunk_size)}"
        )
    if not local_chunk_sizes:
        raise ValueError("local_chunk_sizes: expected one size for each local memory, for example (8, 16); got none")
    for size in local_chunk_sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"local_chunk_sizes: expected whole numbers of at least 1, got {size!r}")
        if shard_length % size:
            raise ValueError(
                f"local_chunk_sizes: expected divisors of shard_length, got {size} and {shard_length}; a "
                f"shard_length of {-(-shard_length // size) * size} would hold whole chunks of {size}"
            )


def segment_size(chunk_size: int) -> int:
    """How many tokens of a chunk are computed at once."""
    return max(n for n in range(1, min(chunk_size, LONGEST_SEGMENT) + 1) if chunk_size % n == 0)


def _choose(state: MemoryState, fresh: MemoryState, rows: Tensor) -> MemoryState:
    """The chosen rows (R,) of a state (B, ...), where B stands for the fresh state (1, ...)."""
    new = fresh.named()
    return MemoryState.of(
        {name: torch.cat([value, new[name]]).index_select(0, rows) for name, value in state.named().items()}
    )


def _prefixed(number: int, memory: MemoryState) -> State:
    return {f"local.{number}.{name}": value for name, value in memory.named().items()}


def _of(state: State, number: int) -> MemoryState:
    prefix = f"local.{number}."
    return MemoryState.of({n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)})
