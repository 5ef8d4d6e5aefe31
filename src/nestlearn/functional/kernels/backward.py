"""The backward kernel of the walk: one program for each head of each row, from its last chunk to its first.

The forward kept the weights at every chunk's start; a program recomputes the chunk from them and goes back through it.
The gradients of the running state (and, where a part of the memories is fixed, of that part, summed over the chunks)
rest in global memory like the weights do in the forward, and for the same reasons: `forward` has the budget. Each head
of each row has its own buffers and sums over rows follow outside, so that equal inputs give equal gradients, bit for
bit: nothing is added atomically.
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
    outer_strength,
    read_map,
    write_map,
)
from nestlearn.functional.kernels.gradients import (
    decays_gradient,
    error_values_gradient,
    factor_gradient,
    no_flow,
    project_gradient,
    read_map_gradient,
    strength_gradient,
    write_map_gradient,
)
from nestlearn.functional.kernels.parts import (
    CHUNK,
    GD,
    at,
    inverse_norm,
    load_map,
    load_tile,
    load_tokens,
    normalize_gradient,
    product,
    silu,
    silu_slope,
    store_tile,
    store_tokens,
    strength,
)


@triton.jit
def walk_backward(
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
    to_out,
    to_u,
    to_inner,
    to_outer,
    to_inner_momentum,
    to_outer_momentum,
    to_base_inner,
    to_base_outer,
    to_gate_readout,
    to_gate_bias,
    to_retain_readout,
    to_retain_bias,
    to_momentum_readout,
    to_momentum_bias,
    heads,
    tokens,
    stream,
    slots,
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
    """Walks all chunks backwards.

    Args:
        u to momentum_bias, heads to bound: as in `walk_forward` with step 1, after it.
        to_out: gradient of out, (B, H, T, K).
        to_u: receives the gradient of u.
        to_inner to to_outer_momentum: (B, H, M, ...); gradients of the final state, replaced by those of the first.
        to_base_inner, to_base_outer: (B, H, M, ...), zeros on entry: receive each row's gradient; or None.
        to_*_readout, to_*_bias: (B, H, K) and (B, H): receive each row's gradient; or None.
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
    to_u += row * tokens * K
    to_out += row * tokens * K
    inner += row * slots * SIZE
    outer += row * slots * SIZE
    inner_momentum = at(inner_momentum, row * slots * SIZE)
    outer_momentum = at(outer_momentum, row * slots * SIZE)
    to_weights = (to_inner + row * SIZE, to_outer + row * SIZE)
    to_moments = (at(to_inner_momentum, row * SIZE), at(to_outer_momentum, row * SIZE))
    to_base = (at(to_base_inner, row * SIZE), at(to_base_outer, row * SIZE))

    gate_sum = tl.full((K,), 0.0, tl.float32)
    gate_bias_sum = tl.full([], 0.0, tl.float32)
    retain_sum = tl.full((K,), 0.0, tl.float32)
    retain_bias_sum = tl.full([], 0.0, tl.float32)
    momentum_sum = tl.full((K,), 0.0, tl.float32)
    momentum_bias_sum = tl.full([], 0.0, tl.float32)
    chunks = tl.cdiv(tokens, C)
    for done in range(chunks):
        chunk = chunks - 1 - done
        start = chunk * C
        active = start + tl.arange(0, C) < tokens
        here = chunk.to(tl.int64) * SIZE
        weights = (inner + here, outer + here)
        moments = (at(inner_momentum, here), at(outer_momentum, here))
        keys, values, inverse_keys, inverse_values, gate, log_retain, log_momentum = keys_and_gates(
            u, stream, weights, base, readouts, start, tokens, largest_gate, C, K, N, OPERAND
        )
        momentum_kept = tl.exp(log_momentum) if MOMENTUM else tl.full((C,), 0.0, tl.float32)
        decay = decays(log_retain, log_momentum, active, C, MOMENTUM)
        squared_norm = tl.sum(keys * keys, 1)
        gram = product(keys, tl.trans(keys), OPERAND)
        erase = strength(gate, squared_norm)
        inverse = inverse_factor(gram, erase, decay, C, RULE)
        shared = (keys, values, gate, momentum_kept, gram, erase, erase * (1 - momentum_kept), inverse, bound)

        # Gradients of keys, values, gate, momentum, erase and write of the inner maps, their factor, their K K^T.
        no_row = tl.full((C,), 0.0, tl.float32)
        no_tokens = tl.full((C, K), 0.0, tl.float32)
        to_factor = tl.full((C, C), 0.0, tl.float32) if RULE != GD else no_row
        to_gram = tl.full((C, C), 0.0, tl.float32) if MOMENTUM and RULE != GD else no_row
        back = (no_tokens, no_tokens, no_row, no_row, no_row, no_row, to_factor, to_gram)
        flow = no_flow(C, MOMENTUM)
        raw_queries = load_tokens(u, start, tokens, C, K)
        inverse_queries = inverse_norm(raw_queries)
        queries = raw_queries * inverse_queries[:, None]
        output = load_tokens(to_out, start, tokens, C, K)
        to_queries, back, flow = _memory_gradient(
            M - 1, shared, queries, output, weights, moments, base, to_weights, to_moments, to_base, decay, back, flow,
            main_scale, C, K, N, True, RULE, READ, MOMENTUM, BOUNDED, OPERAND,
        )  # fmt: skip
        to_raw = normalize_gradient(to_queries, queries, inverse_queries)
        store_tokens(to_u, to_raw, start, tokens, C, K)
        for index in range(M - 1):
            _, back, flow = _memory_gradient(
                index, shared, queries, output, weights, moments, base, to_weights, to_moments, to_base, decay, back,
                flow, projection_scale, C, K, N, False, RULE, READ, MOMENTUM, BOUNDED, OPERAND,
            )  # fmt: skip
        to_keys, to_values, to_gate, to_kept, to_erase, to_write, to_factor, to_gram = back
        if RULE != GD:
            more_keys, more_erase, flow = factor_gradient(
                to_factor, to_gram, keys, gram, erase, decay, flow, MOMENTUM, OPERAND
            )
            to_keys += more_keys
            to_erase += more_erase
        more_gate, to_norm, more_kept = strength_gradient(to_erase, to_write, gate, squared_norm, momentum_kept)
        to_gate += more_gate
        to_kept += more_kept
        to_keys += 2 * to_norm[:, None] * keys
        to_retain, to_momentum = decays_gradient(flow, decay, active, C, MOMENTUM)

        # The logits. Where there is no token the gate is 0 and the others 1, and each of these is 0.
        gate_logits = to_gate * gate * (1 - gate / largest_gate)
        to_rate = gate_logits[:, None] * tl.load(readouts[0] + tl.arange(0, K))[None, :]
        if MOMENTUM:
            momentum_logits = (to_momentum + to_kept * momentum_kept) * (1 - momentum_kept)
            to_rate += momentum_logits[:, None] * tl.load(readouts[4] + tl.arange(0, K))[None, :]
        rate, to_stream = _projection_gradient(
            u + 3 * stream, 2, to_rate, weights, base, to_weights, to_base, start, tokens, C, K, N, OPERAND
        )
        gate_sum += tl.sum(gate_logits[:, None] * rate, 0)
        gate_bias_sum += tl.sum(gate_logits, 0)
        if MOMENTUM:
            momentum_sum += tl.sum(momentum_logits[:, None] * rate, 0)
            momentum_bias_sum += tl.sum(momentum_logits, 0)
        if retain_readout is not None:
            retain_logits = to_retain * (1 - tl.exp(log_retain))
            to_retention = retain_logits[:, None] * tl.load(readouts[2] + tl.arange(0, K))[None, :]
            retention, more_stream = _projection_gradient(
                u + 3 * stream, 3, to_retention, weights, base, to_weights, to_base, start, tokens, C, K, N, OPERAND
            )
            to_stream += more_stream
            retain_sum += tl.sum(retain_logits[:, None] * retention, 0)
            retain_bias_sum += tl.sum(retain_logits, 0)
        store_tokens(to_u + 3 * stream, to_stream, start, tokens, C, K)
        to_raw = tl.where(active[:, None], normalize_gradient(to_keys, keys, inverse_keys), 0.0)
        _, to_stream = _projection_gradient(
            u + stream, 0, to_raw, weights, base, to_weights, to_base, start, tokens, C, K, N, OPERAND
        )
        store_tokens(to_u + stream, to_stream, start, tokens, C, K)
        to_raw = tl.where(active[:, None], normalize_gradient(to_values, values, inverse_values), 0.0)
        _, to_stream = _projection_gradient(
            u + 2 * stream, 1, to_raw, weights, base, to_weights, to_base, start, tokens, C, K, N, OPERAND
        )
        store_tokens(to_u + 2 * stream, to_stream, start, tokens, C, K)
        tl.debug_barrier()

    columns = tl.arange(0, K)
    tl.store(to_gate_readout + row * K + columns, gate_sum)
    tl.store(to_gate_bias + row, gate_bias_sum)
    if retain_readout is not None:
        tl.store(to_retain_readout + row * K + columns, retain_sum)
        tl.store(to_retain_bias + row, retain_bias_sum)
    if MOMENTUM:
        tl.store(to_momentum_readout + row * K + columns, momentum_sum)
        tl.store(to_momentum_bias + row, momentum_bias_sum)


@triton.jit
def _memory_gradient(
    index,
    shared,
    queries,
    output,
    weights,
    moments,
    base,
    to_weights,
    to_moments,
    to_base,
    decay,
    back,
    flow,
    scale,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    MAIN: tl.constexpr,
    RULE: tl.constexpr,
    READ: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BOUNDED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Goes back through the errors and writes of one memory, and for the main memory through its reads.

    It replaces the gradients of the memory after the chunk by those before it. Returns the gradient of the queries (of
    the main memory only), back and flow.
    """
    keys, values, gate, momentum_kept, gram, erase, write, inverse, bound = shared
    to_keys, to_values, to_gate, to_kept, to_erase, to_write, to_factor, to_gram = back
    inner_at, outer_at = index * N * K, index * K * N
    no_inner, no_outer = tl.full((N, K), 0.0, tl.float32), tl.full((K, N), 0.0, tl.float32)

    # W1, whose keys are the hidden features.
    inner, whole_inner = load_map(weights[0], base[0], inner_at, N, K)
    outer, whole_outer = load_map(weights[1], base[1], outer_at, K, N)
    inner_momentum, outer_momentum = inner, outer
    if MOMENTUM:
        inner_momentum = load_tile(moments[0] + inner_at, N, K)
        outer_momentum = load_tile(moments[1] + outer_at, K, N)
    z, _, _, _, value, _, image, image_factor = error_values(
        keys, values, whole_inner, whole_outer, bound, MAIN, BOUNDED, OPERAND
    )
    image *= image_factor[:, None]
    hidden = silu(z)
    squared_norm = tl.sum(hidden * hidden, 1)
    outer_erase, outer_write = outer_strength(gate, hidden, momentum_kept)
    outer_gram = product(hidden, tl.trans(hidden), OPERAND)
    outer_inverse = inverse_factor(outer_gram, outer_erase, decay, C, RULE)
    outer_values = value * (outer_write * scale)[:, None]
    made = write_map(
        hidden, outer_gram, outer_inverse, outer, outer_momentum, outer_values, outer_erase, decay,
        RULE, MOMENTUM, OPERAND,
    )  # fmt: skip

    # Reads inside the chunk: they reach what was written and erased, both maps, and what is fixed of them.
    to_queries = queries
    to_hidden = tl.full((C, N), 0.0, tl.float32)
    outer_read, outer_read_erased = tl.full((C, K), 0.0, tl.float32), tl.full((C, K), 0.0, tl.float32)
    inner_read, inner_read_erased = tl.full((C, N), 0.0, tl.float32), tl.full((C, N), 0.0, tl.float32)
    read_to_inner, moment_to_inner = no_inner, no_inner
    read_to_outer, moment_to_outer = no_outer, no_outer
    if MAIN:
        if READ == CHUNK:
            z_query = product(queries, tl.trans(whole_inner), OPERAND)
            read_to_outer = product(tl.trans(output), silu(z_query), OPERAND)
            to_z = product(output, whole_outer, OPERAND) * silu_slope(z_query)
            read_to_inner = product(tl.trans(to_z), queries, OPERAND)
            to_queries = product(to_z, whole_inner, OPERAND)
            if base[0] is not None:
                _add_tile(to_base[0] + inner_at, read_to_inner, N, K)
                _add_tile(to_base[1] + outer_at, read_to_outer, K, N)
        else:
            inner_values = image * (write * scale)[:, None]
            written, erased, _, _, _ = write_map(
                keys, gram, inverse, inner, inner_momentum, inner_values, erase, decay, RULE, MOMENTUM, OPERAND
            )
            z_query = read_map(
                queries, keys, inner, inner_momentum, written, erased, base[0], inner_at, decay,
                N, K, RULE, MOMENTUM, READ, OPERAND,
            )  # fmt: skip
            features = silu(z_query)
            to_features, to_hidden, outer_read, outer_read_erased, read_to_outer, moment_to_outer, flow = (
                read_map_gradient(
                    output, features, hidden, outer, outer_momentum, made[0], made[1], decay, flow,
                    RULE, MOMENTUM, READ, OPERAND,
                )
            )  # fmt: skip
            if base[1] is not None:
                _add_tile(to_base[1] + outer_at, product(tl.trans(output), features, OPERAND), K, N)
                to_features += product(output, load_tile(base[1] + outer_at, K, N), OPERAND)
            to_z = to_features * silu_slope(z_query)
            to_queries, more_keys, inner_read, inner_read_erased, read_to_inner, moment_to_inner, flow = (
                read_map_gradient(
                    to_z, queries, keys, inner, inner_momentum, written, erased, decay, flow,
                    RULE, MOMENTUM, READ, OPERAND,
                )
            )  # fmt: skip
            to_keys += more_keys
            if base[0] is not None:
                _add_tile(to_base[0] + inner_at, product(tl.trans(to_z), queries, OPERAND), N, K)
                to_queries += product(to_z, load_tile(base[0] + inner_at, N, K), OPERAND)

    after = load_tile(to_weights[1] + outer_at, K, N)
    after_momentum = after
    if MOMENTUM:
        after_momentum = load_tile(to_moments[1] + outer_at, K, N)
    to_map, to_moment, more_hidden, to_map_values, to_map_erase, map_factor, map_to_gram, flow = write_map_gradient(
        hidden, outer_gram, outer_inverse, outer, outer_momentum, outer_values, outer_erase, decay, made,
        after, after_momentum, outer_read, outer_read_erased, flow, RULE, MOMENTUM, OPERAND,
    )  # fmt: skip
    to_hidden += more_hidden
    if RULE != GD:
        more_hidden, more_erase, flow = factor_gradient(
            map_factor, map_to_gram, hidden, outer_gram, outer_erase, decay, flow, MOMENTUM, OPERAND
        )
        to_hidden += more_hidden
        to_map_erase += more_erase
    more_gate, to_norm, more_kept = strength_gradient(
        to_map_erase, scale * tl.sum(to_map_values * value, 1), gate, squared_norm, momentum_kept
    )
    to_gate += more_gate
    to_kept += more_kept
    to_hidden += 2 * to_norm[:, None] * hidden
    to_value = to_map_values * (outer_write * scale)[:, None]
    tl.debug_barrier()
    store_tile(to_weights[1] + outer_at, to_map + read_to_outer, K, N)
    if MOMENTUM:
        store_tile(to_moments[1] + outer_at, to_moment + moment_to_outer, K, N)

    # W2, whose key is k. Loaded anew, and what was written computed anew: that is cheaper than to keep it.
    inner = load_tile(weights[0] + inner_at, N, K)
    inner_momentum = inner
    if MOMENTUM:
        inner_momentum = load_tile(moments[0] + inner_at, N, K)
    inner_values = image * (write * scale)[:, None]
    made = write_map(keys, gram, inverse, inner, inner_momentum, inner_values, erase, decay, RULE, MOMENTUM, OPERAND)
    after = load_tile(to_weights[0] + inner_at, N, K)
    after_momentum = after
    if MOMENTUM:
        after_momentum = load_tile(to_moments[0] + inner_at, N, K)
    to_map, to_moment, more_keys, to_map_values, to_map_erase, map_factor, map_to_gram, flow = write_map_gradient(
        keys, gram, inverse, inner, inner_momentum, inner_values, erase, decay, made,
        after, after_momentum, inner_read, inner_read_erased, flow, RULE, MOMENTUM, OPERAND,
    )  # fmt: skip
    to_keys += more_keys
    if RULE != GD:
        to_erase += to_map_erase
        to_factor += map_factor
        if MOMENTUM:
            to_gram += map_to_gram
    to_write += scale * tl.sum(to_map_values * image, 1)
    to_image = to_map_values * (write * scale)[:, None]
    tl.debug_barrier()
    store_tile(to_weights[0] + inner_at, to_map + read_to_inner, N, K)
    if MOMENTUM:
        store_tile(to_moments[0] + inner_at, to_moment + moment_to_inner, N, K)

    # The errors, computed anew.
    inner = load_map(weights[0], base[0], inner_at, N, K)[1]
    outer = load_map(weights[1], base[1], outer_at, K, N)[1]
    errors = error_values(keys, values, inner, outer, bound, MAIN, BOUNDED, OPERAND)
    more_keys, more_values, to_inner, to_outer = error_values_gradient(
        keys, values, inner, outer, errors, to_value, to_image, to_hidden, MAIN, BOUNDED, OPERAND
    )
    _add_tile(to_weights[0] + inner_at, to_inner, N, K)
    _add_tile(to_weights[1] + outer_at, to_outer, K, N)
    if to_base[0] is not None:
        _add_tile(to_base[0] + inner_at, to_inner, N, K)
        _add_tile(to_base[1] + outer_at, to_outer, K, N)
    back = (to_keys + more_keys, to_values + more_values, to_gate, to_kept, to_erase, to_write, to_factor, to_gram)
    return to_queries, back, flow


@triton.jit
def _projection_gradient(
    u,
    index,
    to_projected,
    weights,
    base,
    to_weights,
    to_base,
    start,
    tokens,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Goes back through one projection (Eq. 83): what it projected and the gradient of u."""
    inner_at, outer_at = index * N * K, index * K * N
    inner = load_map(weights[0], base[0], inner_at, N, K)[1]
    outer = load_map(weights[1], base[1], outer_at, K, N)[1]
    x = load_tokens(u, start, tokens, C, K)
    projected, to_x, to_inner, to_outer = project_gradient(x, inner, outer, to_projected, OPERAND)
    _add_tile(to_weights[0] + inner_at, to_inner, N, K)
    _add_tile(to_weights[1] + outer_at, to_outer, K, N)
    if to_base[0] is not None:
        _add_tile(to_base[0] + inner_at, to_inner, N, K)
        _add_tile(to_base[1] + outer_at, to_outer, K, N)
    return projected, to_x


@triton.jit
def _add_tile(pointer, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds to a matrix that this program alone writes. The barriers: other threads load and store the same places."""
    tl.debug_barrier()
    total = load_tile(pointer, ROWS, COLUMNS) + tile
    tl.debug_barrier()
    store_tile(pointer, total, ROWS, COLUMNS)
