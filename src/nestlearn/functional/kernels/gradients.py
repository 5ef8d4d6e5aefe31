"""Gradients of the parts of one chunk, by hand: each function undoes one of `chunk` and names what it undoes.

Two bundles travel through a chunk. `flow` gathers the gradients of the decays: of the cumulative log retention (C,),
of the same before each token (C,), of its sum over the chunk, and with momentum the first and the last for the log
momentum, then those of write_before (C, C), write (C, C), carry_before (C,), carry (C,), write_last (C,) and
carry_last. A gradient of exp(x) is gathered as gradient * exp(x), that of x.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from nestlearn.functional.kernels.chunk import erased_share, written_change
from nestlearn.functional.kernels.parts import (
    GD,
    TOKEN,
    clip_gradient,
    exact_product,
    product,
    silu,
    silu_curvature,
    silu_slope,
)


@triton.jit
def no_flow(C: tl.constexpr, MOMENTUM: tl.constexpr):
    """`flow` before anything has come back. Without momentum nothing reads what is small here."""
    row = tl.full((C,), 0.0, tl.float32)
    number = tl.full([], 0.0, tl.float32)
    square = tl.full((C, C), 0.0, tl.float32) if MOMENTUM else row
    return row, row, number, row, number, square, square, row, row, row, number


@triton.jit
def write_map_gradient(
    keys,
    gram,
    inverse,
    memory,
    momentum,
    values,
    erase,
    decay,
    made,
    after,
    after_momentum,
    read_written,
    read_erased,
    flow,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Undoes `new_map` and `write_map`.

    Args:
        made: what `write_map` returned.
        after, after_momentum: gradients of the map and its momentum after the chunk.
        read_written, read_erased: gradients that reads inside the chunk gave to what was written and erased.

    Returns:
        gradients of memory, momentum, keys, values, erase, the triangular factor, and, with momentum, of K K^T beside
        it; and flow.
    """
    total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last = flow
    written, erased, read, read_momentum, old = made
    retained, last = decay[0][5], decay[0][4]
    to_memory = retained * after
    whole += tl.sum(tl.sum(after * memory, 1), 0) * retained
    to_momentum = after_momentum
    through = product(keys, tl.trans(after), OPERAND)  # what each token's change is asked for, (C, V)
    to_keys = product(written_change(written, erased, decay, RULE, MOMENTUM), after, OPERAND)
    if MOMENTUM:
        kept, last_momentum = decay[1][5], decay[1][4]
        carry_last += tl.sum(tl.sum(after * momentum, 1), 0)
        moving_all += tl.sum(tl.sum(after_momentum * momentum, 1), 0) * kept
        to_momentum = decay[2][5] * after + kept * after_momentum
        through_momentum = product(keys, tl.trans(after_momentum), OPERAND)
        to_keys += product(last_momentum[:, None] * written, after_momentum, OPERAND)
        to_values = decay[2][4][:, None] * through + last_momentum[:, None] * through_momentum + read_written
        write_last += tl.sum(through * written, 1)
        ends = last_momentum * tl.sum(through_momentum * written, 1)
        moving -= ends
        moving_all += tl.sum(ends, 0)
    else:
        to_values = last[:, None] * through + read_written
        ends = last * tl.sum(through * written, 1)
        total -= ends
        whole += tl.sum(ends, 0)
    to_erase = tl.zeros_like(erase)
    to_factor = gram
    to_gram = gram
    if RULE != GD:
        if MOMENTUM:
            ends = last * tl.sum(through * erased, 1)
            total += ends
            whole -= tl.sum(ends, 0)
            solved = product(tl.trans(inverse), read_erased - last[:, None] * through, OPERAND)
            to_factor = -product(solved, tl.trans(erased), OPERAND)
            to_old = erase[:, None] * solved
            to_erase = tl.sum(solved * old, 1)
            entered = product(to_old, tl.trans(values), OPERAND)  # gradient of write_before * K K^T
            write_before += entered * gram
            to_gram = entered * decay[2][1]
            to_values += product(tl.trans(decay[2][1] * gram), to_old, OPERAND)
            carried = decay[2][3][:, None] * to_old
            carry_before += tl.sum(to_old * read_momentum, 1)
            to_keys += product(carried, momentum, OPERAND)
            to_momentum += product(tl.trans(carried), keys, OPERAND)
        else:
            to_values = product(tl.trans(inverse), to_values, OPERAND)
            to_factor = -product(to_values, tl.trans(written), OPERAND)
            to_old = -erase[:, None] * to_values
            to_erase = -tl.sum(to_values * old, 1)
        before += decay[0][3] * tl.sum(to_old * read, 1)
        to_read = erased_share(decay, RULE)[:, None] * to_old
        to_keys += product(to_read, memory, OPERAND)
        to_memory += product(tl.trans(to_read), keys, OPERAND)
    flow = (total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last)
    return to_memory, to_momentum, to_keys, to_values, to_erase, to_factor, to_gram, flow


@triton.jit
def factor_gradient(to_factor, to_gram, keys, gram, erase, decay, flow, MOMENTUM: tl.constexpr, OPERAND: tl.constexpr):
    """Undoes the triangular factor, diag(erase) (shift(R^a) * K K^T), and K K^T: gradients of keys and erase, flow."""
    total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last = flow
    retain_before = decay[0][1]  # strictly lower triangular, like the factor
    weighted = to_factor * retain_before * gram
    to_erase = tl.sum(weighted, 1)
    before += erase * to_erase
    total -= tl.sum(erase[:, None] * weighted, 0)
    gathered = to_factor * (erase[:, None] * retain_before)
    if MOMENTUM:
        gathered += to_gram
    to_keys = product(gathered, keys, OPERAND) + product(tl.trans(gathered), keys, OPERAND)
    flow = (total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last)
    return to_keys, to_erase, flow


@triton.jit
def read_map_gradient(
    output,
    queries,
    keys,
    memory,
    momentum,
    written,
    erased,
    decay,
    flow,
    RULE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    READ: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Undoes `read_map`, save for what was read from the fixed part.

    Args:
        output: gradient of what was read, (C, V).

    Returns:
        gradients of queries, keys, written, erased, memory, momentum; and flow.
    """
    total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last = flow
    EARLIER: tl.constexpr = 0 if READ == TOKEN else 1
    retain, retained = decay[0][EARLIER], decay[0][2 + EARLIER]
    attention = product(queries, tl.trans(keys), OPERAND)
    to_read = retained[:, None] * output
    at_row = tl.sum(to_read * product(queries, tl.trans(memory), OPERAND), 1)
    to_queries = product(to_read, memory, OPERAND)
    to_memory = product(tl.trans(to_read), queries, OPERAND)
    to_momentum = momentum
    to_erased = output
    paired = product(output, tl.trans(written), OPERAND)
    if MOMENTUM:
        to_written = product(tl.trans(decay[2][EARLIER] * attention), output, OPERAND)
        to_attention = paired * decay[2][EARLIER]
        carried = decay[2][2 + EARLIER][:, None] * output
        from_carry = tl.sum(output * product(queries, tl.trans(momentum), OPERAND), 1)
        if READ == TOKEN:
            write += paired * attention
            carry += from_carry
        else:
            write_before += paired * attention
            carry_before += from_carry
        to_queries += product(carried, momentum, OPERAND)
        to_momentum = product(tl.trans(carried), queries, OPERAND)
        if RULE != GD:
            to_erased = -product(tl.trans(retain * attention), output, OPERAND)
            paired = -product(output, tl.trans(erased), OPERAND)
            weighted = paired * retain * attention
            to_attention += paired * retain
            at_row += tl.sum(weighted, 1)
            total -= tl.sum(weighted, 0)
    else:
        to_written = product(tl.trans(retain * attention), output, OPERAND)
        weighted = paired * retain * attention
        to_attention = paired * retain
        at_row += tl.sum(weighted, 1)
        total -= tl.sum(weighted, 0)
    if READ == TOKEN:
        total += at_row
    else:
        before += at_row
    to_queries += product(to_attention, keys, OPERAND)
    to_keys = product(tl.trans(to_attention), queries, OPERAND)
    flow = (total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last)
    return to_queries, to_keys, to_written, to_erased, to_memory, to_momentum, flow


@triton.jit
def error_values_gradient(
    keys,
    values,
    inner,
    outer,
    made,
    to_value,
    to_image,
    to_hidden,
    MAIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Undoes `error_values`.

    Args:
        made: what it returned.
        to_value, to_image, to_hidden: gradients of value, of the CLIPPED image, and of silu(z of k).

    Returns:
        gradients of keys, values, inner and outer.
    """
    z_keys, z_values, error, error_factor, value, back, image, image_factor = made
    slope = silu_slope(z_keys)
    to_image = clip_gradient(to_image, image, image_factor, BOUNDED)
    to_back = to_image * slope
    to_value += product(to_back, tl.trans(outer), OPERAND)
    to_error = -clip_gradient(to_value, error, error_factor, BOUNDED)
    to_outer = product(tl.trans(value), to_back, OPERAND)
    to_outer += product(tl.trans(to_error), silu(z_keys) - silu(z_values), OPERAND)
    to_features = product(to_error, outer, OPERAND)
    to_z = (to_features + to_hidden) * slope + to_image * back * silu_curvature(z_keys)
    to_inner = product(tl.trans(to_z), keys, OPERAND)
    to_keys = product(to_z, inner, OPERAND)
    to_z = -to_features * silu_slope(z_values)
    to_inner += product(tl.trans(to_z), values, OPERAND)
    to_values = product(to_z, inner, OPERAND) - to_error
    if not MAIN:
        to_keys += to_error
    return to_keys, to_values, to_inner, to_outer


@triton.jit
def strength_gradient(to_erase, to_write, gate, squared_norm, momentum_kept):
    """Undoes erase = s / (1 - s + s n), write = erase (1 - momentum): gradients of s, n and the momentum, (C,) each."""
    below = 1 / (1 - gate + gate * squared_norm)
    erase = gate * below
    either = to_erase + to_write * (1 - momentum_kept)
    return either * below * below, -either * erase * erase, -to_write * erase


@triton.jit
def decays_gradient(flow, decay, active, C: tl.constexpr, MOMENTUM: tl.constexpr):
    """Undoes `decays`: gradients of log retention and log momentum, (C,) each, garbage where there is no token."""
    total, before, whole, moving, moving_all, write_before, write, carry_before, carry, write_last, carry_last = flow
    log_momentum = total
    if MOMENTUM:
        retain, retain_before, last = decay[0][0], decay[0][1], decay[0][4]
        momentum, kept = decay[1][0], decay[1][2]
        entering = tl.where(active[None, :], retain, 0.0)
        entering_before = tl.where(active[None, :], retain_before, 0.0)
        entering_last = tl.where(active, last, 0.0)
        # write = (R^a, where S enters) R^m and carry = (the same) g^m, in three timings.
        to_momentum = exact_product(tl.trans(entering), write)
        to_momentum += exact_product(tl.trans(entering_before), write_before)
        to_momentum += entering_last[:, None] * write_last[None, :]
        to_kept = tl.sum(entering * carry[:, None], 0) + tl.sum(entering_before * carry_before[:, None], 0)
        to_kept += entering_last * carry_last
        weighted = entering * (exact_product(write, tl.trans(momentum)) + carry[:, None] * kept[None, :])
        total += tl.sum(weighted, 1) - tl.sum(weighted, 0)
        weighted = exact_product(write_before, tl.trans(momentum)) + carry_before[:, None] * kept[None, :]
        weighted = entering_before * weighted
        before += tl.sum(weighted, 1)
        total -= tl.sum(weighted, 0)
        ends = entering_last * (tl.sum(momentum * write_last[None, :], 1) + kept * carry_last)
        total -= ends
        whole += tl.sum(ends, 0)
        weighted = to_momentum * momentum
        moving += tl.sum(weighted, 1) - tl.sum(weighted, 0) + to_kept * kept
        log_momentum = _from_later(moving, C) + moving_all
    return _from_later(total + before, C) - before + whole, log_momentum


@triton.jit
def _from_later(x, C: tl.constexpr):
    """Sums over the own and all later tokens, what undoes a cumulative sum."""
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.sum(tl.where(rows >= columns, x[:, None], 0.0), 0)


@triton.jit
def project_gradient(x, inner, outer, to_projected, OPERAND: tl.constexpr):
    """Undoes `project`: what it projected, then gradients of x, inner and outer."""
    z = product(x, tl.trans(inner), OPERAND)
    hidden = silu(z)
    projected = x + product(hidden, tl.trans(outer), OPERAND)
    to_z = product(to_projected, outer, OPERAND) * silu_slope(z)
    to_outer = product(tl.trans(to_projected), hidden, OPERAND)
    return projected, to_projected + product(to_z, inner, OPERAND), product(tl.trans(to_z), x, OPERAND), to_outer
