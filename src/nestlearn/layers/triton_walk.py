"""The walk of self-modifying Titans by the Triton kernels of `nestlearn.functional.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.functional.kernels import available
from nestlearn.layers.compiled_walk import GateReadouts, WalkPlan, WalkState
from nestlearn.memory.mlp import MLPWeights

# Chunk sizes and widths of heads and hidden layers that the kernels are written for.
SIZES = (16, 32, 64)


def triton_refusal(plan: WalkPlan, width: int) -> str | None:
    """Why the kernels cannot walk a layer of these settings here, or None if they can.

    Args:
        plan: of the layer.
        width: of a head.
    """
    if not available():
        return "Triton is not installed (pip install 'nestlearn[kernels]'), or there is no CUDA device"
    fits = {
        "mixer": plan.own_targets,
        "residual_memory": not plan.residual_memory,
        "adaptive_query": not plan.adaptive_query,
        "negative_eigenvalues": not plan.negative_eigenvalues,
        "detach_every": plan.detach_every is None,
        "static_projections": len(set(plan.scales[:-1])) <= 1,
        "projection_chunk_size": plan.projection_chunk_size == plan.chunk_size,
    }
    unfit = [name for name, fit in fits.items() if not fit]
    if unfit:
        return f"the kernels do not know this setting of {', '.join(unfit)}"
    sizes = {"chunk_size": plan.chunk_size, "the width of a head": width, "memory_hidden": plan.hidden[-1]}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size not in SIZES]
    return f"expected sizes of {', '.join(map(str, SIZES))}, got {', '.join(wrong)}" if wrong else None


def triton_walk(
    plan: WalkPlan,
    streams: Tensor,
    readouts: GateReadouts,
    base: MLPWeights,
    state: WalkState,
    operand: torch.dtype,
) -> tuple[Tensor, WalkState]:
    """As `nestlearn.layers.compiled_walk.compiled_walk`, for rows that all begin a chunk and have all their tokens.

    Args:
        plan: of the layer; its segments are not looked at.
        operand: the type in which operands of products are rounded.
    """
    from nestlearn.functional.kernels import self_modifying_walk

    tokens = streams.shape[3]
    whole = tokens - tokens % plan.chunk_size
    fixed = base if plan.to_initial else (None, None)
    slow = [None if r is None else r.float() for r in readouts]
    outputs = []
    # The last, partial chunk apart: what it starts from is the snapshot afterwards.
    for part in streams.float().split([whole, tokens - whole], dim=3):
        if not part.shape[3]:
            continue
        walk = self_modifying_walk(
            part,
            *state.running,
            *fixed,
            *slow,
            *(state.momentum or (None, None)),
            chunk_size=plan.chunk_size,
            main_scale=plan.scales[-1],
            projection_scale=plan.scales[0],
            rule=plan.inner_rule,
            read=plan.read,
            bound=plan.bound,
            largest_gate=plan.largest_gate,
            operand=operand,
        )
        running = MLPWeights(walk.inner, walk.outer)
        momentum = None
        if walk.inner_momentum is not None and walk.outer_momentum is not None:
            momentum = MLPWeights(walk.inner_momentum, walk.outer_momentum)
        snapshot = state.running if part.shape[3] % plan.chunk_size else running
        state = WalkState(running, snapshot, momentum)
        outputs.append(walk.out)
    return torch.cat(outputs, dim=2), state
