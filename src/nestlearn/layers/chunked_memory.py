"""What layers with two-layer memories share: their state, its snapshots, their gates, and the walk over chunks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.functional.associative import chunk_decay
from nestlearn.functional.constants import constant
from nestlearn.functional.kernels.native import unavailable
from nestlearn.layers.compiled_token import compiled_token_, slow_weights
from nestlearn.layers.compiled_walk import GateReadouts, WalkPlan, WalkState, compiled_walk
from nestlearn.layers.decoding import advance_, without_autocast, writable
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.streams import Streams
from nestlearn.layers.timeline import Segment, plan_timeline
from nestlearn.layers.triton_walk import triton_refusal, triton_walk
from nestlearn.memory.mlp import (
    InnerRule,
    MLPChunk,
    MLPMemory,
    MLPWeights,
    WriteGates,
    read_mlp,
    read_mlp_chunk,
)
from nestlearn.memory.token import TokenGates, read_token

Read = Literal["token", "previous", "chunk"]
RetainTo = Literal["initial", "zero"]
Backend = Literal["auto", "torch", "cpp", "triton"]
State = dict[str, Tensor]

# Below 1 the exact step of a write gate, s / (1 - s + s |a|^2), stays finite for keys near zero.
LARGEST_GATE = 0.99


class MemoryState(NamedTuple):
    """The memories of a layer inside a context, for each row on its own.

    Attributes:
        running: the changing part of the memories, (B, H, M, ...).
        snapshot: that part at the end of the previous chunk.
        momentum: like running, or None.
    """

    running: MLPWeights
    snapshot: MLPWeights
    momentum: MLPWeights | None

    def named(self) -> State:
        """As named tensors, for a state dictionary."""
        names = {
            "inner": self.running.inner,
            "outer": self.running.outer,
            "inner_snapshot": self.snapshot.inner,
            "outer_snapshot": self.snapshot.outer,
        }
        if self.momentum is not None:
            names |= {"inner_momentum": self.momentum.inner, "outer_momentum": self.momentum.outer}
        return names

    @staticmethod
    def of(state: State) -> MemoryState:
        momentum = None
        if "inner_momentum" in state:
            momentum = MLPWeights(state["inner_momentum"], state["outer_momentum"])
        return MemoryState(
            MLPWeights(state["inner"], state["outer"]),
            MLPWeights(state["inner_snapshot"], state["outer_snapshot"]),
            momentum,
        )

    def reset(self, rows: Tensor, fresh: MemoryState) -> MemoryState:
        """The fresh state in the chosen rows (B,)."""
        momentum = None
        if self.momentum is not None and fresh.momentum is not None:
            momentum = fresh.momentum.where(rows, self.momentum)
        return MemoryState(fresh.running.where(rows, self.running), fresh.snapshot.where(rows, self.snapshot), momentum)

    def detach(self) -> MemoryState:
        return MemoryState(
            self.running.detach(), self.snapshot.detach(), None if self.momentum is None else self.momentum.detach()
        )


def check_state(memory: MLPMemory, state: MemoryState, position: Tensor, *, rows: int, momentum: bool) -> None:
    """Refuses a state of another layer or batch, which compiled code would read past its end.

    Raises:
        ValueError: saying what was expected and what came.
    """
    heads, key, value = memory.inner.shape[0], memory.inner.shape[-1], memory.outer.shape[-2]
    dtype = torch.promote_types(memory.inner.dtype, torch.float32)
    hidden, memories = max(memory.hidden), len(memory.hidden)
    if position.shape != (rows,):
        raise ValueError(f"state: expected one position a row, ({rows},), got shape {tuple(position.shape)}")
    if momentum != (state.momentum is not None):
        has = "none" if state.momentum is None else "one"
        raise ValueError(f"state: expected {'a' if momentum else 'no'} momentum, as the layer has it, got {has}")
    for name, tensor in state.named().items():
        ends = (hidden, key) if name.startswith("inner") else (value, hidden)
        expected = (rows, heads, memories, *ends)
        if tensor.shape != expected or tensor.dtype != dtype:
            raise ValueError(
                f"state: expected {name} as {dtype} of shape {expected}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; does it belong to a layer with the same settings, dtype and batch?"
            )


def base_weights(memory: MLPMemory, retain_to: RetainTo) -> MLPWeights | None:
    """The part of the memories that no write changes: M_0 if they decay towards it, None if they decay to zero."""
    return memory.initial if retain_to == "initial" else None


def fresh_state(memory: MLPMemory, batch_size: int, *, retain_to: RetainTo, momentum: bool) -> MemoryState:
    """The state before the first token: no change yet (decay to M_0), or M_0 itself (decay to zero)."""
    initial = memory.initial
    if retain_to == "initial":
        initial = initial.zeros_like()
    changing = MLPWeights(*(w.expand(batch_size, *w.shape).clone() for w in initial))
    return MemoryState(changing, changing, changing.zeros_like() if momentum else None)


def advance_snapshot(
    old: MLPWeights, running: MLPWeights, segment: Segment, *, chunk_size: int, projection_chunk_size: int
) -> MLPWeights:
    """The snapshot after a segment: memories whose chunk ends with it take their running weights.

    The last memory works in chunks of `chunk_size`, those before it in chunks of `projection_chunk_size`.
    """
    main, others = segment.completes(chunk_size), segment.completes(projection_chunk_size)
    if main is True and others is True:
        return running
    if main is False and others is False:
        return old
    chosen = []
    for done, part in ((others, slice(None, -1)), (main, slice(-1, None))):
        before = MLPWeights(old.inner[:, :, part], old.outer[:, :, part])
        after = MLPWeights(running.inner[:, :, part], running.outer[:, :, part])
        chosen.append(after if done is True else before if done is False else after.where(done, before))
    return MLPWeights(
        torch.cat([part.inner for part in chosen], dim=2), torch.cat([part.outer for part in chosen], dim=2)
    )


def write_gates(
    gate_logits: Tensor,
    retain_logits: Tensor | None,
    momentum_logits: Tensor | None,
    active: Tensor | None,
    *,
    largest_gate: float,
) -> WriteGates:
    """Gates of a chunk from their logits (B, H, C).

    Args:
        gate_logits: s = largest_gate * sigmoid.
        retain_logits: alpha = sigmoid; None keeps everything.
        momentum_logits: sigmoid; None for no momentum.
        active: (B, C) bool, or None.
        largest_gate: at most `LARGEST_GATE` unless negative eigenvalues bound the step by other means.
    """
    mask = None if active is None else active[:, None]
    log_retain = torch.zeros_like(gate_logits) if retain_logits is None else F.logsigmoid(retain_logits)
    log_momentum = None if momentum_logits is None else F.logsigmoid(momentum_logits)
    return WriteGates(
        gate=largest_gate * torch.sigmoid(gate_logits),
        retain=log_retain.exp(),
        decay=chunk_decay(log_retain, log_momentum, mask),
        momentum=None if log_momentum is None else log_momentum.exp(),
        active=mask,
    )


def token_gates(
    gate_logits: Tensor, retain_logits: Tensor | None, momentum_logits: Tensor | None, *, largest_gate: float
) -> TokenGates:
    """`write_gates` of one token, from logits (B, H)."""

    def gate(logits: Tensor | None) -> Tensor | None:
        return None if logits is None else torch.sigmoid(logits).view(-1, 1)

    largest = constant(largest_gate, gate_logits.dtype, gate_logits.device)
    return TokenGates(torch.sigmoid(gate_logits).mul_(largest).view(-1, 1), gate(retain_logits), gate(momentum_logits))


def read_main(
    chunk: MLPChunk,
    base: MLPWeights | None,
    state: MemoryState,
    keys: Tensor,
    queries: Tensor,
    gates: WriteGates,
    read: Read,
) -> Tensor:
    """Reads the main memory, the last one, at every token of a chunk: (B, H, C, V), without residual.

    "chunk" reads the snapshot (Eq. 90), "previous" M_{t-1} (Eq. 83), "token" M_t. `state` is that before the chunk.
    """
    if read != "chunk":
        return read_mlp_chunk(chunk, base, state.running, state.momentum, keys, queries, gates, read=read)
    whole = state.snapshot.add(base)
    return read_mlp(MLPWeights(whole.inner[:, :, -1], whole.outer[:, :, -1]), queries)


def decode_main(base: MLPWeights | None, weights: MLPWeights, queries: Tensor) -> Tensor:
    """Reads the main memory, the last one, of base + weights (B, H, M, ...): queries (B H, 1, K) -> (B H, 1, V)."""
    inner, outer = weights.inner[:, :, -1], weights.outer[:, :, -1]
    if base is not None:
        inner, outer = inner + base.inner[:, -1], outer + base.outer[:, -1]
    return read_token(inner.flatten(0, 1), outer.flatten(0, 1), queries)


def spread_retention(heads: int, shortest: float = 64.0, longest: float = 16384.0) -> Tensor:
    """Biases (H,) of the retention logits: half-lives from `shortest` to `longest` tokens, a geometric series."""
    half_lives = torch.logspace(0, 1, heads, base=longest / shortest) * shortest
    retain = torch.exp2(-1 / half_lives)
    return torch.logit(retain.double()).to(torch.get_default_dtype())


def check_gates(heads: int, first: float, last: float | None) -> None:
    """Refuses write gates out of (0, 1), and a series that rises or has one head only.

    Raises:
        ValueError: saying what was expected.
    """
    for name, value in (("initial_gate", first), ("slowest_gate", last)):
        if value is not None and (not isinstance(value, int | float) or not 0 < value < 1):
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    if last is not None and last > first:
        raise ValueError(f"slowest_gate: expected at most initial_gate, the first head's, {first}; got {last}")
    if last is not None and heads == 1:
        raise ValueError(f"slowest_gate: one head is the first and the last; choose initial_gate={last}, or two heads")


def spread_gates(heads: int, first: float, last: float | None, largest: float) -> Tensor:
    """Biases (H,) of the write gates: gates from `first` to `last` over the heads, a geometric series; None for `first`
    in all of them. The first head, which forgets fastest (`spread_retention`), writes most."""
    if last is None:
        return torch.full((heads,), first / largest).logit(eps=1e-4)
    gates = first * torch.logspace(0, 1, heads, base=last / first, dtype=torch.float64)
    return torch.logit((gates / largest).clamp(max=1 - 1e-4)).to(torch.get_default_dtype())


def check_scales(write_scale: float | None, projection_write_scale: float | None) -> None:
    """Refuses fractions that are not positive.

    Raises:
        ValueError: naming the one that is off.
    """
    for name, value in (("write_scale", write_scale), ("projection_write_scale", projection_write_scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive fraction of the error, got {value}")


def gate_hidden(hidden: int, ratio: float) -> int:
    """Hidden width of the memories for rate and retention, a part of the others' `hidden`, at least 1.

    Raises:
        ValueError: if it is no part of it.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"gate_hidden_ratio: expected a number above 0 and at most 1, got {ratio!r}")
    return max(1, round(ratio * hidden))


def check_bound(write_bound: float | None) -> None:
    """Refuses a norm whose square is no positive number in fp32.

    Raises:
        ValueError: saying so.
    """
    if write_bound is not None and not 1e-18 <= write_bound <= 1e18:
        raise ValueError(f"write_bound: expected a norm from 1e-18 to 1e18, or None for no bound; got {write_bound}")


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuses a value that is none of a Literal's.

    Raises:
        ValueError: naming the choices.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}; got {value!r}")


class ChunkedMemory(nn.Module):
    """Memories that take a snapshot at the end of each chunk. Subclasses say what a segment computes.

    Args:
        heads: H.
        memory: the M memories; the last one is the main memory.
        inner_rule, momentum, read, retain_to, chunk_size, projection_chunk_size, write_scale,
        projection_write_scale, write_bound, detach_every, backend: as in `SelfModifyingTitans`.
    """

    def __init__(
        self,
        *,
        heads: int,
        memory: MLPMemory,
        inner_rule: InnerRule,
        momentum: bool,
        read: Read,
        retain_to: RetainTo,
        chunk_size: int,
        projection_chunk_size: int,
        write_scale: float,
        projection_write_scale: float,
        write_bound: float | None,
        detach_every: int | None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, Backend)
        check_choice("inner_rule", inner_rule, InnerRule)
        check_choice("read", read, Read)
        check_choice("retain_to", retain_to, RetainTo)
        small, large = sorted((chunk_size, projection_chunk_size))
        if small < 1 or large % small:
            raise ValueError(
                f"chunk_size and projection_chunk_size: both must be at least 1 and one must divide the other; "
                f"got {chunk_size} and {projection_chunk_size}"
            )
        check_bound(write_bound)
        check_scales(write_scale, projection_write_scale)
        if detach_every is not None and detach_every < 1:
            raise ValueError(f"detach_every: expected at least 1 chunk, or None for never; got {detach_every}")
        self.heads = heads
        self.memory = memory
        self.inner_rule: InnerRule = inner_rule
        self.momentum = momentum
        self.read: Read = read
        self.retain_to: RetainTo = retain_to
        self.chunk_size = chunk_size
        self.projection_chunk_size = projection_chunk_size
        # Tokens computed at once. Any divisor of both chunk sizes gives the same result at another speed.
        self.segment_size = small
        self.write_scale = write_scale
        self.projection_write_scale = projection_write_scale
        self.write_bound = write_bound
        self.detach_every = detach_every
        self.backend: Backend = backend
        self.activation_checkpointing = False

    def walk(
        self,
        inputs: Tensor,
        memory: MemoryState,
        position: Tensor,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState, Tensor]:
        """The memories alone, between what is known of each token and the readout.

        Args:
            inputs: (B, T, ...), all that is known of each token before.
            memory: before the first token.
            position: (B,) int64, tokens since each row's last reset, modulo the larger chunk size.
            lengths, document_starts: as in `forward`.

        Returns:
            what the heads read, side by side (B, T, H * V), the memories and the position after each row's last token.
        """
        batch = inputs.shape[0]
        check_state(self.memory, memory, position, rows=batch, momentum=self.momentum)
        timeline = plan_timeline(
            position,
            inputs.shape[1],
            chunk=self.segment_size,
            period=max(self.chunk_size, self.projection_chunk_size),
            lengths=lengths,
            document_starts=document_starts,
        )
        kind = inputs.device.type
        operand = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        with torch.autocast(kind, enabled=False):
            inputs = timeline.spread(inputs).to(memory.running.inner.dtype)
            if not timeline.segments:
                width = memory.running.outer.shape[1] * memory.running.outer.shape[-2]
                return inputs.new_zeros(batch, 0, width), memory, timeline.position
            form = self._form(inputs.device)
            if form == "cpp":
                o, memory = self._compiled_walk(inputs, memory, timeline.segments)
            elif form == "triton":
                o, memory = self._triton_walk(inputs, memory, timeline.segments, operand)
            else:
                o, memory = self._walk(inputs, memory, timeline.segments)
            o = timeline.collect(o)
        return o, memory, timeline.position

    def _walk(self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]) -> tuple[Tensor, MemoryState]:
        """The walk in PyTorch operations, segment by segment; the specification of the compiled one.

        inputs (B, places, ...) -> outputs of the heads side by side (B, places, H * V), and the state after them.
        """
        fresh = None
        outputs = []
        pieces = inputs.split([segment.stop - segment.start for segment in segments], dim=1)
        for number, (segment, part) in enumerate(zip(segments, pieces, strict=True), start=1):
            if segment.reset is not None:
                fresh = self._fresh(len(inputs)) if fresh is None else fresh
                memory = memory.reset(segment.reset, fresh)
            if self.activation_checkpointing and torch.is_grad_enabled():
                out, memory = checkpoint(self._segment, part, memory, segment, use_reentrant=False)
            else:
                out, memory = self._segment(part, memory, segment)
            if self.detach_every is not None and number % self.detach_every == 0:
                memory = memory.detach()
            outputs.append(out.transpose(1, 2).flatten(2))
        return torch.cat(outputs, dim=1), memory

    def _form(self, device: torch.device) -> Backend:
        """The form of the walk to take, by name: "torch", "cpp" or "triton".

        Raises:
            RuntimeError: if one was asked for by name and cannot be used.
        """
        if self.backend == "torch":
            return "torch"
        if self.backend == "triton":
            reason = triton_refusal(self._plan(()), self.memory.inner.shape[-1])
        elif device.type == "cpu":
            reason = unavailable()
        else:
            reason = f"it runs on the CPU, and the model is on {device}"
        if reason is None:
            return "triton" if self.backend == "triton" else "cpp"
        if self.backend == "auto":
            return "torch"
        raise RuntimeError(
            f'backend="{self.backend}": this form of the walk cannot be used: {reason}. backend="auto" takes what can'
        )

    def _triton_walk(
        self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...], operand: torch.dtype
    ) -> tuple[Tensor, MemoryState]:
        """`_walk` by Triton kernels; where rows stand inside a chunk, are padded, or hold documents, `_walk` itself."""
        first = segments[0]
        at_start = not isinstance(first.end, Tensor) and first.end == first.stop
        if not at_start or any(s.active is not None or s.reset is not None for s in segments):
            return self._walk(inputs, memory, segments)
        streams, _, readouts = self._walk_inputs(inputs)
        assert readouts is not None
        base = self.memory.initial
        out, after = triton_walk(self._plan(segments), streams, readouts, base, WalkState(*memory), operand)
        return out.transpose(1, 2).flatten(2), MemoryState(*after)

    def _compiled_walk(
        self, inputs: Tensor, memory: MemoryState, segments: tuple[Segment, ...]
    ) -> tuple[Tensor, MemoryState]:
        """`_walk` in compiled code."""
        plan = self._plan(segments)
        streams, logits, readouts = self._walk_inputs(inputs)
        out, after, made = compiled_walk(plan, streams, logits, readouts, self.memory.maps, WalkState(*memory))
        memory = MemoryState(*after)
        if self.detach_every is not None and len(segments) % self.detach_every == 0:
            memory = memory.detach()
        if made is not None:
            out = torch.cat([out, *made], dim=-1)
        return out.transpose(1, 2).flatten(2), memory

    def _plan(self, segments: tuple[Segment, ...]) -> WalkPlan:
        memory = self.memory
        return WalkPlan(
            segments=segments,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
            inner_rule=self.inner_rule,
            read=self.read,
            hidden=memory.hidden,
            narrow=memory.narrow,
            scales=self._scales(),
            bound=self.write_bound,
            to_initial=self.retain_to == "initial",
            detach_every=self.detach_every,
            **self._walk_options(),
        )

    def _walk_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, GateReadouts | None]:
        """Streams, logits and read-outs for `compiled_walk`."""
        raise NotImplementedError

    def _walk_options(self) -> dict[str, Any]:
        """What a `WalkPlan` holds of the subclass."""
        raise NotImplementedError

    def _scale(self, like: Tensor) -> Tensor:
        """`_scales` as a tensor (M, 1, 1)."""
        return torch.tensor(self._scales(), dtype=like.dtype, device=like.device)[:, None, None]

    def _scales(self) -> tuple[float, ...]:
        """The fraction of its errors that each memory writes, the main memory's last.

        "gd" erases nothing, so a chunk's writes add up against one snapshot: it takes their mean, as mini-batch
        gradient descent does, or a chunk of similar keys would overshoot.
        """
        main, projections = self.write_scale, self.projection_write_scale
        if self.inner_rule == "gd":
            main, projections = main / self.chunk_size, projections / self.projection_chunk_size
        return (*[projections] * (len(self.memory.hidden) - 1), main)

    def _fresh(self, batch_size: int) -> MemoryState:
        return fresh_state(self.memory, batch_size, retain_to=self.retain_to, momentum=self.momentum)

    def _segment(self, inputs: Tensor, state: MemoryState, segment: Segment) -> tuple[Tensor, MemoryState]:
        """One stretch inside a chunk: inputs (B, C, ...) -> outputs (B, H, C, V) and the state after it."""
        raise NotImplementedError

    def _after(self, state: MemoryState, chunk: MLPChunk, segment: Segment) -> MemoryState:
        """The state after a written segment."""
        snapshot = advance_snapshot(
            state.snapshot,
            chunk.weights,
            segment,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
        )
        return MemoryState(chunk.weights, snapshot, chunk.momentum)


class ChunkedMemoryLayer(ChunkedMemory):
    """A mixer of such memories, with what goes into them and what follows.

    Args:
        streams: what the layer reads from x.
        readout: what follows the heads.
        settings: of the memories.
    """

    def __init__(self, *, streams: Streams, readout: GatedReadout, **settings: Any) -> None:
        super().__init__(**settings)
        self.streams = streams
        self.readout = readout

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Named tensors of a fresh context; the memories are at least fp32 whatever `dtype`."""
        position = torch.zeros(batch_size, dtype=torch.long, device=self.memory.inner.device)
        tail = self.streams.init_tail(batch_size, device=device, dtype=dtype)
        return {"position": position, "convolution": tail, **self._fresh(batch_size).named()}

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
            state: from `init_state` or an earlier call; None for a fresh context. It is not changed.
            lengths: (B,) valid tokens of right-padded rows.
            document_starts: (B, T) bool, tokens before which the state is reset.
        """
        batch = x.shape[0]
        memory = self._fresh(batch) if state is None else MemoryState.of(state)
        if state is not None:  # before the convolution meets a state of another batch
            check_state(self.memory, memory, state["position"], rows=batch, momentum=self.momentum)
        old_tail = None if state is None else state["convolution"]
        inputs, tail = self._inputs(x, old_tail, lengths, document_starts)
        position = torch.zeros(batch, dtype=torch.long, device=x.device) if state is None else state["position"]
        o, memory, position = self.walk(inputs, memory, position, lengths=lengths, document_starts=document_starts)
        y = self.readout(o.to(x.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2), x)
        return y, {"position": position, "convolution": tail, **memory.named()}

    @torch.no_grad()
    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x (B, 1, D) -> (B, 1, D) without gradients; overwrites `state`. Otherwise equal to `forward`."""
        state = writable(state)
        if self._form(x.device) == "cpp":
            return self._compiled_token(x, state), state
        memory = MemoryState.of(state)
        inputs, state["convolution"] = self._decode_inputs(x, state["convolution"])
        with without_autocast(x.device.type):
            o = self._token(inputs[:, 0].to(memory.running.inner.dtype), memory)
        advance_(
            state["position"],
            memory.running,
            memory.snapshot,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
        )
        return self.readout(o.unsqueeze(2).to(x.dtype), x), state

    def _compiled_token(self, x: Tensor, state: State) -> Tensor:
        """`decode_step` in compiled code: all of the layer where it can, otherwise the memories alone."""
        weights = slow_weights(self, x, state["convolution"])
        inputs, dtype = x, state["inner"].dtype
        if weights is None or x.dtype != dtype:
            weights = None
            inputs, state["convolution"] = self._decode_inputs(x, state["convolution"])
        out = compiled_token_(
            self._plan(()),
            self,
            inputs.to(dtype),
            state,
            heads=self.heads,
            weights=weights,
            eps=self.readout.norm.eps,
        )
        return self.readout(out.to(x.dtype), x) if weights is None else out

    def _inputs(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All that is known of each token before the walk, side by side (B, T, ...), and the convolution's tail."""
        return self.streams(x, tail, lengths=lengths, document_starts=document_starts)

    def _decode_inputs(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """`_inputs` of one token, (B, 1, ...)."""
        return self.streams.decode_step(x, tail)

    def _token(self, inputs: Tensor, state: MemoryState) -> Tensor:
        """One token: inputs (B, ...) -> outputs (B, H, V); the running memories and momenta are written in place."""
        raise NotImplementedError
