"""TNT (2511.07343): a slow global memory beside fast local ones that are reset, so that all shards run at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.associative import Written, chunk_decay, read_chunk
from nestlearn.functional.surprise import normalize
from nestlearn.layers.chunked_memory import MemoryState, Read
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.shards import Shards, plan_shards
from nestlearn.layers.streams import Streams

State = dict[str, Tensor]

# Tokens of a long chunk that are computed at once: more cost more in products with the chunk than they save in steps.
LONGEST_SEGMENT = 64


class TNT(nn.Module):
    """Self-modifying Titans at two resolutions, whose training parallelises over a sequence.

    One global set of memories V works in long chunks over the whole context and is read at its snapshot. N local sets
    W^(i) work in short chunks of C_i and return to their own learnt initial state every S tokens (a shard). So shards
    do not depend on each other: all of them run as rows of one batch, and T tokens take S / C_i steps instead of
    T / C_i. What the reset loses beyond a shard the global memory keeps.

        q, k, v, g: one set of slow projections behind short convolutions, shared by all sets of memories
        P_t = sum of k_s k_s^T / |k_s|^2 over the tokens s of the shard up to t
        o_t = V_xi(q_t) + sum_i W^(i)_t(P_t q_t / |P_t q_t|)                                 TNT; decisions 23, 24

    Each set has the memories for key, value, rate, retention and the main one of `SelfModifyingTitans`, written by its
    rule. P_t turns a query towards the keys that a local memory has seen since its reset; it is causal at each token.

    Trained so, a model is fine-tuned for a short while with smaller local chunks (TNT's second stage): no parameter
    depends on the chunk sizes. That is `nestlearn train --from`.

    Args:
        dim: D, divisible by heads.
        heads: H.
        global_chunk_size: tokens between snapshots of the global memories.
        local_chunk_sizes: the same for each of the N local sets; divisors of shard_length.
        shard_length: S, tokens after which the local memories are reset.
        read: which memory a local read sees: "token" W_t, "previous" W_{t-1}, "chunk" the snapshot.
        conv_width: taps of the short convolutions.
        settings: of every set of memories, as in `SelfModifyingTitans` (all but its chunk sizes).

    Raises:
        ValueError: if a number is out of range or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        global_chunk_size: int = 2048,
        local_chunk_sizes: Sequence[int] = (8, 16),
        shard_length: int = 2048,
        read: Read = "token",
        conv_width: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_shards(global_chunk_size, local_chunk_sizes, shard_length)
        self.heads = heads
        self.shard_length = shard_length
        self.streams = Streams(dim, heads, streams=4, conv_width=conv_width)
        self.global_memory = MemorySet(dim, heads, chunk_size=global_chunk_size, read="chunk", **settings)
        self.local_memories = nn.ModuleList(
            MemorySet(dim, heads, chunk_size=size, read=read, **settings) for size in local_chunk_sizes
        )
        self.readout = GatedReadout(dim, heads, dim // heads)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether segments are computed again in the backward pass instead of being kept."""
        return self.global_memory.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        for memories in (self.global_memory, *self._locals()):
            memories.activation_checkpointing = on

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Named tensors of a fresh context; the memories are at least fp32 whatever `dtype`."""
        position = torch.zeros(batch_size, dtype=torch.long, device=self.global_memory.memory.inner.device)
        state = {
            "position": position,
            "convolution": self.streams.init_tail(batch_size, device=device, dtype=dtype),
            "key_projection": self._no_keys(batch_size),
            "global.position": position.clone(),
        }
        state |= _prefixed("global", self.global_memory.fresh(batch_size))
        for number, memories in enumerate(self._locals()):
            state |= _prefixed(f"local.{number}", memories.fresh(batch_size))
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
        state = self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
        if not tokens:
            return torch.zeros_like(x), dict(state)
        u, tail = self.streams(x, state["convolution"], lengths=lengths, document_starts=document_starts)
        u = u.to(state["key_projection"].dtype)
        o, wide, wide_position = self.global_memory.walk(
            u, _of(state, "global"), state["global.position"], lengths=lengths, document_starts=document_starts
        )
        shards = plan_shards(
            state["position"],
            tokens,
            shard_length=self.shard_length,
            lengths=lengths,
            document_starts=document_starts,
        )
        after = {"position": shards.after, "convolution": tail, "global.position": wide_position}
        after |= _prefixed("global", wide)
        with torch.autocast(x.device.type, enabled=False):
            pieces, seen = self._project_queries(shards.spread(u), state["key_projection"], shards)
        after["key_projection"] = seen
        for number, memories in enumerate(self._locals()):
            own = _of(state, f"local.{number}")
            read, own = memories.walk_shards(pieces, own, shards)
            o = o + shards.collect(read, tokens)
            after |= _prefixed(f"local.{number}", own)
        y = self.readout(o.to(x.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2), x)
        return y, after

    def _project_queries(self, u: Tensor, seen: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
        """The streams of the pieces (R, W, 4 D) with P_t q_t in place of q_t, and P (B, H, K, K) after each row."""
        queries, keys = normalize(self.streams.split(u)[:2])
        if shards.lengths is not None:
            held = torch.arange(shards.width, device=u.device) < shards.lengths[:, None]
            keys = keys * held[:, None, :, None]
        none = self._no_keys(1)
        queries, total = project_on_keys(queries, keys, torch.cat([seen, none]).index_select(0, shards.continues))
        width = queries.shape[1] * queries.shape[3]
        pieces = torch.cat([normalize(queries).transpose(1, 2).flatten(2), u[..., width:]], dim=-1)
        seen = total.index_select(0, shards.last)
        return pieces, torch.where(shards.ended[:, None, None, None], none, seen)

    def _no_keys(self, batch_size: int) -> Tensor:
        inner = self.global_memory.memory.initial.inner
        return inner.new_zeros(batch_size, self.heads, inner.shape[-1], inner.shape[-1])

    def _locals(self) -> list[MemorySet]:
        return list(self.local_memories)  # type: ignore[arg-type]


class MemorySet(SelfModifyingTitans):
    """The memories and gates of `SelfModifyingTitans` alone: their streams and their readout are the caller's, who
    calls `walk` or `walk_shards` in place of `forward`.

    Args:
        dim, heads, settings: as there.
        chunk_size: of all memories of the set.
    """

    def __init__(self, dim: int, heads: int, *, chunk_size: int, **settings: Any) -> None:
        super().__init__(dim, heads, chunk_size=chunk_size, **settings)
        self.streams = _SharedStreams(heads)  # type: ignore[assignment]
        del self.readout
        self.segment_size = max(n for n in range(1, min(chunk_size, LONGEST_SEGMENT) + 1) if chunk_size % n == 0)
        if self.detach_every is not None:  # the walk counts segments
            self.detach_every *= chunk_size // self.segment_size

    def fresh(self, batch_size: int) -> MemoryState:
        """The memories at the start of a context."""
        return self._fresh(batch_size)

    def walk_shards(self, u: Tensor, memory: MemoryState, shards: Shards) -> tuple[Tensor, MemoryState]:
        """All pieces at once: streams u (R, W, 4 D) and the rows' memories (B, ...) -> what the heads read (R, W, D)
        and each row's memories after its last token, which are fresh again where a shard has ended."""
        fresh = self._fresh(1)
        start = _together(memory, fresh, shards.continues)
        o, memory, _ = self.walk(u, start, shards.position % self.chunk_size, lengths=shards.lengths)
        count = len(shards.position)
        ending = torch.where(shards.ended, count, shards.last)
        return o, _together(memory, fresh, ending)


class _SharedStreams(nn.Module):
    """What is left of `Streams` where somebody else computes them: four, and where each lies."""

    count = 4

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def split(self, u: Tensor) -> Tensor:
        """(B, T, 4 D) -> (4, B, H, T, K)."""
        return u.unflatten(-1, (self.count, self.heads, -1)).permute(2, 0, 3, 1, 4)


def project_on_keys(
    queries: Tensor, keys: Tensor, memory: Tensor, *, chunk_size: int = LONGEST_SEGMENT
) -> tuple[Tensor, Tensor]:
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


def check_shards(global_chunk_size: int, local_chunk_sizes: Sequence[int], shard_length: int) -> None:
    """Refuses sizes that TNT has no use for.

    Raises:
        ValueError: naming the one that is off, and sizes that fit.
    """
    for name, value in (("global_chunk_size", global_chunk_size), ("shard_length", shard_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
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


def _together(state: MemoryState, fresh: MemoryState, rows: Tensor) -> MemoryState:
    """The chosen rows (R,) of a state (B, ...), where B stands for the fresh state (1, ...)."""
    new = fresh.named()
    return MemoryState.of(
        {name: torch.cat([value, new[name]]).index_select(0, rows) for name, value in state.named().items()}
    )


def _prefixed(prefix: str, memory: MemoryState) -> State:
    return {f"{prefix}.{name}": value for name, value in memory.named().items()}


def _of(state: State, prefix: str) -> MemoryState:
    own = {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
    return MemoryState.of(own)
