"""What linear attention, DeltaNet and Gated DeltaNet share: a matrix memory, written token by token by one rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlearn.functional.associative import Decay, associative_chunk, chunk_decay
from nestlearn.functional.rms_norm import normalize_token
from nestlearn.functional.surprise import normalize
from nestlearn.layers.decoding import without_autocast, writable
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.streams import Streams
from nestlearn.layers.timeline import plan_timeline
from nestlearn.memory.matrix import MatrixMemory
from nestlearn.memory.token import write_token_

State = dict[str, Tensor]


class MatrixMemoryLayer(nn.Module):
    """A mixer with one matrix memory a head. Subclasses say how strongly a token retains, erases and writes.

    Args:
        dim: D, divisible by heads.
        heads: H.
        gates: numbers a head that the layer reads from each token.
        chunk_size: tokens a chunk; it changes the speed, not the result.
        conv_width: taps of the short convolutions.
    """

    def __init__(self, dim: int, heads: int, *, gates: int, chunk_size: int = 64, conv_width: int = 4) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        self.heads = heads
        self.chunk_size = chunk_size
        self.activation_checkpointing = False
        self.streams = Streams(dim, heads, streams=3, conv_width=conv_width)
        self.memory = MatrixMemory(heads, dim // heads)
        self.gates = nn.Linear(dim, gates * heads, bias=False) if gates else None
        self.readout = GatedReadout(dim, heads, dim // heads)

    def strengths(self, logits: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """log_retain, erase (None for nothing) and write of each token, (B, H, C).

        Args:
            logits: (gates, B, H, C), or None without gates.
            like: a tensor (B, H, C).
        """
        raise NotImplementedError

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Named tensors of a fresh context; the memory is at least fp32 whatever `dtype`."""
        tail = self.streams.init_tail(batch_size, device=device, dtype=dtype)
        return {"convolution": tail, "memory": self.memory.init_state(batch_size)}

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
        batch, tokens, _ = x.shape
        memory = self.memory.init_state(batch) if state is None else state["memory"]
        old_tail = None if state is None else state["convolution"]
        inputs, tail = self.streams(x, old_tail, lengths=lengths, document_starts=document_starts)
        width = inputs.shape[-1]
        if self.gates is not None:
            inputs = torch.cat([inputs, self.gates(x)], dim=-1)
        # The rule is exact at every token, so chunks may begin anywhere: each call counts from its own start.
        timeline = plan_timeline(
            torch.zeros(batch, dtype=torch.long, device=x.device),
            tokens,
            chunk=self.chunk_size,
            period=self.chunk_size,
            lengths=lengths,
            document_starts=document_starts,
        )
        with torch.autocast(x.device.type, enabled=False):
            inputs = timeline.spread(inputs).to(memory.dtype)
            outputs = []
            for segment, part in zip(timeline.segments, timeline.cut(inputs), strict=True):
                if segment.reset is not None:
                    memory = torch.where(segment.reset[:, None, None, None], self.memory.init_state(batch), memory)
                if self.activation_checkpointing and torch.is_grad_enabled():
                    out, memory = checkpoint(self._chunk, part, memory, segment.active, width, use_reentrant=False)
                else:
                    out, memory = self._chunk(part, memory, segment.active, width)
                outputs.append(out.transpose(1, 2).flatten(2))
            o = timeline.collect(torch.cat(outputs, dim=1)) if outputs else torch.zeros_like(x)
        y = self.readout(o.to(x.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2), x)
        return y, {"convolution": tail, "memory": memory}

    @torch.no_grad()
    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x (B, 1, D) -> (B, 1, D) without gradients; overwrites `state`. Otherwise equal to `forward`."""
        state = writable(state)
        u, state["convolution"] = self.streams.decode_step(x, state["convolution"])
        logits = None if self.gates is None else self.gates(x)
        memory = state["memory"]
        batch, heads, _, dim = memory.shape
        with without_autocast(x.device.type):
            u = u.to(memory.dtype).view(batch, 3, heads, dim)
            if logits is not None:
                logits = logits.to(memory.dtype).view(batch, -1, heads, 1).transpose(0, 1)
            log_retain, erase, write = self.strengths(logits, u[:, 0, :, :1])
            query, key = (part.reshape(-1, 1, dim) for part in normalize_token(u[:, :2]).unbind(1))
            write_token_(
                memory.view(-1, dim, dim),
                key,
                u[:, 2].reshape(-1, 1, dim),
                retain=log_retain.exp().reshape(-1, 1, 1),
                erase=None if erase is None else erase.reshape(-1, 1, 1),
                write=write.reshape(-1, 1, 1),
            )
            o = torch.bmm(query, memory.view(-1, dim, dim).mT).view(batch, heads, 1, dim)
        return self.readout(o.to(x.dtype), x), state

    def _chunk(self, inputs: Tensor, memory: Tensor, active: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        queries, keys, values = self.streams.split(inputs[..., :width])
        logits = None
        if self.gates is not None:
            logits = inputs[..., width:].unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)
        log_retain, erase, write = self.strengths(logits, keys[..., 0])
        if active is not None:
            mask = active[:, None]
            log_retain, write = log_retain * mask, write * mask
            erase = None if erase is None else erase * mask
        decay: Decay = chunk_decay(log_retain)
        keys = normalize(keys)
        out, memory, _ = associative_chunk(
            memory, keys, values * write[..., None], decay, erase=erase, queries=normalize(queries)
        )
        assert out is not None
        return out, memory
