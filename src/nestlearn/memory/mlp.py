"""Two-layer memories M(x) = [x +] W1 silu(W2 x) (Eq. 89), several of one shape side by side.

Each of their two linear maps is an associative memory of its own: its key is its own input, its value minus the error
at its output. So one chunk of writes (Eq. 90) is two applications of the rule in `functional.associative`: first to the
inner maps W2, which share one key, then to the outer maps W1, whose keys are the hidden features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.associative import Decay, ReadTiming, Written, read_chunk, write_chunk
from nestlearn.functional.surprise import mlp_error_surprise

InnerRule = Literal["dgd", "gd", "delta"]


class WriteScales(NamedTuple):
    """The fraction of its error that a memory writes: the main memory, and the memories of the projections."""

    main: float
    projections: float


# Errors come from a snapshot and targets from the memories themselves, so chunks that write their errors whole
# overshoot, and gradients through many chunks explode. These do not (decision 20). What an earlier chunk wrote "delta"
# never erases, so it must write less.
STABLE_SCALES: dict[InnerRule, WriteScales] = {
    "dgd": WriteScales(0.5, 0.1),
    "gd": WriteScales(0.5, 0.1),
    "delta": WriteScales(0.1, 0.1),
}


class MLPWeights(NamedTuple):
    """W2 and W1 of M memories, or something of their shape (a change of them, a momentum).

    Attributes:
        inner: W2 (..., H, M, hidden, K).
        outer: W1 (..., H, M, V, hidden).
    """

    inner: Tensor
    outer: Tensor

    def add(self, other: MLPWeights | None) -> MLPWeights:
        return self if other is None else MLPWeights(self.inner + other.inner, self.outer + other.outer)

    def where(self, rows: Tensor, other: MLPWeights) -> MLPWeights:
        """These weights in the chosen rows (B,), the others elsewhere."""
        mask = rows.view(-1, *[1] * (self.inner.ndim - 1))
        return MLPWeights(torch.where(mask, self.inner, other.inner), torch.where(mask, self.outer, other.outer))

    def zeros_like(self) -> MLPWeights:
        return MLPWeights(torch.zeros_like(self.inner), torch.zeros_like(self.outer))

    def detach(self) -> MLPWeights:
        return MLPWeights(self.inner.detach(), self.outer.detach())


class MLPMemory(nn.Module):
    """M two-layer memories for each of H heads. The parameters are the initial state, learnt across contexts (Eq. 28).

    W1 starts at zero, so that a residual memory starts as the identity, and W2 at twice a random orthogonal matrix:
    near zero silu halves its input, so the hidden features of a unit key start with its norm and its angles.

    A run of neighbours among them may have a narrower hidden layer. Their parameters are apart, and `initial` pads them
    with zeros: a hidden unit whose weights are all zero reads nothing, is written nothing and gets no gradient, so it
    stays as if it were not there.

    Args:
        heads: H.
        dim: K = V, the width of a head.
        memories: M.
        hidden: width of the hidden layer; None for `dim`.
        narrow: (first, stop), which memories are narrow.
        narrow_hidden: width of their hidden layer, at most `hidden`; None for `hidden`.
        empty: W1 of the last memory is zero at the start of a context, whatever its parameter holds, so that what is
            read there was written in the context. No gradient reaches it.

    Attributes:
        hidden: width of each memory's hidden layer, M numbers.
        narrow: (first, stop) of the memories whose parameters are apart; (0, 0) for none.
        inner, outer: W2 (H, ., hidden, K) and W1 (H, ., V, hidden) of all other memories.
        narrow_inner, narrow_outer: those of the narrow ones, or None.

    Raises:
        ValueError: if narrow_hidden is not between 1 and hidden, or narrow names memories that there are not.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        memories: int = 1,
        hidden: int | None = None,
        narrow: tuple[int, int] = (0, 0),
        narrow_hidden: int | None = None,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self.empty = empty
        if not 0 <= narrow[0] <= narrow[1] < max(memories, 1):
            raise ValueError(f"narrow: expected (first, stop) below the last of {memories} memories, got {narrow}")
        hidden = dim if hidden is None else hidden
        narrow_hidden = hidden if narrow_hidden is None else narrow_hidden
        if not 1 <= narrow_hidden <= hidden:
            raise ValueError(
                f"narrow_hidden: expected a width from 1 to that of the other memories, {hidden}; got {narrow_hidden}"
            )
        self.narrow = narrow if narrow_hidden < hidden else (0, 0)
        first, stop = self.narrow
        self.hidden = tuple(narrow_hidden if first <= m < stop else hidden for m in range(memories))
        self.inner, self.outer = _initial_maps(heads, memories - (stop - first), hidden, dim)
        self.narrow_inner: nn.Parameter | None = None
        self.narrow_outer: nn.Parameter | None = None
        if first < stop:
            self.narrow_inner, self.narrow_outer = _initial_maps(heads, stop - first, narrow_hidden, dim)

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """inner, outer, narrow_inner and narrow_outer, at least fp32."""
        dtype = torch.promote_types(self.inner.dtype, torch.float32)
        inner, outer = self.inner.to(dtype), self.outer.to(dtype)
        if self.empty:
            outer = torch.cat([outer[:, :-1], torch.zeros_like(outer[:, -1:])], dim=1)
        if self.narrow_inner is None or self.narrow_outer is None:
            return inner, outer, None, None
        return inner, outer, self.narrow_inner.to(dtype), self.narrow_outer.to(dtype)

    @property
    def initial(self) -> MLPWeights:
        """W2 (H, M, hidden, K) and W1 (H, M, V, hidden) at the start of a context, at least fp32."""
        inner, outer, narrow_inner, narrow_outer = self.maps
        if narrow_inner is None or narrow_outer is None:
            return MLPWeights(inner, outer)
        first = self.narrow[0]
        missing = max(self.hidden) - self.hidden[first]
        padded = F.pad(narrow_inner, (0, 0, 0, missing)), F.pad(narrow_outer, (0, missing))
        return MLPWeights(
            *(
                torch.cat([wide[:, :first], apart, wide[:, first:]], dim=1)
                for wide, apart in zip((inner, outer), padded, strict=True)
            )
        )


def _initial_maps(heads: int, memories: int, hidden: int, dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    inner = torch.empty(heads, memories, hidden, dim)
    for weight in inner.flatten(0, 1):
        weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain=2.0))
    return nn.Parameter(inner), nn.Parameter(torch.zeros(heads, memories, dim, hidden))


def read_mlp(weights: MLPWeights, x: Tensor) -> Tensor:
    """W1 silu(W2 x), without residual: x (..., M, T, K) -> (..., M, T, V)."""
    return F.silu(x @ weights.inner.mT) @ weights.outer.mT


class WriteGates(NamedTuple):
    """What decides how strongly the tokens of a chunk are written; shared by all memories of a layer.

    Attributes:
        gate: (B, H, C), s in (0, 1).
        retain: alpha (B, H, C) in (0, 1].
        decay: factors of the chunk from retain and momentum.
        momentum: (B, H, C) in [0, 1), or None.
        active: (B, 1, C) bool, False where there is no token; None if all are tokens.
    """

    gate: Tensor
    retain: Tensor
    decay: Decay
    momentum: Tensor | None
    active: Tensor | None


def write_strengths(
    gates: WriteGates, squared_norm: Tensor, *, rule: InnerRule, negative_eigenvalues: bool
) -> tuple[Tensor | None, Tensor]:
    """erase and write for keys of the given squared norm.

    A gate s gives the exact proximal step of Eq. 56 for any norm: erase = write = s / (1 - s + s |a|^2), which is s for
    a unit key. With negative eigenvalues erase |a|^2 reaches 1 + retain, so that the map of M along the key reaches -1
    and stays a contraction. Momentum enters averaged: the write is multiplied by 1 - momentum.

    Args:
        gates: of the chunk.
        squared_norm: (B, H, C), or (B, H, M, C) for keys that differ between memories.
        rule: "gd" erases nothing; "dgd" and "delta" differ in what erase acts on, not in strength.
        negative_eigenvalues: see above.

    Returns:
        (erase or None, write), shaped like squared_norm.
    """
    differing = squared_norm.ndim > gates.gate.ndim

    def match(x: Tensor) -> Tensor:
        return x.unsqueeze(2) if differing else x

    gate = match(gates.gate)
    if negative_eigenvalues:
        reach = (1 + match(gates.retain)) / squared_norm.clamp_min(1.0)
        erase = gate * reach
        write = torch.minimum(erase, reach - erase)
    else:
        erase = write = gate / (1 - gate + gate * squared_norm)
    if gates.momentum is not None:
        write = write * (1 - match(gates.momentum))
    if gates.active is not None:
        active = match(gates.active)
        erase, write = erase * active, write * active
    return (None if rule == "gd" else erase), write


class MLPChunk(NamedTuple):
    """One written chunk of M memories.

    Attributes:
        weights: after the chunk.
        momentum: after the chunk, or None.
        inner, outer: what was written into W2 (values of all memories side by side) and into W1, for reads inside
            the chunk.
        hidden: (B, H, M, C, hidden), the keys of W1.
    """

    weights: MLPWeights
    momentum: MLPWeights | None
    inner: Written
    outer: Written
    hidden: Tensor


def write_mlp_chunk(
    running: MLPWeights,
    snapshot: MLPWeights,
    momentum: MLPWeights | None,
    outer_at_snapshot: Tensor,
    keys: Tensor,
    z: Tensor,
    hidden: Tensor,
    error: Tensor,
    gates: WriteGates,
    *,
    rule: InnerRule,
    negative_eigenvalues: bool = False,
    bound: float | None = None,
    scale: float | Tensor = 1.0,
) -> MLPChunk:
    """Writes a chunk of tokens into M memories (Eq. 88, 90). B rows, H heads, C tokens.

    Args:
        running: the changing part of the memories before the chunk, (B, H, M, ...).
        snapshot: that part at the end of the previous chunk; the rule "delta" erases only what came after it.
        momentum: like running, or None.
        outer_at_snapshot: the whole W1 at the snapshot, (B, H, M, V, hidden), through which the error goes back.
        keys: k (B, H, C, K), shared by all memories.
        z: W2 k at the snapshot (B, H, M, C, hidden).
        hidden: silu(z), the keys of W1.
        error: M(k) - target at the snapshot (B, H, M, C, V).
        gates: of the chunk.
        rule, negative_eigenvalues: see `write_strengths`.
        bound, scale: see `mlp_surprise`; a scale for each memory is (M, 1, 1).
    """
    surprise = mlp_error_surprise(outer_at_snapshot, keys, z, hidden, error, bound=bound, scale=scale)
    hidden, value = surprise.outer
    relative = rule == "delta"

    erase, write = write_strengths(gates, keys.square().sum(-1), rule=rule, negative_eigenvalues=negative_eigenvalues)
    image = surprise.inner.value.transpose(2, 3).flatten(3)  # (B, H, C, M * hidden)
    inner_written, inner, inner_momentum = write_chunk(
        running.inner.flatten(2, 3),
        keys,
        image * write[..., None],
        gates.decay,
        erase=erase,
        momentum_state=None if momentum is None else momentum.inner.flatten(2, 3),
        reference=snapshot.inner.flatten(2, 3) if relative else None,
    )

    erase, write = write_strengths(gates, hidden.square().sum(-1), rule=rule, negative_eigenvalues=negative_eigenvalues)
    outer_written, outer, outer_momentum = write_chunk(
        running.outer,
        hidden,
        value * write[..., None],
        per_memory(gates.decay),
        erase=erase,
        momentum_state=None if momentum is None else momentum.outer,
        reference=snapshot.outer if relative else None,
    )
    shape = running.inner.shape
    new_momentum = None
    if inner_momentum is not None and outer_momentum is not None:
        new_momentum = MLPWeights(inner_momentum.view(shape), outer_momentum)
    return MLPChunk(MLPWeights(inner.view(shape), outer), new_momentum, inner_written, outer_written, hidden)


def read_mlp_chunk(
    chunk: MLPChunk,
    base: MLPWeights | None,
    running: MLPWeights,
    momentum: MLPWeights | None,
    keys: Tensor,
    queries: Tensor,
    gates: WriteGates,
    *,
    read: ReadTiming,
) -> Tensor:
    """Reads the LAST of the M memories at every token of a chunk that was written: first W2, then W1.

    Args:
        chunk: from `write_mlp_chunk`.
        base: the part of the memories that does not change (H, M, ...), or None for zero.
        running, momentum: as before the chunk, (B, H, M, ...).
        keys: k (B, H, C, K).
        queries: (B, H, C, K).
        gates: of the chunk.
        read: "token" or "previous".

    Returns:
        W1_t silu(W2_t q_t), (B, H, C, V), without residual.
    """
    width = running.inner.shape[-2]
    z = read_chunk(
        last_memory(running.inner),
        queries,
        keys,
        Written(*(None if x is None else x[..., -width:] for x in chunk.inner)),  # type: ignore[arg-type]
        gates.decay,
        momentum_state=None if momentum is None else last_memory(momentum.inner),
        read=read,
    )
    if base is not None:
        z = z + queries @ base.inner[:, -1].mT
    features = F.silu(z)
    out = read_chunk(
        last_memory(running.outer),
        features,
        last_memory(chunk.hidden),
        Written(*(None if x is None else last_memory(x) for x in chunk.outer)),  # type: ignore[arg-type]
        gates.decay,
        momentum_state=None if momentum is None else last_memory(momentum.outer),
        read=read,
    )
    return out if base is None else out + features @ base.outer[:, -1].mT


def last_memory(x: Tensor) -> Tensor:
    """The last of the memories (B, H, M, ...) -> (B, H, ...). Of a single one a view, whose gradient is a view too."""
    return x.squeeze(2) if x.shape[2] == 1 else x[:, :, -1]


def per_memory(decay: Decay) -> Decay:
    """The same factors for keys that differ between memories: (B, H, ...) -> (B, H, 1, ...)."""
    return Decay(*(None if x is None else x.unsqueeze(2) for x in decay))  # type: ignore[arg-type]
