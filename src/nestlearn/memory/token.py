"""One token at a time, in place: what the chunked forms of `functional.associative` and `memory.mlp` are for C = 1.

With one token there is nothing to solve and no decay inside the chunk: a write is a change of rank one,

    S <- momentum S + write v k^T
    M <- retain M - erase ((M - R) k) k^T + S

and costs two passes over the memory. Not differentiable: for decoding only.

Shapes: N rows times heads, M memories, V value width, K key width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory.mlp import InnerRule, MLPWeights


class TokenGates(NamedTuple):
    """What decides how strongly a token is written; shared by all memories of a layer.

    Attributes:
        gate: s in (0, 1), (N, 1).
        retain: alpha in (0, 1], (N, 1); None keeps everything.
        momentum: in [0, 1), (N, 1), or None.
    """

    gate: Tensor
    retain: Tensor | None
    momentum: Tensor | None


def write_token_(
    memory: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    retain: Tensor | None,
    erase: Tensor | None,
    reference: Tensor | None = None,
    momentum_state: Tensor | None = None,
    momentum: Tensor | None = None,
) -> None:
    """Writes one pair into each of G memories, in place.

    Args:
        memory: (G, V, K), contiguous.
        key: (G, 1, K).
        value: the value times its write strength, (G, 1, V).
        retain: (N, 1, 1), where N divides G: memories that lie side by side share it. None for 1.
        erase: (G, 1, 1); None erases nothing.
        reference: R (G, V, K), or None for zero.
        momentum_state: S (G, V, K), written in place, or None without momentum.
        momentum: like retain; only with momentum_state.
    """
    erased = None
    if erase is not None:
        erased = torch.bmm(key, memory.mT)
        if reference is not None:
            erased = erased.baddbmm_(key, reference.mT, alpha=-1)
        erased *= erase
    _decay_(memory, retain)
    if momentum_state is None:
        change = value if erased is None else value - erased
        memory.addcmul_(change.mT, key)
        return
    _decay_(momentum_state, momentum)
    momentum_state.addcmul_(value.mT, key)
    if erased is not None:
        memory.addcmul_(erased.mT, key, value=-1)
    memory.add_(momentum_state)


def _decay_(memory: Tensor, factor: Tensor | None) -> None:
    if factor is not None:
        memory.view(factor.shape[0], -1, memory.shape[-1]).mul_(factor)


def token_strengths(
    gates: TokenGates, squared_norm: Tensor, *, rule: InnerRule, negative_eigenvalues: bool
) -> tuple[Tensor | None, Tensor]:
    """erase (None under "gd") and write for keys of the given squared norm (N, ...): `memory.mlp.write_strengths`."""
    if negative_eigenvalues:
        reach = (1.0 if gates.retain is None else gates.retain) + 1.0
        reach = reach / squared_norm.clamp_min(1.0)
        erase = gates.gate * reach
        write = torch.minimum(erase, reach - erase)
    else:
        erase = write = gates.gate / torch.addcmul(1 - gates.gate, gates.gate, squared_norm)
    if gates.momentum is not None:
        write = write * (1 - gates.momentum)
    return (None if rule == "gd" else erase), write


def read_token(inner: Tensor, outer: Tensor, x: Tensor) -> Tensor:
    """W1 silu(W2 x), without residual: inner (G, hidden, K), outer (G, V, hidden), x (G, 1, K) -> (G, 1, V)."""
    return torch.bmm(F.silu(torch.bmm(x, inner.mT), inplace=True), outer.mT)


def write_mlp_token_(
    running: MLPWeights,
    snapshot: MLPWeights,
    momentum: MLPWeights | None,
    outer_at_snapshot: Tensor,
    key: Tensor,
    z: Tensor,
    hidden: Tensor,
    value: Tensor,
    gates: TokenGates,
    *,
    rule: InnerRule,
    negative_eigenvalues: bool = False,
    bound: float | None = None,
    scale: Tensor,
) -> None:
    """Writes a token into M memories (Eq. 88, 90), in place: `memory.mlp.write_mlp_chunk` for one token.

    Args:
        running: the changing part of the memories, (B, H, M, ...), contiguous; written in place.
        snapshot: that part at the end of the previous chunk.
        momentum: like running, or None; written in place.
        outer_at_snapshot: the whole W1 at the snapshot, (N M, V, hidden).
        key: k (N, 1, K), shared by all memories.
        z: W2 k at the snapshot (N, M, hidden).
        hidden: silu(z), the keys of W1.
        value: target - M(k) at the snapshot, (N, M, V); overwritten.
        gates: of the token.
        rule, negative_eigenvalues: see `memory.mlp.write_strengths`.
        bound: norm to which the error, and its image at the inner map, is scaled down; None for no bound.
        scale: (M,), the fraction of its error that each memory writes.
    """
    count, memories, width = z.shape
    if bound is not None:
        # Both values are kept in units of the bound.
        value.div_(torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp_min_(bound))
        scale = scale * bound
    back = torch.bmm(value.view(count * memories, 1, -1), outer_at_snapshot).view(z.shape)
    image = torch.ops.aten.silu_backward(back, z)
    if bound is not None:
        image.div_(torch.linalg.vector_norm(image, dim=-1, keepdim=True).clamp_min_(1.0))

    # The keys of all maps: k for all inner ones, then the hidden features of the outer ones.
    squared = torch.cat([key.square().sum(-1), hidden.square().sum(-1)], dim=1)
    erase, write = token_strengths(gates, squared, rule=rule, negative_eigenvalues=negative_eigenvalues)
    image.mul_((write[:, :1] * scale)[..., None])
    value.mul_((write[:, 1:] * scale)[..., None])
    retain, decay = (None if x is None else x[..., None] for x in (gates.retain, gates.momentum))
    relative = rule == "delta"
    for index, (map_key, map_value, map_erase) in enumerate(
        (
            (key, image.view(count, 1, -1), None if erase is None else erase[:, :1, None]),
            (
                hidden.reshape(count * memories, 1, width),
                value.view(count * memories, 1, -1),
                None if erase is None else erase[:, 1:].reshape(-1, 1, 1),
            ),
        )
    ):
        shape = (map_key.shape[0], map_value.shape[-1], map_key.shape[-1])
        write_token_(
            running[index].view(shape),
            map_key,
            map_value,
            retain=retain,
            erase=map_erase,
            reference=snapshot[index].view(shape) if relative else None,
            momentum_state=None if momentum is None else momentum[index].view(shape),
            momentum=decay,
        )
