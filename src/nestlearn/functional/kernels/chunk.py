"""One chunk of the walk in tiles: what the tokens ask for, what the memories write, what is read inside the chunk.

Both kernels call these functions: the backward recomputes with them what the forward computed, and the compiler drops
what a caller does not use. Names and equations are those of `functional.associative` and `memory.mlp`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from nestlearn.functional.kernels.parts import (
    DELTA,
    GD,
    TOKEN,
    at,
    clip_factor,
    cumulative,
    exact_product,
    inverse_norm,
    load_map,
    load_tile,
    load_tokens,
    log_sigmoid,
    logits,
    product,
    project,
    silu,
    silu_slope,
    strength,
    unit_triangular_inverse,
)


@triton.jit
def keys_and_gates(
    u,
    stream,
    weights,
    base,
    readouts,
    start,
    tokens,
    largest_gate,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Eq. 83 from the memories at the start of the chunk.

    Args:
        u: the head's stream q; the streams k, v, g lie `stream` elements after one another.
        weights, base: (inner, outer) of the head's memories; `base` None twice if no part is fixed.
        readouts: (read-out, bias) of the gate, the retention and the momentum, None for what there is not.

    Returns:
        keys, values (C, K), their inverse norms before they were normalised (C,), and the gates (C,): s and the
        logarithms of retention and momentum. All are such that a place without a token changes nothing: s is 0 there
        and the others keep everything.
    """
    gate_readout, gate_bias, retain_readout, retain_bias, momentum_readout, momentum_bias = readouts
    active = start + tl.arange(0, C) < tokens
    raw_keys = _projected(u + stream, 0, weights, base, start, tokens, C, K, N, OPERAND)
    inverse_keys = inverse_norm(raw_keys)
    raw_values = _projected(u + 2 * stream, 1, weights, base, start, tokens, C, K, N, OPERAND)
    inverse_values = inverse_norm(raw_values)
    rate = _projected(u + 3 * stream, 2, weights, base, start, tokens, C, K, N, OPERAND)
    gate = tl.where(active, largest_gate * tl.sigmoid(logits(rate, gate_readout, gate_bias, K)), 0.0)
    if momentum_readout is None:
        log_momentum = tl.full((C,), 0.0, tl.float32)
    else:
        log_momentum = tl.where(active, log_sigmoid(logits(rate, momentum_readout, momentum_bias, K)), 0.0)
    if retain_readout is None:
        log_retain = tl.full((C,), 0.0, tl.float32)
    else:
        retention = _projected(u + 3 * stream, 3, weights, base, start, tokens, C, K, N, OPERAND)
        log_retain = tl.where(active, log_sigmoid(logits(retention, retain_readout, retain_bias, K)), 0.0)
    keys = raw_keys * inverse_keys[:, None]
    values = raw_values * inverse_values[:, None]
    return keys, values, inverse_keys, inverse_values, gate, log_retain, log_momentum


@triton.jit
def _projected(
    u,
    index,
    weights,
    base,
    start,
    tokens,
    C: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    inner = load_map(weights[0], base[0], index * N * K, N, K)[1]
    outer = load_map(weights[1], base[1], index * K * N, K, N)[1]
    return project(load_tokens(u, start, tokens, C, K), inner, outer, OPERAND)


@triton.jit
def decays(log_retain, log_momentum, active, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """The factors of `functional.associative.chunk_decay`, each also one token earlier (`_before`).

    Returns:
        retain (C, C), retain_before, retained (C,), retained_before, last (C,): the last row of retain,
        retained_last: a number; then the same six of momentum; then write (C, C), write_before, carry (C,),
        carry_before, write_last (C,), carry_last. Without momentum the last twelve repeat the first six and are unused.
    """
    retain, retain_before, retained, retained_before, last = cumulative(log_retain, C)
    first = (retain, retain_before, retained, retained_before, last, tl.exp(tl.sum(log_retain, 0)))
    if MOMENTUM:
        momentum, momentum_before, kept, kept_before, momentum_last = cumulative(log_momentum, C)
        # S enters M at every token, but never at a place that holds none.
        entering = tl.where(active[None, :], retain, 0.0)
        entering_before = tl.where(active[None, :], retain_before, 0.0)
        entering_last = tl.where(active, last, 0.0)
        moving = (momentum, momentum_before, kept, kept_before, momentum_last, tl.exp(tl.sum(log_momentum, 0)))
        third = (
            exact_product(entering, momentum),
            exact_product(entering_before, momentum),
            tl.sum(entering * kept[None, :], 1),
            tl.sum(entering_before * kept[None, :], 1),
            tl.sum(entering_last[:, None] * momentum, 0),
            tl.sum(entering_last * kept, 0),
        )
    else:
        moving = first
        third = first
    return first, moving, third


@triton.jit
def error_values(
    keys,
    values,
    inner,
    outer,
    bound,
    MAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Eq. 84, 85, 89: minus the bounded error of one memory at the snapshot, and its bounded image at the inner map.

    The main memory has no residual, its target has (decision 18).

    Returns:
        z of k and of v (C, N), error (C, K) and its clip factor (C,), value (C, K), back (C, N): the value behind W1,
        image (C, N) before it is clipped, and its clip factor.
    """
    z_keys = product(keys, tl.trans(inner), OPERAND)
    z_values = product(values, tl.trans(inner), OPERAND)
    error = product(silu(z_keys) - silu(z_values), tl.trans(outer), OPERAND) - values
    if not MAIN:
        error += keys
    error_factor = clip_factor(error, bound, BOUNDED)
    value = -error * error_factor[:, None]
    back = product(value, outer, OPERAND)
    image = back * silu_slope(z_keys)
    return z_keys, z_values, error, error_factor, value, back, image, clip_factor(image, bound, BOUNDED)


@triton.jit
def inverse_factor(gram, erase, decay, C: tl.constexpr, RULE: tl.constexpr):
    """(I + diag(erase) (shift(R^a) * K K^T))^{-1}, which the maps with these keys share; "gd" solves nothing."""
    return gram if RULE == GD else unit_triangular_inverse(erase[:, None] * decay[0][1] * gram, C)


@triton.jit
def write_map(
    keys,
    gram,
    inverse,
    memory,
    momentum,
    values,
    erase,
    decay,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """What a chunk writes into one linear map whose changing part before it is `memory`.

    Returns:
        written, erased (C, V): U = G - E and itself without momentum, G and E with it ("gd": G and zero); then what
        the gradient needs: the reads of memory and momentum by the keys, and the old value to be erased, B (C, V).
    """
    written = values
    erased = values
    read = values
    read_momentum = values
    old = values
    if RULE != GD:
        read = product(keys, tl.trans(memory), OPERAND)
        # The reference of "delta" is the snapshot, which at the start of a chunk is the memory itself.
        old = erased_share(decay, RULE)[:, None] * read
        if MOMENTUM:
            read_momentum = product(keys, tl.trans(momentum), OPERAND)
            old += decay[2][3][:, None] * read_momentum
            old += product(decay[2][1] * gram, values, OPERAND)
            erased = product(inverse, erase[:, None] * old, OPERAND)
        else:
            written = product(inverse, values - erase[:, None] * old, OPERAND)
            erased = written
    return written, erased, read, read_momentum, old


@triton.jit
def erased_share(decay, RULE: tl.constexpr):
    """How much of the memory before the chunk is erased at each token."""
    return decay[0][3] - 1 if RULE == DELTA else decay[0][3]


@triton.jit
def written_change(written, erased, decay, RULE: tl.constexpr, MOMENTUM: tl.constexpr):
    """What each token's pair is worth at the end of the chunk, (C, V): the new memory is retained M + this^T K."""
    if MOMENTUM:
        change = decay[2][4][:, None] * written
        if RULE != GD:
            change -= decay[0][4][:, None] * erased
    else:
        change = decay[0][4][:, None] * written
    return change


@triton.jit
def new_map(
    keys,
    written,
    erased,
    memory,
    momentum,
    decay,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """(memory, momentum) after the chunk."""
    change = written_change(written, erased, decay, RULE, MOMENTUM)
    after = decay[0][5] * memory + product(tl.trans(change), keys, OPERAND)
    moved = momentum
    if MOMENTUM:
        after += decay[2][5] * momentum
        moved = decay[1][5] * momentum + product(tl.trans(decay[1][4][:, None] * written), keys, OPERAND)
    return after, moved


@triton.jit
def read_map(
    queries,
    keys,
    memory,
    momentum,
    written,
    erased,
    base,
    offset,
    decay,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    READ: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """M_t q_t ("token") or M_{t-1} q_t ("previous") of one linear map at every token of a written chunk, (C, V)."""
    attention = product(queries, tl.trans(keys), OPERAND)
    EARLIER: tl.constexpr = 0 if READ == TOKEN else 1
    output = decay[0][2 + EARLIER][:, None] * product(queries, tl.trans(memory), OPERAND)
    if MOMENTUM:
        output += decay[2][2 + EARLIER][:, None] * product(queries, tl.trans(momentum), OPERAND)
        output += product(decay[2][EARLIER] * attention, written, OPERAND)
        if RULE != GD:
            output -= product(decay[0][EARLIER] * attention, erased, OPERAND)
    else:
        output += product(decay[0][EARLIER] * attention, written, OPERAND)
    if base is not None:
        output += product(queries, tl.trans(load_tile(base + offset, ROWS, COLUMNS)), OPERAND)
    return output


@triton.jit
def head_readouts(
    head,
    gate_readout,
    gate_bias,
    retain_readout,
    retain_bias,
    momentum_readout,
    momentum_bias,
    K: tl.constexpr,
):
    """The read-outs of one head, in the order in which `keys_and_gates` takes them."""
    return (
        gate_readout + head * K,
        gate_bias + head,
        at(retain_readout, head * K),
        at(retain_bias, head),
        at(momentum_readout, head * K),
        at(momentum_bias, head),
    )


@triton.jit
def outer_strength(gate, hidden, momentum_kept):
    """erase and write of W1, whose keys are the hidden features: (C,) each. Momentum enters averaged."""
    erase = strength(gate, tl.sum(hidden * hidden, 1))
    return erase, erase * (1 - momentum_kept)
