"""One token of a layer with two-layer memories by the compiled code of `nestlearn.functional.kernels.native`.

Without gradients and in place. `ChunkedMemoryLayer._token`, in PyTorch operations, is the specification.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.functional.kernels.native import Token, run_token
from nestlearn.functional.plain import held, is_plain, is_small, plain_weight
from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.layers.compiled_walk import READS, RULES, WalkPlan
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.short_convolution import ShortConvolution
from nestlearn.layers.streams import Streams

State = dict[str, Tensor]

READOUTS = ("gate_readout", "gate_bias", "retain_readout", "retain_bias", "momentum_readout", "momentum_bias")
BASE = ("inner", "outer", "narrow_inner", "narrow_outer")
MEMORIES = ("inner", "outer", "inner_snapshot", "outer_snapshot", "inner_momentum", "outer_momentum")


class SlowWeights(NamedTuple):
    """What no write changes between the input of a layer and its output.

    Attributes:
        projection, convolution: of the streams, (S D, D) and (conv_width, S D).
        gates: (G H, D), the linear map of the gates' logits, or None where memories make them.
        norm, gate, output: of the readout, (K), (D, D) and (D, D).
    """

    projection: Tensor
    convolution: Tensor
    gates: Tensor | None
    norm: Tensor
    gate: Tensor
    output: Tensor


def slow_weights(layer: nn.Module, x: Tensor, tail: Tensor) -> SlowWeights | None:
    """Those of a layer of memories, if the compiled code takes x (B, 1, D) through all of it, beside the tail."""
    if not is_small(x) or tail.dtype != x.dtype or not tail.is_contiguous():
        return None
    streams, readout, gates = (layer._modules.get(name) for name in ("streams", "readout", "gates"))
    if not is_plain(streams, Streams) or not is_plain(readout, GatedReadout):
        return None
    inside = streams._modules | readout._modules  # type: ignore[union-attr]
    projection, gate, output = (plain_weight(inside[name], nn.Linear, x) for name in ("projection", "gate", "output"))
    convolution = plain_weight(inside["convolution"], ShortConvolution, x)
    norm = plain_weight(inside["norm"], RMSNorm, x)
    given = plain_weight(gates, nn.Linear, x)
    if projection is None or convolution is None or norm is None or gate is None or output is None:
        return None
    if given is None and gates is not None:
        return None
    channels, dim = projection.shape
    heads = int(streams.heads)  # type: ignore[union-attr, arg-type]
    if dim != x.shape[-1] or convolution.shape[1] != channels or not gate.shape == output.shape == (dim, dim):
        return None
    if norm.shape != (dim // heads,) or (given is not None and given.shape[0] % heads):
        return None
    return SlowWeights(projection, convolution, given, norm, gate, output)


def compiled_token_(
    plan: WalkPlan,
    layer: nn.Module,
    inputs: Tensor,
    state: State,
    *,
    heads: int,
    weights: SlowWeights | None,
    eps: float | None,
) -> Tensor:
    """One token on the CPU, in fp32 or fp64; writes memories, position and, with weights, the convolution's tail.

    Args:
        plan: of no segments.
        layer: whose memories, gates' read-outs and biases they are.
        inputs: x (B, 1, D) with weights, otherwise the streams and the gates' logits, (B, 1, S D + G H).
        state: of the layer, writable.
        heads: H.
        weights: of the whole layer, if the inputs are the layer's own.
        eps: of the readout's norm.

    Returns:
        the layer's output (B, 1, D) with weights, otherwise what the heads read, (B, H, 1, K).

    Raises:
        ValueError: if the state does not fit the inputs.
    """
    rows, dtype = inputs.shape[0], inputs.dtype
    memory = layer._modules["memory"]
    assert memory is not None
    momentum, own = bool(layer.momentum), plan.own_targets
    wanted = (own, True, own and plan.retention, plan.retention, own and momentum, momentum)
    given = [
        inputs,
        *(held(layer, name) if on else None for name, on in zip(READOUTS, wanted, strict=True)),
        *(memory.maps if memory.empty else (held(memory, name) for name in BASE)),  # type: ignore[misc]
    ]
    given = [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in given]
    pointers = [None if t is None else t.data_ptr() for t in given]
    memories, hidden = len(plan.hidden), max(plan.hidden)
    key = held(memory, "outer").shape[-2]  # type: ignore[union-attr]
    dim, streams = heads * key, 4 if own else 3
    changing = _pointers(state, rows, (heads, memories, hidden, key), dtype, 6 if momentum else 4)
    position, tail = state["position"], state["convolution"]
    if position.shape != (rows,) or position.dtype != torch.int64:
        raise ValueError(f"state: expected position as int64 of shape ({rows},), got {position.dtype} {position.shape}")
    if weights is None:
        out = torch.empty(rows, heads, 1, key, dtype=dtype)
        slow: list[int | None] = [None] * len(SlowWeights._fields)
    else:
        expected = (rows, weights.convolution.shape[0] - 1, streams * dim)
        if tail.shape != expected or inputs.shape != (rows, 1, dim):
            raise ValueError(
                f"state: expected a convolution of shape {expected} beside one token (B, 1, {dim}), got "
                f"{tuple(tail.shape)} beside {tuple(inputs.shape)}"
            )
        out = torch.empty(rows, 1, dim, dtype=dtype)
        slow = [None if w is None else w.data_ptr() for w in weights]
    first, stop = plan.narrow
    scales = (ctypes.c_double * memories)(*plan.scales)
    run_token(
        Token(
            rows=rows,
            heads=heads,
            memories=memories,
            projections=memories - 1 if own else 0,
            narrow_first=first,
            narrow_stop=stop,
            key=key,
            hidden=hidden,
            narrow=plan.hidden[first],
            dim=dim,
            streams=streams,
            logits=0 if own else 2 + momentum,
            taps=tail.shape[1] + 1,
            rule=RULES.index(plan.inner_rule),
            read=READS.index(plan.read),
            negative_eigenvalues=plan.negative_eigenvalues,
            own_targets=own,
            main_residual=plan.residual_memory,
            adaptive_query=plan.adaptive_query,
            to_initial=plan.to_initial,
            has_retain=plan.retention,
            has_momentum=momentum,
            threads=torch.get_num_threads(),
            wide=dtype == torch.float64,
            chunk=plan.chunk_size,
            projection_chunk=plan.projection_chunk_size,
            bound=plan.bound or 0.0,
            largest_gate=plan.largest_gate,
            eps=eps or 0.0,
            scales=ctypes.addressof(scales),
            position=position.data_ptr(),
            readouts=tuple(pointers[1:7]),
            base=tuple(pointers[7:9]),
            base_narrow=tuple(pointers[9:11]),
            state=tuple(changing),
            inputs=pointers[0],
            out=out.data_ptr(),
            projection=slow[0],
            convolution=slow[1],
            gates=slow[2],
            tail=tail.data_ptr(),
            norm=slow[3],
            gate=slow[4],
            output=slow[5],
        )
    )
    torch.autograd.graph.increment_version(
        [t for t in (position, tail, *(state[name] for name in MEMORIES if name in state)) if not t.is_inference()]
    )
    return out


def _pointers(
    state: State, rows: int, sizes: tuple[int, int, int, int], dtype: torch.dtype, count: int
) -> list[int | None]:
    """Those of the first `count` memories of a state, six or None, after a look at what they point to.

    sizes: H, M, hidden, K.
    """
    heads, memories, hidden, key = sizes
    inner, outer = (rows, heads, memories, hidden, key), (rows, heads, memories, key, hidden)
    pointers: list[int | None] = [None] * len(MEMORIES)
    for i, name in enumerate(MEMORIES[:count]):
        tensor, expected = state.get(name), outer if i % 2 else inner
        if tensor is None or tensor.shape != expected or tensor.dtype != dtype:
            found = "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"state: expected {name} as {dtype} of shape {expected}, got {found}")
        pointers[i] = tensor.data_ptr()
    return pointers
