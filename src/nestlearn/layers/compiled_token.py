"""One token of a layer with two-layer memories by the compiled code of `nestlearn.functional.kernels.native`.

Without gradients and in place. `ChunkedMemoryLayer._token`, in PyTorch operations, is the specification.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.functional.kernels.native import Token, run_token
from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.layers.compiled_walk import READS, RULES, Maps, WalkPlan
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.short_convolution import ShortConvolution
from nestlearn.layers.streams import Streams

State = dict[str, Tensor]
Readouts = tuple[Tensor | None, ...]

# From so many rows on, the matrix products of the library are faster than one row of weights after the other.
MANY = 4
PLAIN = (Streams, ShortConvolution, GatedReadout, RMSNorm, nn.Linear)
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


def slow_weights(streams: Streams, gates: nn.Linear | None, readout: GatedReadout) -> SlowWeights | None:
    """The weights of these modules, or None if one of them does more than what its class says."""
    norm, gate, output = readout.norm, readout.gate, readout.output
    projection, convolution = streams.projection, streams.convolution
    for module in (streams, projection, convolution, readout, norm, gate, output, gates):
        if module is not None and (type(module) not in PLAIN or module._forward_hooks or module._forward_pre_hooks):
            return None
    if not (projection.bias is gate.bias is output.bias is None and (gates is None or gates.bias is None)):
        return None
    given = None if gates is None else gates.weight
    return SlowWeights(projection.weight, convolution.weight, given, norm.weight, gate.weight, output.weight)


def fits(x: Tensor, state: State, weights: SlowWeights) -> bool:
    """Whether the compiled code takes x (B, 1, D) through the whole layer: few rows, one dtype throughout."""
    dtype = x.dtype
    if len(x) >= MANY or dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    return state["inner"].dtype == dtype and all(
        t is None or (t.dtype == dtype and t.is_cpu and t.is_contiguous()) for t in (*weights, state["convolution"])
    )


def compiled_token_(
    plan: WalkPlan,
    inputs: Tensor,
    readouts: Readouts,
    base: Maps,
    state: State,
    *,
    heads: int,
    logits: int,
    weights: SlowWeights | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One token on the CPU, in fp32 or fp64; writes memories, position and, with weights, the convolution's tail.

    Args:
        plan: of no segments.
        inputs: x (B, 1, D) with weights, otherwise the streams and the gates' logits, (B, 1, S D + G H).
        readouts: (H, K) and biases (H,) of the gates as in `GateReadouts`, six or None; biases alone where logits are given.
        base: the initial memories, as `MLPMemory.maps`.
        state: of the layer, writable.
        heads: H.
        logits: G, 0 where memories make them.
        weights, eps: those of the whole layer, if the inputs are the layer's own; `eps` of the readout's norm.

    Returns:
        the layer's output (B, 1, D) with weights, otherwise what the heads read, (B, H, 1, K).

    Raises:
        ValueError: if the state does not fit the inputs.
    """
    rows, dtype = inputs.shape[0], inputs.dtype
    memories, hidden = len(plan.hidden), max(plan.hidden)
    key = base[1].shape[-2]
    dim = heads * key
    count = 4 if plan.own_targets else 3
    inner, outer = (rows, heads, memories, hidden, key), (rows, heads, memories, key, hidden)
    changing = [state.get(name) for name in MEMORIES]
    for i, tensor in enumerate(changing):
        if tensor is not None and (tensor.shape != (outer if i % 2 else inner) or tensor.dtype != dtype):
            raise ValueError(
                f"state: expected {MEMORIES[i]} as {dtype} of shape {outer if i % 2 else inner}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}"
            )
    position, tail = state["position"], state["convolution"]
    if position.shape != (rows,) or position.dtype != torch.int64:
        raise ValueError(f"state: expected position as int64 of shape ({rows},), got {position.dtype} {position.shape}")
    taps = tail.shape[1] + 1
    given = [t if t is None else t.contiguous() for t in (inputs, *readouts, *base)]
    if weights is None:
        out = inputs.new_empty(rows, heads, 1, key)
        slow: tuple[int | None, ...] = (None,) * 6
    else:
        if tail.shape[0] != rows or tail.shape[2] != count * dim or weights.convolution.shape[0] != taps:
            raise ValueError(f"state: expected a tail of {rows} rows, got shape {tuple(tail.shape)}")
        out = inputs.new_empty(rows, 1, dim)
        slow = tuple(None if w is None else w.data_ptr() for w in weights)
    first, stop = plan.narrow
    pointers = [None if t is None else t.data_ptr() for t in given]
    run_token(
        Token(
            rows=rows,
            heads=heads,
            memories=memories,
            projections=memories - 1 if plan.own_targets else 0,
            narrow_first=first,
            narrow_stop=stop,
            key=key,
            hidden=hidden,
            narrow=plan.hidden[first],
            dim=dim,
            streams=count,
            logits=logits,
            taps=taps,
            rule=RULES.index(plan.inner_rule),
            read=READS.index(plan.read),
            negative_eigenvalues=plan.negative_eigenvalues,
            own_targets=plan.own_targets,
            main_residual=plan.residual_memory,
            adaptive_query=plan.adaptive_query,
            to_initial=plan.to_initial,
            has_retain=plan.retention,
            has_momentum=changing[4] is not None,
            threads=torch.get_num_threads(),
            wide=dtype == torch.float64,
            chunk=plan.chunk_size,
            projection_chunk=plan.projection_chunk_size,
            bound=plan.bound or 0.0,
            largest_gate=plan.largest_gate,
            scale=plan.scales[-1],
            projection_scale=plan.scales[0],
            eps=eps,
            position=position.data_ptr(),
            readouts=tuple(pointers[1:7]),
            base=tuple(pointers[7:9]),
            base_narrow=tuple(pointers[9:11]),
            state=tuple(None if t is None else t.data_ptr() for t in changing),
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
    return out
