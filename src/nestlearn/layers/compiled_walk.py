"""The walk of a layer's memories over a sequence by the compiled code of `nestlearn.functional.kernels.native`.

What is kept for the backward pass is the memories at the start of each segment; the rest of a segment is computed again
there. The walk in PyTorch operations, `ChunkedMemoryLayer._walk`, is the specification, and the one to differentiate
twice.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestlearn.functional.kernels.native import Walk, run_walk
from nestlearn.layers.timeline import Segment
from nestlearn.memory.mlp import InnerRule, MLPWeights

RULES = ("dgd", "gd", "delta")
READS = ("token", "previous", "chunk")

Maps = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# How many tokens are read at once where nothing is written.
READ_TOGETHER = 128

# With fewer tokens than this in all rows and heads it takes longer to wake another thread than to do its work.
FEW_TOKENS = 64

# Places among the tensors of a walk: streams, logits, read-outs, initial memories, states.
READOUTS, BASE, STATES = slice(2, 8), slice(8, 12), slice(12, 18)


@dataclass(frozen=True, kw_only=True)
class WalkPlan:
    """All of a walk that is no tensor to differentiate; names as in `SelfModifyingTitans` unless said.

    Attributes:
        segments: of the timeline, in order, at least one.
        hidden: width of each memory's hidden layer; narrower ones are padded with zeros to the widest.
        narrow: (first, stop) of the memories whose initial weights lie apart, as `MLPMemory.narrow`.
        scales: the fraction of its error that each memory writes.
        bound: of written errors, or None.
        own_targets: whether memory i's target is its own M_i(v) (Eq. 84), or v itself (Titans).
        to_initial: whether memories decay to the base weights; otherwise to zero, and the base is where they start.
        made: whether what the projections' memories make of each token is wanted too.
        reads_only: whether all tokens read the snapshot and nothing is written, as `compiled_read` wants it.
    """

    segments: tuple[Segment, ...]
    chunk_size: int
    projection_chunk_size: int
    inner_rule: InnerRule
    read: str
    hidden: tuple[int, ...]
    narrow: tuple[int, int]
    scales: tuple[float, ...]
    bound: float | None
    largest_gate: float
    negative_eigenvalues: bool
    own_targets: bool
    residual_memory: bool
    adaptive_query: bool
    to_initial: bool
    retention: bool
    detach_every: int | None
    made: bool = False
    reads_only: bool = False


class GateReadouts(NamedTuple):
    """Slow read-outs (H, K) and biases (H,) of the write gate, the retention and the momentum; None where off."""

    gate: Tensor
    gate_bias: Tensor
    retain: Tensor | None
    retain_bias: Tensor | None
    momentum: Tensor | None
    momentum_bias: Tensor | None


class WalkState(NamedTuple):
    """The memories around a walk, each (B, H, M, ...), as `nestlearn.layers.chunked_memory.MemoryState`."""

    running: MLPWeights
    snapshot: MLPWeights
    momentum: MLPWeights | None


def compiled_walk(
    plan: WalkPlan,
    streams: Tensor,
    logits: Tensor | None,
    readouts: GateReadouts | None,
    base: Maps,
    state: WalkState,
) -> tuple[Tensor, WalkState, Tensor | None]:
    """Walks the memories over a sequence on the CPU, in fp32 or fp64; differentiable once.

    Args:
        plan: see there.
        streams: (S, B, H, T, K): q, k, v and the gates' input (self-modifying), or q, k, v normalised.
        logits: (1 to 3, B, H, T) of the gates that are on, where they are given, otherwise None.
        readouts: of the gates where memories make their logits, otherwise None.
        base: the initial memories, as `MLPMemory.maps`.
        state: before the first token.

    Returns:
        outputs of the heads (B, H, T, V), the state after the last token, and if they are wanted q, k, v, rate and
        retention as the projections' memories make them, (5, B, H, T, K).
    """
    given = [streams, logits, *(readouts or (None,) * 6), *base]
    out, made, *after = _CompiledWalk.apply(
        plan, *given, *state.running, *state.snapshot, *(state.momentum or (None, None))
    )
    running = MLPWeights(after[0], after[1])
    last = plan.segments[-1]
    together = last.completes(plan.chunk_size) is True and last.completes(plan.projection_chunk_size) is True
    snapshot = running if together else MLPWeights(after[2], after[3])
    momentum = None if state.momentum is None else MLPWeights(after[4], after[5])
    return out, WalkState(running, snapshot, momentum), made


def compiled_read(plan: WalkPlan, streams: Tensor, base: Maps, snapshot: MLPWeights) -> tuple[Tensor, Tensor]:
    """What all memories make of tokens that share a snapshot, on the CPU, in fp32 or fp64; differentiable once.

    Args:
        plan: of which nothing that concerns writes matters, nor the segments.
        streams: (4, B, H, T, K): q, k, v and the gates' input.
        base: the initial memories, as `MLPMemory.maps`.
        snapshot: (B, H, M, ...).

    Returns:
        what the main memory says to q (B, H, T, V), and q, k, v, rate and retention (5, B, H, T, K).
    """
    tokens = streams.shape[3]
    bounds = [*range(0, tokens, READ_TOGETHER), tokens]
    segments = tuple(Segment(start, stop, stop, None, None, None) for start, stop in pairwise(bounds))
    plan = dataclasses.replace(plan, segments=segments, read="chunk", reads_only=True)
    out, made = _CompiledRead.apply(plan, streams, *base, *snapshot)
    return out, made


class _CompiledRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: WalkPlan, streams: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = _read_arguments([t if t is None else t.contiguous() for t in (streams, *rest)])
        base_outer = tensors[9]
        assert base_outer is not None
        out = streams.new_empty(*streams.shape[1:4], base_outer.shape[-2])
        made = streams.new_empty(5, *streams.shape[1:])
        walk, alive = _arguments(plan, tensors)
        walk.out, walk.made = out.data_ptr(), made.data_ptr()
        run_walk(walk, backward=False)
        del alive
        ctx.plan = plan
        ctx.present = [t is not None for t in tensors]
        ctx.save_for_backward(*(t for t in tensors if t is not None))
        return out, made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _refuse_twice()
        d_out, d_made = (g.contiguous() for g in gradients)
        iterator = iter(ctx.saved_tensors)
        tensors = [next(iterator) if present else None for present in ctx.present]
        streams = tensors[0]
        assert streams is not None
        walk, alive = _arguments(ctx.plan, tensors)
        d_streams = torch.empty_like(streams)
        d_base = _by_row(tensors[BASE], streams.shape[1])
        # The gradient of the running memories, of which there are none, is zero.
        d_snapshot = [None if w is None else torch.zeros_like(w) for w in tensors[STATES]]
        walk.d_out, walk.d_made, walk.d_streams = d_out.data_ptr(), d_made.data_ptr(), d_streams.data_ptr()
        _point(walk.d_base, d_base[:2])
        _point(walk.d_base_narrow, d_base[2:])
        _point(walk.d_state, d_snapshot)
        run_walk(walk, backward=True)
        del alive
        return (None, d_streams, *(None if g is None else g.sum(0) for g in d_base), *d_snapshot[2:4])


def _read_arguments(given: list[Tensor | None]) -> list[Tensor | None]:
    """Streams, base and snapshot at their places among the tensors of a walk."""
    streams, base, snapshot = given[:1], given[1:5], given[5:]
    nothing: list[Tensor | None] = [None]
    return [*streams, *nothing * 7, *base, *nothing * 2, *snapshot, *nothing * 2]


def _refuse_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'the compiled walk is differentiable once, and create_graph=True asks for more: set backend="torch" in '
            "the model's configuration, or on its memory layers, for second derivatives"
        )


def _by_row(tensors: list[Tensor | None], rows: int) -> list[Tensor | None]:
    """Zeros for the gradients of what all rows share, for each row apart."""
    return [None if t is None else t.new_zeros(rows, *t.shape) for t in tensors]


class _CompiledWalk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: WalkPlan, streams: Tensor, logits: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        streams = streams.contiguous()
        tensors = [streams, *(None if t is None else t.contiguous() for t in (logits, *rest))]
        states = tensors[STATES]
        base_inner, base_outer = tensors[8], tensors[9]
        assert base_inner is not None and base_outer is not None
        out = streams.new_empty(*streams.shape[1:4], base_outer.shape[-2])
        made = torch.empty(5, *streams.shape[1:], dtype=streams.dtype) if plan.made else None
        after = [None if w is None else torch.empty_like(w) for w in states]
        keep = any(ctx.needs_input_grad)
        saved: list[Tensor | None] = [None] * 4
        if keep:
            kept = (states[0], states[1], states[4], states[5])
            units = sum(plan.hidden) * base_inner.shape[-1], sum(plan.hidden) * base_outer.shape[-2]
            size = (len(plan.segments), *streams.shape[1:3])
            saved = [None if w is None else w.new_empty(*size, units[i % 2]) for i, w in enumerate(kept)]
        walk, alive = _arguments(plan, tensors)
        walk.keep = int(keep)
        walk.out = out.data_ptr()
        walk.made = None if made is None else made.data_ptr()
        _point(walk.after, after)
        _point(walk.saved, saved)
        run_walk(walk, backward=False)
        del alive
        if keep:
            # Most often nobody asks for the gradient of the last state, and zeros would have to be written for it.
            ctx.set_materialize_grads(False)
            ctx.plan = plan
            ctx.present = [t is not None for t in (*tensors, *saved)]
            ctx.save_for_backward(*(t for t in (*tensors, *saved) if t is not None))
        return (out, made, *after)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_made: Tensor | None, *d_after: Tensor | None) -> tuple[Any, ...]:
        _refuse_twice()
        plan: WalkPlan = ctx.plan
        iterator = iter(ctx.saved_tensors)
        found = [next(iterator) if present else None for present in ctx.present]
        tensors, saved = found[:-4], found[-4:]
        streams, logits = tensors[0], tensors[1]
        assert streams is not None
        rows = streams.shape[1]
        states = tensors[STATES]
        walk, alive = _arguments(plan, tensors)
        d_streams = torch.empty_like(streams)
        d_logits = None if logits is None else torch.empty_like(logits)
        d_readouts, d_base = _by_row(tensors[READOUTS], rows), _by_row(tensors[BASE], rows)
        d_state = [None if w is None else torch.empty_like(w) for w in states]
        given = [None if g is None else g.contiguous() for g in d_after]
        if d_out is None:
            d_out = streams.new_zeros(*streams.shape[1:4], tensors[9].shape[-2])  # type: ignore[union-attr]
        d_out = d_out.contiguous()
        walk.d_out = d_out.data_ptr()
        d_made = None if d_made is None else d_made.contiguous()
        walk.d_made = None if d_made is None else d_made.data_ptr()
        _point(walk.saved, saved)
        _point(walk.d_after, given)
        walk.d_streams = d_streams.data_ptr()
        walk.d_logits = None if d_logits is None else d_logits.data_ptr()
        _point(walk.d_readouts, d_readouts)
        _point(walk.d_base, d_base[:2])
        _point(walk.d_base_narrow, d_base[2:])
        _point(walk.d_state, d_state)
        run_walk(walk, backward=True)
        del alive
        parameters = [None if g is None else g.sum(0) for g in (*d_readouts, *d_base)]
        return (None, d_streams, d_logits, *parameters, *d_state)


def _point(pointers: Any, tensors: list[Tensor | None]) -> None:
    for i, tensor in enumerate(tensors):
        pointers[i] = None if tensor is None else tensor.data_ptr()


def _arguments(plan: WalkPlan, tensors: list[Tensor | None]) -> tuple[Walk, list[object]]:
    """The arguments that both directions share, and what must stay alive while they are used."""
    streams, logits, base_outer = tensors[0], tensors[1], tensors[9]
    assert streams is not None and base_outer is not None
    segments = plan.segments
    memories = len(plan.hidden)
    rows, heads = streams.shape[1:3]
    scales = (ctypes.c_double * memories)(*plan.scales)
    widths = (ctypes.c_int32 * memories)(*plan.hidden)
    starts = (ctypes.c_int32 * len(segments))(*(segment.start for segment in segments))
    stops = (ctypes.c_int32 * len(segments))(*(segment.stop for segment in segments))
    reset, completes, active = _marks(plan, rows, streams.shape[3])
    walk = Walk(
        rows=rows,
        heads=heads,
        memories=memories,
        projections=memories - 1,
        narrow_first=plan.narrow[0],
        narrow_stop=plan.narrow[1],
        key=streams.shape[-1],
        hidden=max(plan.hidden),
        value=base_outer.shape[-2],
        chunk=max(s.stop - s.start for s in segments),
        segments=len(segments),
        places=streams.shape[3],
        rule=RULES.index(plan.inner_rule),
        read=READS.index(plan.read),
        negative_eigenvalues=plan.negative_eigenvalues,
        own_targets=plan.own_targets,
        main_residual=plan.residual_memory,
        adaptive_query=plan.adaptive_query,
        to_initial=plan.to_initial,
        has_retain=plan.retention,
        has_momentum=tensors[STATES][4] is not None,
        detach_every=plan.detach_every or 0,
        threads=torch.get_num_threads() if rows * heads * streams.shape[3] >= FEW_TOKENS else 1,
        wide=streams.dtype == torch.float64,
        reads_only=plan.reads_only,
        bound=plan.bound or 0.0,
        largest_gate=plan.largest_gate,
        scales=ctypes.addressof(scales),
        widths=ctypes.addressof(widths),
        starts=ctypes.addressof(starts),
        stops=ctypes.addressof(stops),
        active=None if active is None else active.data_ptr(),
        reset=ctypes.addressof(reset),
        completes=ctypes.addressof(completes),
        streams=streams.data_ptr(),
        logits=None if logits is None else logits.data_ptr(),
    )
    _point(walk.readouts, tensors[READOUTS])
    _point(walk.base, tensors[BASE][:2])
    _point(walk.base_narrow, tensors[BASE][2:])
    _point(walk.state, tensors[STATES])
    alive: list[object] = [scales, widths, starts, stops, reset, completes, active]
    return walk, alive


def _marks(plan: WalkPlan, rows: int, places: int) -> tuple[ctypes.Array[Any], ctypes.Array[Any], Tensor | None]:
    """Which rows each segment resets (segments, rows), whose chunk of the main and the other memories it ends
    (2, segments, rows), and where there are tokens (rows, places), None for everywhere. As bytes."""
    segments = plan.segments
    sizes = (plan.chunk_size, plan.projection_chunk_size)
    reset = bytearray(len(segments) * rows)
    completes = bytearray(2 * len(segments) * rows)
    active = None
    for i, segment in enumerate(segments):
        if segment.reset is not None:
            reset[i * rows : (i + 1) * rows] = bytes(segment.reset.tolist())
        for j, size in enumerate(sizes):
            done = segment.completes(size)
            place = (j * len(segments) + i) * rows
            completes[place : place + rows] = bytes([done] * rows if isinstance(done, bool) else done.tolist())
        if segment.active is not None:
            if active is None:
                active = torch.ones(rows, places, dtype=torch.bool)
            active[:, segment.start : segment.stop] = segment.active
    return (
        (ctypes.c_uint8 * len(reset)).from_buffer(reset),
        (ctypes.c_uint8 * len(completes)).from_buffer(completes),
        active,
    )
