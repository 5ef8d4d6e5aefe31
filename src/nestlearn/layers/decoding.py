"""What decoding shares: a state that may be written in place, and the ends of chunks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from nestlearn.memory.mlp import MLPMemory, MLPWeights

State = dict[str, Tensor]


def writable(state: State) -> State:
    """The same state for writing in place: a tensor is copied only if it cannot be written alone.

    That is so after a call of `forward`, whose snapshot may be the memory itself, or whose tensors may belong to a
    graph, and for rows that are expanded. What a decode step returned is never copied.
    """
    own: State = {}
    taken = set()
    frozen = not torch.is_inference_mode_enabled()
    for name, tensor in state.items():
        address = tensor.data_ptr()
        if address in taken or tensor.requires_grad or not tensor.is_contiguous() or (frozen and tensor.is_inference()):
            tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            address = tensor.data_ptr()
        taken.add(address)
        own[name] = tensor
    return own


class _Sum(NamedTuple):
    alive: ref[Tensor]
    versions: tuple[int, ...]
    weights: MLPWeights


# M_0 + D of the snapshots in use, by the id of their inner weights. To add up a whole state for each token would cost
# as much as all products with it.
_sums: dict[int, _Sum] = {}


def add_base(snapshot: MLPWeights, memory: MLPMemory) -> MLPWeights:
    """memory.initial + snapshot, remembered as long as the snapshot lives and until one of the two is changed.

    This is no state: what it returns is always the sum. Changes are told by the version counters of the tensors; one
    made through `.data`, which bypasses them, is seen at the end of the chunk only.
    """
    own = tuple(memory.parameters())
    try:
        versions = (
            *(snapshot.inner._version, snapshot.outer._version, id(snapshot.outer)),
            *(value for p in own for value in (p._version, id(p), p.data_ptr())),
        )
    except RuntimeError:  # inference tensors count no versions
        return snapshot.add(memory.initial)
    key = id(snapshot.inner)
    known = _sums.get(key)
    if known is None or known.versions != versions or known.alive() is not snapshot.inner:
        whole = snapshot.add(memory.initial)
        known = _sums[key] = _Sum(ref(snapshot.inner, lambda _: _sums.pop(key, None)), versions, whole)
    return known.weights


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Memories are written at least in fp32. Entering autocast is slow, so only where it is on."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def advance_(
    position: Tensor, running: MLPWeights, snapshot: MLPWeights, *, chunk_size: int, projection_chunk_size: int
) -> None:
    """Counts one token a row, in place; memories whose chunk ends with it take their running weights as snapshot.

    Args:
        position: (B,) places in the larger chunk, before the token.
        running, snapshot: (B, H, M, ...) each; the last memory works in chunks of `chunk_size`, those before it in
            chunks of `projection_chunk_size`.
    """
    position.add_(1)
    if chunk_size == projection_chunk_size:
        parts = [(chunk_size, slice(None))]
    else:
        parts = [(projection_chunk_size, slice(None, -1)), (chunk_size, slice(-1, None))]
    # On a CPU a look at the places is cheap, and most tokens end no chunk. Elsewhere it would wait for the device.
    places = position.tolist() if position.device.type == "cpu" else None
    for size, part in parts:
        rows: Tensor | None = None
        if places is not None:
            done = [place % size == 0 for place in places]
            if not any(done):
                continue
            if not all(done):
                rows = torch.tensor(done)
        else:
            rows = position % size == 0
        for old, new in zip(snapshot, running, strict=True):
            old, new = old[:, :, part], new[:, :, part]
            old.copy_(new if rows is None else torch.where(rows.view(-1, 1, 1, 1, 1), new, old))
    period = max(chunk_size, projection_chunk_size)
    if places is None or max(places, default=0) >= period:
        position.remainder_(period)
