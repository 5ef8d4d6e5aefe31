"""The forward kernel of the walk: one program for each head of each row, from its first chunk to its last.

Budget of one program at C = K = N = 64 (Hopper: 256 KiB of registers and 228 KiB of shared memory a multiprocessor).
Ten weight matrices in fp32 are 160 KiB; beside them a chunk holds the keys, the values, the decays, the inverse of the
inner maps and the handful of tiles of the memory in hand, 16 KiB each. Both do not fit, so the weights rest in global
memory: a program reads and writes each matrix once or twice a chunk, always its own 160 KiB, which stays in the second
level cache between chunks (132 programs: 21 of 50 MiB), about 5 TB/s against some fifty products of 64^3 a matrix. Only
where the backward needs the weights at every chunk's start do they go on to the main memory. At widths of 16 and 32 the
weights are 10 and 40 KiB and remain in the first level.

Loads of the state must not be hoisted over the stores of the chunk before: `num_stages=1` keeps the compiler from
pipelining the loop, and a barrier separates what different threads of a program store and load.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from nestlearn.functional.kernels.chunk import (
    decays,
    error_values,
    head_readouts,
    inverse_factor,
    keys_and_gates,
    new_map,
    outer_strength,
    read_map,
    write_map,
)
from nestlearn.functional.kernels.parts import (
    CHUNK,
    at,
    inverse_norm,
    load_map,
    load_tile,
    load_tokens,
    product,
    silu,
    store_tile,
    store_tokens,
    strength,
)


@triton.jit
def walk_forward(
    u,
    inner,
    outer,
    inner_momentum,
    outer_momentum,
    base_inner,
    base_outer,
    gate_readout,
    gate_bias,
    retain_readout,
    retain_bias,
    momentum_readout,
    momentum_bias,
    out,
    heads,
    tokens,
    stream,
    slots,
    step,
    main_scale,
    projection_scale,
    largest_gate,
    bound,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    RULE: tl.constexpr,
    READ: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BOUNDED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Walks all chunks.

    Args:
        u: (4, B, H, T, K), the streams q, k, v, g; `stream` elements each.
        inner, outer: (B, H, slots, M, N, K) and (B, H, slots, M, K, N). Slot 0 holds the state at the call's start.
        inner_momentum, outer_momentum: like them, or None.
        base_inner, base_outer: (H, M, N, K) and (H, M, K, N), or None.
        *_readout, *_bias: (H, K) and (H,), or None.
        out: (B, H, T, K).
        slots, step: the state after chunk i is stored in slot (i + 1) * step: step 1 keeps all, step 0 the last.
    """
    row = tl.program_id(0).to(tl.int64)  # of B * H
    stream = tl.cast(stream, tl.int64)
    head = row % heads
    SIZE: tl.constexpr = M * N * K
    readouts = head_readouts(
        head, gate_readout, gate_bias, retain_readout, retain_bias, momentum_readout, momentum_bias, K
    )
    base = (at(base_inner, head * SIZE), at(base_outer, head * SIZE))
    u += row * tokens * K
    out += row * tokens * K
    inner += row * slots * SIZE
    outer += row * slots * SIZE
    inner_momentum = at(inner_momentum, row * slots * SIZE)
    outer_momentum = at(outer_momentum, row * slots * SIZE)

    for chunk in range(tl.cdiv(tokens, C)):
        start = chunk * C
        active = start + tl.arange(0, C) < tokens
        here = (chunk * step).to(tl.int64) * SIZE
        weights = (inner + here, outer + here)
        moments = (at(inner_momentum, here), at(outer_momentum, here))
        there = step * SIZE
        keys, values, _, _, gate, log_retain, log_momentum = keys_and_gates(
            u, stream, weights, base, readouts, start, tokens, largest_gate, C, K, N, OPERAND
        )
        momentum_kept = tl.exp(log_momentum) if MOMENTUM else tl.full((C,), 0.0, tl.float32)
        decay = decays(log_retain, log_momentum, active, C, MOMENTUM)

        # Eq. 88: the inner maps of all memories have the key k, so they share K K^T and its inverse.
        gram = product(keys, tl.trans(keys), OPERAND)
        erase = strength(gate, tl.sum(keys * keys, 1))
        write = erase * (1 - momentum_kept)
        inverse = inverse_factor(gram, erase, decay, C, RULE)
        shared = (keys, values, gate, momentum_kept, gram, erase, write, inverse, bound)
        for index in range(M - 1):
            _write_memory(
                index, shared, weights, moments, base, decay, there, projection_scale,
                C, K, N, False, RULE, MOMENTUM, BOUNDED, OPERAND,
            )  # fmt: skip
        raw_queries = load_tokens(u, start, tokens, C, K)
        queries = raw_queries * inverse_norm(raw_queries)[:, None]
        if READ == CHUNK:
            # Before the main memory is written, with step 0 to the same place.
            whole_inner = load_map(weights[0], base[0], (M - 1) * N * K, N, K)[1]
            whole_outer = load_map(weights[1], base[1], (M - 1) * K * N, K, N)[1]
            features = silu(product(queries, tl.trans(whole_inner), OPERAND))
            output = product(features, tl.trans(whole_outer), OPERAND)
        before_inner, before_outer, moment_inner, moment_outer, hidden, inner_written, inner_erased, written, erased = (
            _write_memory(
                M - 1, shared, weights, moments, base, decay, there, main_scale,
                C, K, N, True, RULE, MOMENTUM, BOUNDED, OPERAND,
            )
        )  # fmt: skip
        if READ != CHUNK:
            z = read_map(
                queries, keys, before_inner, moment_inner, inner_written, inner_erased, base[0], (M - 1) * N * K, decay,
                N, K, RULE, MOMENTUM, READ, OPERAND,
            )  # fmt: skip
            output = read_map(
                silu(z), hidden, before_outer, moment_outer, written, erased, base[1], (M - 1) * K * N, decay,
                K, N, RULE, MOMENTUM, READ, OPERAND,
            )  # fmt: skip
        store_tokens(out, output, start, tokens, C, K)
        tl.debug_barrier()


@triton.jit
def _write_memory(
    index,
    shared,
    weights,
    moments,
    base,
    decay,
    there,
    scale,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    MAIN: tl.constexpr,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BOUNDED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Writes the chunk into one memory and stores it `there` elements on; returns what reads inside the chunk need."""
    keys, values, gate, momentum_kept, gram, erase, write, inverse, bound = shared
    inner_offset, outer_offset = index * N * K, index * K * N
    inner, whole_inner = load_map(weights[0], base[0], inner_offset, N, K)
    outer, whole_outer = load_map(weights[1], base[1], outer_offset, K, N)
    inner_momentum, outer_momentum = inner, outer
    if MOMENTUM:
        inner_momentum = load_tile(moments[0] + inner_offset, N, K)
        outer_momentum = load_tile(moments[1] + outer_offset, K, N)
    z, _, _, _, value, _, image, image_factor = error_values(
        keys, values, whole_inner, whole_outer, bound, MAIN, BOUNDED, OPERAND
    )
    # With step 0 the new weights replace those that other threads may still be loading.
    tl.debug_barrier()

    inner_values = image * (image_factor * write * scale)[:, None]
    inner_written, inner_erased, _, _, _ = write_map(
        keys, gram, inverse, inner, inner_momentum, inner_values, erase, decay, RULE, MOMENTUM, OPERAND
    )
    after, moved = new_map(keys, inner_written, inner_erased, inner, inner_momentum, decay, RULE, MOMENTUM, OPERAND)
    store_tile(weights[0] + there + inner_offset, after, N, K)
    if MOMENTUM:
        store_tile(moments[0] + there + inner_offset, moved, N, K)

    hidden = silu(z)
    outer_erase, outer_write = outer_strength(gate, hidden, momentum_kept)
    outer_gram = product(hidden, tl.trans(hidden), OPERAND)
    outer_inverse = inverse_factor(outer_gram, outer_erase, decay, C, RULE)
    written, erased, _, _, _ = write_map(
        hidden, outer_gram, outer_inverse, outer, outer_momentum, value * (outer_write * scale)[:, None], outer_erase,
        decay, RULE, MOMENTUM, OPERAND,
    )  # fmt: skip
    after, moved = new_map(hidden, written, erased, outer, outer_momentum, decay, RULE, MOMENTUM, OPERAND)
    store_tile(weights[1] + there + outer_offset, after, K, N)
    if MOMENTUM:
        store_tile(moments[1] + there + outer_offset, moved, K, N)
    return inner, outer, inner_momentum, outer_momentum, hidden, inner_written, inner_erased, written, erased
