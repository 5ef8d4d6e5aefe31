"""Softmax attention as a mixer: Hope-Attention's, and the plain Transformer's.

Shapes: B batch, T tokens, D model width, H heads, Dh head width, N cached tokens.

The state of both: "keys" and "values" (B, H, N, Dh), where index i of a row is token i of that row's CURRENT document
(zeros behind it), and "position" (B,) int64, the tokens of that document so far. A document start empties the row's
cache, so nothing of an earlier document can be seen, and rotary positions count from there too.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.rotary import apply_rotary, rotary_table
from nestlearn.layers.short_convolution import last_document_start
from nestlearn.layers.streams import Streams

__all__ = ["Attention", "PlainAttention", "cached_attention"]

State = dict[str, Tensor]


class Attention(nn.Module):
    """Mixer "attention" (Hope-Attention): softmax attention in the layout that all mixers of Hope share.

    q, k, v = SiLU(conv(x W)), q and k L2-normalised per head and turned by rotary positions, logits = scale_h q.k with
    a learnt scale per head that starts at 10; then per-head RMSNorm, a SiLU gate and the output projection. No biases.

    dim: D. heads: H, which divides D into even head widths. conv_width: tokens each short convolution sees.
    rotary_base: see `rotary_table`.
    """

    def __init__(self, dim: int, heads: int, *, conv_width: int = 4, rotary_base: float = 10000.0) -> None:
        super().__init__()
        self.rotary_base = rotary_base
        self.heads = heads
        self.head_dim = _head_dim(dim, heads)
        self.streams = Streams(dim, heads, streams=3, conv_width=conv_width)
        self.query_scale = nn.Parameter(torch.full((heads,), 10.0))
        self.readout = GatedReadout(dim, heads, self.head_dim)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty context: keys, values (B, H, 0, Dh), position (B,), tail (B, conv_width - 1, 3 D)."""
        state = _empty_cache(self.streams.projection.weight, batch_size, self.heads, self.head_dim, device, dtype)
        state["tail"] = self.streams.init_tail(batch_size, device=device, dtype=dtype)
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, T, D) -> y (B, T, D) and the state after each row's last valid token.

        lengths (B,): valid tokens of each right-padded row. document_starts (B, T) bool: the context is emptied
        before these tokens.
        """
        position = None if state is None else state["position"]
        tail = None if state is None else state["tail"]
        mixed, tail = self.streams(x, tail, lengths=lengths, document_starts=document_starts)
        q, k, v = self._heads(mixed, position, document_starts)
        o, cache = cached_attention(q, k, v, state, scale=1.0, lengths=lengths, document_starts=document_starts)
        return self.readout(o, x), cache | {"tail": tail}

    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x (B, 1, D) without gradients; overwrites `state`, whose cache then has room to spare.

        forward reads such a state like any other.
        """
        mixed, tail = self.streams(x, state["tail"])
        q, k, v = self._heads(mixed, state["position"], None)
        o = _decode_attention(q, k, v, state, scale=1.0)
        state["tail"] = tail
        return self.readout(o, x), state

    def _heads(
        self, mixed: Tensor, position: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = _split_heads(mixed, self.heads)
        norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(1e-6)
        # Queries carry their head's scale, keys stay unit vectors.
        scale = torch.cat([self.query_scale, torch.ones_like(self.query_scale)]).unsqueeze(-1)
        qk = _rotate(qk * (scale / norm).to(qk.dtype), position, document_starts, self.rotary_base)
        q, k = qk.chunk(2, dim=2)
        return q, k, v


class PlainAttention(nn.Module):
    """Mixer "plain_attention": the reference Transformer's. q, k, v projections, rotary, softmax, output projection.

    dim: D. heads: H, which divides D into even head widths. rotary_base: see `rotary_table`. No biases, no convolution,
    no gate, no norm of q and k.
    """

    def __init__(self, dim: int, heads: int, *, rotary_base: float = 10000.0) -> None:
        super().__init__()
        self.rotary_base = rotary_base
        self.heads = heads
        self.head_dim = _head_dim(dim, heads)
        self.projection = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty context: keys, values (B, H, 0, Dh), position (B,)."""
        return _empty_cache(self.projection.weight, batch_size, self.heads, self.head_dim, device, dtype)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, T, D) -> y (B, T, D) and the state after each row's last valid token; arguments as in Attention."""
        position = None if state is None else state["position"]
        q, k, v = self._heads(x, position, document_starts)
        o, cache = cached_attention(
            q, k, v, state, scale=self.head_dim**-0.5, lengths=lengths, document_starts=document_starts
        )
        return self.output(o.transpose(1, 2).flatten(2)), cache

    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token x (B, 1, D) without gradients; overwrites `state`, as in Attention."""
        q, k, v = self._heads(x, state["position"], None)
        o = _decode_attention(q, k, v, state, scale=self.head_dim**-0.5)
        return self.output(o.transpose(1, 2).flatten(2)), state

    def _heads(
        self, x: Tensor, position: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = _split_heads(self.projection(x), self.heads)
        q, k = _rotate(qk, position, document_starts, self.rotary_base).chunk(2, dim=2)
        return q, k, v


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    *,
    scale: float,
    lengths: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Causal softmax attention of new tokens to themselves and to the cache, each row within its own document.

    q, k, v (B, T, H, Dh); state: "keys", "values", "position" or None (empty). Logits are scale * q.k.
    Returns o (B, H, T, Dh) and the new cache, with index i = token i of the row's current document.
    """
    tokens = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if document_starts is not None and not document_starts[:, 0 if state is not None else 1 :].any():
        document_starts = None  # without a past, a document that starts with the row is nothing new
    cached = 0 if state is None else int(state["position"].max())
    if state is None or cached == 0:
        if document_starts is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            o = _attention_within_documents(q, k, v, document_starts, scale)
        position = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        return o, _new_cache(k, v, 0, position, lengths, document_starts)
    position = state["position"]
    k = torch.cat([state["keys"][:, :, :cached].to(k.dtype), k], dim=2)
    v = torch.cat([state["values"][:, :, :cached].to(v.dtype), v], dim=2)
    aligned = bool((position == cached).all())
    if tokens == 1 and aligned and document_starts is None:
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        mask = _causal_mask(tokens, document_starts, q.device)
        past = torch.arange(cached, device=q.device) < position.view(-1, 1, 1, 1)
        if document_starts is not None:
            past = past & (last_document_start(document_starts) < 0)[:, None, :, None]
        elif aligned:
            past = past[:1]
        shape = (max(past.shape[0], mask.shape[0]), 1, tokens, -1)
        mask = torch.cat([past.expand(shape), mask.expand(shape)], dim=-1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if aligned and lengths is None and document_starts is None:
        return o, {"keys": k, "values": v, "position": position + tokens}
    return o, _new_cache(k, v, cached, position, lengths, document_starts)


def _attention_within_documents(q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor, scale: float) -> Tensor:
    """Causal attention (B, H, T, Dh) of packed rows without a past."""
    batch, tokens = document_starts.shape
    inner = document_starts[:, 1:]
    # One causal call per document skips all that a mask would hide; with many short ones the calls cost more.
    if q.device.type != "cpu" or int(inner.sum()) * 64 > batch * tokens:
        mask = _causal_mask(tokens, document_starts, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    rows = []
    for row, (q_row, k_row, v_row) in enumerate(zip(q.unbind(0), k.unbind(0), v.unbind(0), strict=True)):
        cuts = [0, *(inner[row].nonzero().squeeze(1) + 1).tolist(), tokens]
        sizes = [end - begin for begin, end in pairwise(cuts)]
        documents = zip(*(t.unsqueeze(0).split(sizes, dim=2) for t in (q_row, k_row, v_row)), strict=True)
        outputs = [
            F.scaled_dot_product_attention(q_doc, k_doc, v_doc, is_causal=True, scale=scale)
            for q_doc, k_doc, v_doc in documents
        ]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows)


def _causal_mask(tokens: int, document_starts: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, T) bool: query t sees key s <= t of its own document."""
    token = torch.arange(tokens, device=device)
    mask = (token.unsqueeze(1) >= token)[None, None]
    if document_starts is None:
        return mask
    return mask & (token >= last_document_start(document_starts)[:, None, :, None])


def _new_cache(
    keys: Tensor,
    values: Tensor,
    cached: int,
    position: Tensor,
    lengths: Tensor | None,
    document_starts: Tensor | None,
) -> State:
    """Each row's current document out of keys, values (B, H, cached + T, Dh): old cache first, new tokens behind it."""
    batch, _, total, _ = keys.shape
    tokens = total - cached
    if cached == 0 and lengths is None and document_starts is None:
        return {"keys": keys, "values": values, "position": position + tokens}
    if lengths is None:
        lengths = position.new_full((batch,), tokens)
    skipped = torch.zeros_like(lengths)
    if document_starts is not None:
        last = last_document_start(document_starts).gather(1, (lengths - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
        reset = (last >= 0) & (lengths > 0)
        position = torch.where(reset, 0, position)
        skipped = torch.where(reset, last, 0)
    count = position + lengths - skipped
    index = torch.arange(int(count.max()), device=keys.device)
    new = cached + skipped.unsqueeze(1) + index - position.unsqueeze(1)
    source = torch.where(index < position.unsqueeze(1), index, new).clamp_max(total - 1)
    valid = (index < count.unsqueeze(1))[:, :, None, None]
    row = torch.arange(batch, device=keys.device).unsqueeze(1)
    keys, values = (torch.where(valid, t.transpose(1, 2)[row, source], 0).transpose(1, 2) for t in (keys, values))
    return {"keys": keys, "values": values, "position": count}


def _decode_attention(q: Tensor, k: Tensor, v: Tensor, state: State, *, scale: float) -> Tensor:
    """Attention of one token per row, q, k, v (B, 1, H, Dh) -> (B, H, 1, Dh); writes the cache in place.

    A full cache grows by half, so that n steps copy O(n) tokens and not O(n^2).
    """
    position = state["position"]
    places = position.tolist()
    longest = max(places)
    aligned = min(places) == longest
    capacity = state["keys"].shape[2]
    if longest >= capacity:
        room = (0, 0, 0, max(64, capacity // 2))
        state["keys"], state["values"] = F.pad(state["keys"], room), F.pad(state["values"], room)
    row = None if aligned else torch.arange(q.shape[0], device=q.device)
    for name, new in (("keys", k), ("values", v)):
        if row is None:
            state[name][:, :, longest] = new[:, 0]
        else:
            state[name][row, :, position] = new[:, 0].to(state[name].dtype)
    keys, values = (state[name][:, :, : longest + 1].to(q.dtype) for name in ("keys", "values"))
    mask = None
    if not aligned:
        mask = torch.arange(longest + 1, device=q.device) <= position.view(-1, 1, 1, 1)
    state["position"] = position + 1
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)


def _rotate(qk: Tensor, position: Tensor | None, document_starts: Tensor | None, base: float) -> Tensor:
    """Rotary positions, counted from each row's document start, on qk (B, T, 2 H, Dh)."""
    token = torch.arange(qk.shape[1], device=qk.device).unsqueeze(0)
    positions = token if position is None else position.unsqueeze(1) + token
    if document_starts is not None:
        starts = last_document_start(document_starts)
        positions = torch.where(starts >= 0, token - starts, positions)
    return apply_rotary(qk, *rotary_table(positions, qk.shape[-1], base=base, dtype=qk.dtype))


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(B, T, 3 D) -> queries and keys side by side (B, T, 2 H, Dh), values (B, T, H, Dh)."""
    qkv = qkv.unflatten(-1, (3 * heads, -1))
    qk, v = qkv.split([2 * heads, heads], dim=2)
    return qk, v


def _empty_cache(
    like: Tensor,
    batch_size: int,
    heads: int,
    head_dim: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> State:
    empty = like.new_zeros(batch_size, heads, 0, head_dim, device=device, dtype=dtype)
    position = torch.zeros(batch_size, dtype=torch.int64, device=empty.device)
    return {"keys": empty, "values": empty.clone(), "position": position}


def _head_dim(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads or (dim // heads) % 2:
        raise ValueError(
            f"attention: expected heads that divide dim into even head widths (rotary positions turn pairs), "
            f"got dim={dim}, heads={heads}. Choose dim as a multiple of 2 * heads."
        )
    return dim // heads
