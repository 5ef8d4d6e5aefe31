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

from nestlearn.functional.constants import constant
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
    write: Tensor,
    scale: float = 1.0,
    reference: Tensor | None = None,
    momentum_state: Tensor | None = None,
    momentum: Tensor | None = None,
) -> None:
    """Writes one pair into each of G memories, in place.

    Args:
        memory: (G, V, K), contiguous.
        key: (G, 1, K).
        value: (G, 1, V), overwritten.
        retain: (N, 1, 1), where N divides G: memories that lie side by side share it. None for 1.
        erase: (G, 1, 1); None erases nothing.
        write: (G, 1, 1); the same tensor as erase where the two are equal, which saves work.
        scale: what all values are multiplied by.
        reference: R (G, V, K), or None for zero.
        momentum_state: S (G, V, K), written in place, or None without momentum.
        momentum: like retain; only with momentum_state.
    """
    if momentum_state is None and erase is write:
        # One strength for both: erase * (scale v - (M - R) k).
        change = value.baddbmm_(key, memory.mT, beta=scale, alpha=-1)
        if reference is not None:
            change.baddbmm_(key, reference.mT)
        _decay_(memory, retain)
        memory.addcmul_(change.mul_(erase).mT, key)
        return
    change = value.mul_(write * scale)
    if momentum_state is not None:
        _decay_(momentum_state, momentum)
        momentum_state.addcmul_(change.mT, key)
        change.zero_()
    if erase is not None:
        old = torch.bmm(key, memory.mT)
        if reference is not None:
            old.baddbmm_(key, reference.mT, alpha=-1)
        change.addcmul_(old, erase, value=-1)
    _decay_(memory, retain)
    memory.addcmul_(change.mT, key)
    if momentum_state is not None:
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
        # lerp(1, x, s) = 1 - s + s x
        one = constant(1.0, squared_norm.dtype, squared_norm.device)
        erase = write = gates.gate / torch.lerp(one, squared_norm, gates.gate)
    if gates.momentum is not None:
        write = write * (1 - gates.momentum)
    return (None if rule == "gd" else erase), write


def read_token(inner: Tensor, outer: Tensor, x: Tensor, *, residual: bool = False) -> Tensor:
    """[x +] W1 silu(W2 x): inner (G, hidden, K), outer (G, V, hidden), x (G, 1, K) -> (G, 1, V)."""
    # Row vectors times transposed memories: several times faster than the other way round on a CPU.
    hidden = F.silu(torch.bmm(x, inner.mT), inplace=True)
    return torch.baddbmm(x, hidden, outer.mT) if residual else torch.bmm(hidden, outer.mT)


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
    scales: tuple[float, ...],
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
        scales: the fraction of its error that each of the M memories writes.
    """
    count, memories, width = z.shape
    unit = 1.0
    if bound is not None:
        # Both values are kept in units of the bound.
        value.div_(torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp_min_(bound))
        unit = bound
    back = torch.bmm(value.view(-1, 1, value.shape[-1]), outer_at_snapshot).view(z.shape)
    image = torch.ops.aten.silu_backward(back, z)
    if bound is not None:
        image.div_(torch.linalg.vector_norm(image, dim=-1, keepdim=True).clamp_min_(1.0))
    own_scale = constant(scales, image.dtype, image.device)[:, None]
    image.mul_(own_scale)
    value.mul_(own_scale)

    # The keys of all maps: k for all inner ones, then the hidden features of the outer ones.
    squared = torch.cat([key.square().sum(-1), hidden.square().sum(-1)], dim=1)
    erase, write = token_strengths(gates, squared, rule=rule, negative_eigenvalues=negative_eigenvalues)
    retain, momentum_kept = (None if x is None else x[..., None] for x in (gates.retain, gates.momentum))
    keys = (key, hidden.reshape(count * memories, 1, width))
    values = (image.view(count, 1, -1), value.view(count * memories, 1, -1))
    columns = (slice(0, 1), slice(1, None))
    for i, (map_key, map_value, own) in enumerate(zip(keys, values, columns, strict=True)):
        shape = (-1, map_value.shape[-1], map_key.shape[-1])
        strength = write[:, own].reshape(-1, 1, 1)
        write_token_(
            running[i].view(shape),
            map_key,
            map_value,
            retain=retain,
            erase=strength if erase is write else None if erase is None else erase[:, own].reshape(-1, 1, 1),
            write=strength,
            scale=unit,
            reference=snapshot[i].view(shape) if rule == "delta" else None,
            momentum_state=None if momentum is None else momentum[i].view(shape),
            momentum=momentum_kept,
        )
