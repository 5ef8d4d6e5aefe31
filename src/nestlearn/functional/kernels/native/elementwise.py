"""What stands between the matrix products of a block, in C++ for the CPU: each in one pass over memory.

`nestlearn.functional.recomputed` says in PyTorch operations what they compute. All tensors are contiguous and of one
dtype, fp32 or fp64; widths are those of the last dimension.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from nestlearn.functional.kernels.native import Unavailable, check_memory, load

# With fewer numbers than this it takes longer to wake another thread than to do its work.
FEW_NUMBERS = 1 << 15

_P, _N, _I, _E = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_ARGUMENTS = {
    "rms_norm": [*[_P] * 3, _N, _I, _E, _I],
    "rms_norm_backward": [*[_P] * 5, _N, _I, _E, _I],
    "gated_norm": [*[_P] * 4, _N, _I, _E, _I],
    "gated_norm_backward": [*[_P] * 8, _N, _I, _E, _I],
    "gelu_backward": [*[_P] * 3, _N, _I],
    "convolved_heads": [*[_P] * 3, _N, _N, *[_I] * 5],
    "convolved_heads_backward": [*[_P] * 5, _N, _N, *[_I] * 5],
}


@functools.cache
def available() -> bool:
    """Whether these can be used here. Builds them at the first call."""
    try:
        _library()
    except Unavailable:
        return False
    return True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x (..., D), weight (D,)."""
    y = torch.empty_like(x)
    _run("rms_norm", x.numel(), x, weight, y, x.numel() // x.shape[-1], x.shape[-1], eps)
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, d_y: Tensor, d_x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """d_x, written where it is given, which may be in d_y, and d_weight."""
    sums = weight.new_zeros(_threads(x.numel()), x.shape[-1])
    _run("rms_norm_backward", x.numel(), x, weight, d_y, d_x, sums, x.numel() // x.shape[-1], x.shape[-1], eps)
    return d_x, sums.sum(0)


def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * silu(gate): x, gate (..., D), weight (D,)."""
    z = torch.empty_like(x)
    _run("gated_norm", x.numel(), x, weight, gate, z, x.numel() // x.shape[-1], x.shape[-1], eps)
    return z


def gated_norm_backward(
    x: Tensor, weight: Tensor, gate: Tensor, d_z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output z again, d_x, d_weight and d_gate, which overwrites d_z."""
    z, d_x = torch.empty_like(x), torch.empty_like(x)
    sums = weight.new_zeros(_threads(x.numel()), x.shape[-1])
    rows = x.numel() // x.shape[-1]
    _run("gated_norm_backward", x.numel(), x, weight, gate, d_z, z, d_x, d_z, sums, rows, x.shape[-1], eps)
    return z, d_x, sums.sum(0), d_z


def gelu_backward(u: Tensor, d_h: Tensor) -> tuple[Tensor, Tensor]:
    """h = gelu(u) again, and d_u, which overwrites d_h."""
    h = torch.empty_like(u)
    _run("gelu_backward", u.numel(), u, h, d_h, u.numel())
    return h, d_h


def convolved_heads(x: Tensor, weight: Tensor, streams: int, heads: int) -> Tensor:
    """silu of the causal convolution of x (B, T, S H K) with weight (taps, S H K), as (S, B, H, T, K)."""
    sizes = _sizes(x, weight, streams, heads)
    out = x.new_empty(streams, sizes[0], heads, sizes[1], sizes[4])
    _run("convolved_heads", x.numel(), x, weight, out, *sizes)
    return out


def convolved_heads_backward(
    x: Tensor, weight: Tensor, d_out: Tensor, streams: int, heads: int
) -> tuple[Tensor, Tensor]:
    """d_x and d_weight."""
    d_x = torch.empty_like(x)
    sums = weight.new_zeros(_threads(x.numel()), *weight.shape)
    _run("convolved_heads_backward", x.numel(), x, weight, d_out, d_x, sums, *_sizes(x, weight, streams, heads))
    return d_x, sums.sum(0)


def _sizes(x: Tensor, weight: Tensor, streams: int, heads: int) -> tuple[int, ...]:
    batch, tokens, channels = x.shape
    return batch, tokens, streams, heads, channels // (streams * heads), weight.shape[0]


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers >= FEW_NUMBERS else 1


def _run(name: str, numbers: int, first: Tensor, *rest: Tensor | float) -> None:
    suffix = "float" if first.dtype == torch.float32 else "double"
    pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in (first, *rest)]
    check_memory(getattr(_library(), f"{name}_{suffix}")(*pointers, _threads(numbers)))


@functools.cache
def _library() -> ctypes.CDLL:
    library = load("elementwise.cpp", "linear.h", "threads.h")
    for name, arguments in _ARGUMENTS.items():
        for suffix in ("float", "double"):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, _I
    return library
