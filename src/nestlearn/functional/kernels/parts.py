"""What the forward and the backward kernel share: one chunk of the walk up to the writes, in tiles.

Every function works on one head of one row. C is the chunk, K the width of the head, N the hidden width; a tile of
tokens is (C, K) or (C, N), a memory's W2 is (N, K) and its W1 (K, N). All tiles are fp32 and only the operands of
products are narrowed to `OPERAND`, so sums, gates, decays and memories never leave fp32.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# In a kernel an annotation is a specialisation: only compile-time constants have one.

import triton
import triton.language as tl

# Names of the options inside the kernels, where strings cannot go.
DGD: tl.constexpr = tl.constexpr(0)
GD: tl.constexpr = tl.constexpr(1)
DELTA: tl.constexpr = tl.constexpr(2)
TOKEN: tl.constexpr = tl.constexpr(0)
PREVIOUS: tl.constexpr = tl.constexpr(1)
CHUNK: tl.constexpr = tl.constexpr(2)


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a b with operands of the given type and fp32 sums. Operands in fp32 go through tensor cores in three parts."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="tf32x3", out_dtype=tl.float32)


@triton.jit
def exact_product(a, b):
    """a b in (nearly) fp32: for inverses and decays, whose errors every write of a chunk would inherit."""
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=tl.float32)


@triton.jit
def load_tile(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix (ROWS, COLUMNS) that lies in one piece."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :])


@triton.jit
def store_tile(pointer, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(pointer + rows[:, None] * COLUMNS + columns[None, :], tile)


@triton.jit
def load_tokens(pointer, start, tokens, C: tl.constexpr, K: tl.constexpr):
    """C rows of (tokens, K) from `start`; zeros where there is no token."""
    rows, columns = start + tl.arange(0, C), tl.arange(0, K)
    return tl.load(pointer + rows[:, None] * K + columns[None, :], mask=rows[:, None] < tokens, other=0.0)


@triton.jit
def store_tokens(pointer, tile, start, tokens, C: tl.constexpr, K: tl.constexpr):
    rows, columns = start + tl.arange(0, C), tl.arange(0, K)
    tl.store(pointer + rows[:, None] * K + columns[None, :], tile, mask=rows[:, None] < tokens)


@triton.jit
def load_map(change, base, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(the part of a linear map that writes change, the whole map); `base` None means that no part is fixed."""
    changing = load_tile(change + offset, ROWS, COLUMNS)
    if base is not None:
        return changing, changing + load_tile(base + offset, ROWS, COLUMNS)
    else:
        return changing, changing


@triton.jit
def at(pointer, offset):
    """pointer + offset, and None for an argument that was not given."""
    if pointer is None:
        return None
    else:
        return pointer + offset


@triton.jit
def silu(z):
    return z / (1 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    gate = 1 / (1 + tl.exp(-z))
    return gate + z * gate * (1 - gate)


@triton.jit
def silu_curvature(z):
    """Second derivative of silu."""
    gate = 1 / (1 + tl.exp(-z))
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)) to fp32 rounding for any x, also where the sigmoid rounds to one: half-lives of 16,384 tokens.

    log(1 + y) = 2 artanh(y / (2 + y)); with y = exp(-|x|) at most 1 the argument is at most 1/3 and nine terms do.
    """
    y = tl.exp(-tl.abs(x))
    a = y / (2 + y)
    b = a * a
    series = 1 / 15 + b * (1 / 17)
    series = 1 / 13 + b * series
    series = 1 / 11 + b * series
    series = 1 / 9 + b * series
    series = 1 / 7 + b * series
    series = 1 / 5 + b * series
    series = 1 / 3 + b * series
    return tl.minimum(x, 0.0) - 2 * a * (1 + b * series)


@triton.jit
def inverse_norm(x):
    """1 / |x| of each row, smooth at zero, as `functional.surprise.normalize`: (C,)."""
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-12)


@triton.jit
def normalize_gradient(gradient, y, inverse):
    """Gradient of x from that of y = x / |x|."""
    return inverse[:, None] * (gradient - y * tl.sum(gradient * y, 1)[:, None])


@triton.jit
def clip_factor(x, bound, BOUNDED: tl.constexpr):
    """What brings the norm of each row down to at most `bound`: (C,)."""
    squared = tl.sum(x * x, 1)
    if BOUNDED:
        factor = tl.sqrt(bound * bound / tl.maximum(squared, bound * bound))
    else:
        factor = tl.full(squared.shape, 1.0, tl.float32)
    return factor


@triton.jit
def clip_gradient(gradient, x, factor, BOUNDED: tl.constexpr):
    """Gradient of x from that of factor x: where it was clipped, what lay along x is gone."""
    if BOUNDED:
        squared = tl.sum(x * x, 1)
        along = tl.where(factor < 1, tl.sum(gradient * x, 1) / tl.maximum(squared, 1e-30), 0.0)
        result = factor[:, None] * (gradient - x * along[:, None])
    else:
        result = gradient
    return result


@triton.jit
def cumulative(log_gate, C: tl.constexpr):
    """Products of gates over the tokens of a chunk (`functional.associative.chunk_decay`).

    Returns:
        between (C, C): prod_{s<j<=t} gate_j on and below the diagonal; between_before: its row t-1, below the diagonal.
        kept (C,): prod_{j<=t} gate_j; kept_before: its entry t-1. last (C,): the last row of `between`.
    """
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    total = tl.cumsum(log_gate, 0)
    before = total - log_gate
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    between = tl.exp(tl.where(rows >= columns, total[:, None] - total[None, :], float("-inf")))
    between_before = tl.exp(tl.where(rows > columns, before[:, None] - total[None, :], float("-inf")))
    return between, between_before, tl.exp(total), tl.exp(before), tl.exp(tl.sum(log_gate, 0) - total)


@triton.jit
def unit_triangular_inverse(factor, C: tl.constexpr):
    """(I + factor)^{-1} for a strictly lower triangular factor (C, C).

    From blocks of one entry to ever twice as large ones, all pairs of blocks at once:
    [[A, 0], [L, B]]^{-1} = [[A', 0], [-B' L A', B']]. Every intermediate is a part of the result, so nothing grows that
    the result does not. A Neumann series, also by doubling, forms powers of the whole factor, which cancel; and
    substitution would reduce over the threads of a program once a row.
    """
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    pair = (rows // 2 == columns // 2) & (rows > columns)
    inverse = tl.where(rows == columns, 1.0, tl.where(pair, -factor, 0.0))
    inverse = _merge(inverse, factor, rows, columns, 2)
    inverse = _merge(inverse, factor, rows, columns, 4)
    inverse = _merge(inverse, factor, rows, columns, 8)
    if C >= 32:
        inverse = _merge(inverse, factor, rows, columns, 16)
    if C >= 64:
        inverse = _merge(inverse, factor, rows, columns, 32)
    return inverse


@triton.jit
def _merge(inverse, factor, rows, columns, SIZE: tl.constexpr):
    """From the inverses of diagonal blocks of this size to those of twice the size."""
    pair = (rows // (2 * SIZE) == columns // (2 * SIZE)) & (rows // SIZE > columns // SIZE)
    between = tl.where(pair, factor, 0.0)
    return inverse - exact_product(exact_product(inverse, between), inverse)


@triton.jit
def project(x, inner, outer, OPERAND: tl.constexpr):
    """x + W1 silu(W2 x), a memory of the projections (Eq. 83)."""
    z = product(x, tl.trans(inner), OPERAND)
    return x + product(silu(z), tl.trans(outer), OPERAND)


@triton.jit
def logits(x, readout, bias, K: tl.constexpr):
    """<r, x> + b of every token: (C,)."""
    return tl.sum(x * tl.load(readout + tl.arange(0, K))[None, :], 1) + tl.load(bias)


@triton.jit
def strength(gate, squared_norm):
    """The exact proximal step s / (1 - s + s |a|^2) for keys of this squared norm (decision 3)."""
    return gate / (1 - gate + gate * squared_norm)
