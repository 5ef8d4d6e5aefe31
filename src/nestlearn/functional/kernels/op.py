"""The kernels as operators of torch: opaque to `torch.compile`, with shapes and gradients registered."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nestlearn.functional.kernels.backward import walk_backward
from nestlearn.functional.kernels.forward import walk_forward

SIZES = (16, 32, 64)
RULES = {"dgd": 0, "gd": 1, "delta": 2}
READS = {"token": 0, "previous": 1, "chunk": 2}
OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# The tensors of the operators, in order; the backward returns one gradient for each.
NAMES = (
    "u",
    "inner",
    "outer",
    "inner_momentum",
    "outer_momentum",
    "base_inner",
    "base_outer",
    "gate_readout",
    "gate_bias",
    "retain_readout",
    "retain_bias",
    "momentum_readout",
    "momentum_bias",
)


class Walk(NamedTuple):
    """What `self_modifying_walk` returns.

    Attributes:
        out: (B, H, T, K), what the heads read.
        inner, outer: the changing part of the memories after the last token, shaped as it was given.
        inner_momentum, outer_momentum: the momentum then, or None.
    """

    out: Tensor
    inner: Tensor
    outer: Tensor
    inner_momentum: Tensor | None
    outer_momentum: Tensor | None


def self_modifying_walk(
    u: Tensor,
    inner: Tensor,
    outer: Tensor,
    base_inner: Tensor | None,
    base_outer: Tensor | None,
    gate_readout: Tensor,
    gate_bias: Tensor,
    retain_readout: Tensor | None = None,
    retain_bias: Tensor | None = None,
    momentum_readout: Tensor | None = None,
    momentum_bias: Tensor | None = None,
    inner_momentum: Tensor | None = None,
    outer_momentum: Tensor | None = None,
    *,
    chunk_size: int,
    main_scale: float,
    projection_scale: float,
    rule: Literal["dgd", "gd", "delta"] = "dgd",
    read: Literal["token", "previous", "chunk"] = "token",
    bound: float | None = 4.0,
    largest_gate: float = 0.99,
    operand: torch.dtype = torch.bfloat16,
) -> Walk:
    """Walks the memories of self-modifying Titans over whole sequences (Eq. 83-91), every row from a chunk's start.

    It equals `SelfModifyingTitans` between its streams and its read-out, for five memories in chunks of one size, with
    neither adaptive queries, nor a residual at the main memory, nor negative eigenvalues. Differentiable in every
    tensor, once; nothing is changed in place. Kernels are compiled for CUDA devices and have never been run on one.

    Args:
        u: (4, B, H, T, K), the streams q, k, v, g, K in 16, 32, 64; any T, the last chunk may be cut short.
        inner: the changing part of W2 before the first token, (B, H, 5, N, K) in fp32, N in 16, 32, 64. It is the
            snapshot too.
        outer: the same of W1, (B, H, 5, K, N).
        base_inner: the part of W2 that does not change, (H, 5, N, K); None for zero (`retain_to="zero"`).
        base_outer: the same of W1, (H, 5, K, N), or None.
        gate_readout: (H, K).
        gate_bias: (H,).
        retain_readout: (H, K); None keeps everything.
        retain_bias: (H,), with `retain_readout`.
        momentum_readout: (H, K); None for no momentum.
        momentum_bias: (H,), with `momentum_readout`.
        inner_momentum: the momentum of W2 before the first token, shaped like `inner`, with `momentum_readout`.
        outer_momentum: the same of W1.
        chunk_size: tokens between snapshots, 16, 32 or 64.
        main_scale: the fraction of its error that the main memory writes, under "gd" already divided by `chunk_size`.
        projection_scale: the same for the other memories.
        rule: what is erased, as `inner_rule` of `SelfModifyingTitans`.
        read: which memory a token reads.
        bound: the largest norm of an error and of its image; None for no bound.
        largest_gate: s is this times a sigmoid; below 1.
        operand: the type in which operands of products are rounded, fp32, bf16 or fp16; sums and states are fp32. In
            fp16 gradients below 6e-8 vanish: scale the loss, or take bf16.

    Returns:
        Walk(out, inner, outer, inner_momentum, outer_momentum), in fp32.

    Raises:
        ValueError: if an argument has a shape, a type or a value that the kernels do not cover.
    """
    tensors = {
        "u": u,
        "inner": inner,
        "outer": outer,
        "inner_momentum": inner_momentum,
        "outer_momentum": outer_momentum,
        "base_inner": base_inner,
        "base_outer": base_outer,
        "gate_readout": gate_readout,
        "gate_bias": gate_bias,
        "retain_readout": retain_readout,
        "retain_bias": retain_bias,
        "momentum_readout": momentum_readout,
        "momentum_bias": momentum_bias,
    }
    _check_options(chunk_size, rule, read, bound, largest_gate, operand)
    _check_tensors(tensors)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    results = _walk(
        *tensors.values(),
        chunk_size,
        RULES[rule],
        READS[read],
        bound,
        float(main_scale),
        float(projection_scale),
        float(largest_gate),
        operand,
        keep,
    )
    out, *state = results[:5]
    return Walk(out, *(state if inner_momentum is not None else [*state[:2], None, None]))


def _check_options(
    chunk_size: int, rule: str, read: str, bound: float | None, largest_gate: float, operand: torch.dtype
) -> None:
    mend = 'take backend="torch" for others'
    for name, value, allowed in (("chunk_size", chunk_size, SIZES), ("rule", rule, RULES), ("read", read, READS)):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}: the kernels expect one of {choices}, got {value!r}; {mend}")
    if operand not in OPERANDS:
        raise ValueError(f"operand: expected torch.float32, torch.bfloat16 or torch.float16, got {operand}")
    if bound is not None and not bound > 0:
        raise ValueError(f"bound: expected a positive norm, or None for no bound; got {bound}")
    if not 0 < largest_gate < 1:
        raise ValueError(
            f"largest_gate: expected a number between 0 and 1, got {largest_gate}; gates that reach 1 belong to "
            f"negative_eigenvalues, which the kernels do not cover: {mend}"
        )


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    u, inner = tensors["u"], tensors["inner"]
    assert u is not None and inner is not None
    mend = 'take backend="torch" for others'
    if u.ndim != 5 or u.shape[0] != 4:
        raise ValueError(
            f"u: expected the four streams q, k, v, g, (4, B, H, T, K), got {tuple(u.shape)}; five streams belong to "
            f"adaptive_query, which the kernels do not cover: {mend}"
        )
    if inner.ndim != 5 or inner.shape[2] != 5:
        raise ValueError(f"inner: expected five memories, (B, H, 5, N, K), got {tuple(inner.shape)}; {mend}")
    _, batch, heads, _, width = u.shape
    hidden = inner.shape[3]
    for name, size in (("u: the width K", width), ("inner: the hidden width N", hidden)):
        if size not in SIZES:
            raise ValueError(f"{name}: the kernels expect 16, 32 or 64, got {size}; {mend}")
    one, two = (heads, 5, hidden, width), (heads, 5, width, hidden)
    expected = {
        "u": u.shape,
        "inner": (batch, *one),
        "outer": (batch, *two),
        "inner_momentum": (batch, *one),
        "outer_momentum": (batch, *two),
        "base_inner": one,
        "base_outer": two,
    }
    for name, value in tensors.items():
        shape = expected.get(name, (heads, width) if name.endswith("readout") else (heads,))
        if value is None:
            continue
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(value.shape)}")
        if value.device != u.device:
            raise ValueError(f"{name}: expected u's device {u.device}, got {value.device}; move it with .to()")
        if value.dtype != torch.float32:
            raise ValueError(f"{name}: expected fp32, got {value.dtype}; convert it with .float(), or {mend}")
    pairs = (
        ("base_inner", "base_outer"),
        ("retain_readout", "retain_bias"),
        ("momentum_readout", "momentum_bias"),
        ("momentum_readout", "inner_momentum"),
        ("momentum_readout", "outer_momentum"),
    )
    for first, second in pairs:
        if (tensors[first] is None) != (tensors[second] is None):
            given, missing = (first, second) if tensors[second] is None else (second, first)
            raise ValueError(f"{given} was given without {missing}: pass both, or neither")


@torch.library.custom_op("nestlearn::self_modifying_walk", mutates_args=())
def _walk(
    u: Tensor,
    inner: Tensor,
    outer: Tensor,
    inner_momentum: Tensor | None,
    outer_momentum: Tensor | None,
    base_inner: Tensor | None,
    base_outer: Tensor | None,
    gate_readout: Tensor,
    gate_bias: Tensor,
    retain_readout: Tensor | None,
    retain_bias: Tensor | None,
    momentum_readout: Tensor | None,
    momentum_bias: Tensor | None,
    chunk_size: int,
    rule: int,
    read: int,
    bound: float | None,
    main_scale: float,
    projection_scale: float,
    largest_gate: float,
    operand: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the four final states, and if `keep` the four histories of states at the chunks' starts (B, H, S, 5, ...).

    What there is not is an empty tensor.
    """
    _, batch, heads, tokens, _ = u.shape
    chunks = -(-tokens // chunk_size)
    out = torch.empty_like(u[0], memory_format=torch.contiguous_format)
    state = [inner, outer, inner_momentum, outer_momentum]
    slots = chunks + 1 if keep else 1
    history: list[Tensor | None] = []
    for first in state:
        if first is None:
            history.append(None)
            continue
        slotted = first.new_empty(batch, heads, slots, *first.shape[2:])
        slotted[:, :, 0] = first
        history.append(slotted)
    if out.numel():
        walk_forward[(batch * heads,)](
            u.contiguous(),
            *history,
            *_contiguous(
                base_inner,
                base_outer,
                gate_readout,
                gate_bias,
                retain_readout,
                retain_bias,
                momentum_readout,
                momentum_bias,
            ),
            out,
            heads,
            tokens,
            out.numel(),
            slots,
            int(keep),
            main_scale,
            projection_scale,
            largest_gate,
            1.0 if bound is None else bound,
            **_constants(u, inner, inner_momentum, chunk_size, rule, read, bound, operand),
        )
    if keep:
        final = [u.new_empty(0) if x is None else x[:, :, -1].clone() for x in history]
        kept = [u.new_empty(0) if x is None else x for x in history]
    else:
        final = [u.new_empty(0) if x is None else x.squeeze(2) for x in history]
        kept = [u.new_empty(0) for _ in history]
    return out, *final, *kept  # type: ignore[return-value]


@_walk.register_fake
def _(u: Tensor, inner: Tensor, outer: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inner_momentum, outer_momentum, chunk_size, keep = rest[0], rest[1], rest[10], rest[18]
    out = torch.empty_like(u[0], memory_format=torch.contiguous_format)
    slots = (u.shape[3] + chunk_size - 1) // chunk_size + 1
    final, kept = [], []
    for first in (inner, outer, inner_momentum, outer_momentum):
        final.append(u.new_empty(0) if first is None else first.new_empty(first.shape))
        held = keep and first is not None
        kept.append(first.new_empty(*first.shape[:2], slots, *first.shape[2:]) if held else u.new_empty(0))
    return out, *final, *kept


@torch.library.custom_op("nestlearn::self_modifying_walk_backward", mutates_args=())
def _walk_backward(
    to_out: Tensor,
    to_inner: Tensor,
    to_outer: Tensor,
    to_inner_momentum: Tensor | None,
    to_outer_momentum: Tensor | None,
    u: Tensor,
    inner: Tensor,
    outer: Tensor,
    inner_momentum: Tensor | None,
    outer_momentum: Tensor | None,
    base_inner: Tensor | None,
    base_outer: Tensor | None,
    gate_readout: Tensor,
    gate_bias: Tensor,
    retain_readout: Tensor | None,
    retain_bias: Tensor | None,
    momentum_readout: Tensor | None,
    momentum_bias: Tensor | None,
    chunk_size: int,
    rule: int,
    read: int,
    bound: float | None,
    main_scale: float,
    projection_scale: float,
    largest_gate: float,
    operand: torch.dtype,
) -> list[Tensor]:
    """Gradients in the order of `NAMES`, from those of out and of the final state; the states are histories here."""
    _, batch, heads, tokens, _ = u.shape
    state = [
        None if x is None else x.clone(memory_format=torch.contiguous_format)
        for x in (to_inner, to_outer, to_inner_momentum, to_outer_momentum)
    ]
    to_u = torch.zeros_like(u, memory_format=torch.contiguous_format)
    slow = (
        base_inner,
        base_outer,
        gate_readout,
        gate_bias,
        retain_readout,
        retain_bias,
        momentum_readout,
        momentum_bias,
    )
    per_row = [None if x is None else x.new_zeros(batch, *x.shape) for x in slow]
    if to_out.numel():
        walk_backward[(batch * heads,)](
            u.contiguous(),
            *_contiguous(inner, outer, inner_momentum, outer_momentum, *slow),
            to_out.contiguous(),
            to_u,
            *state,
            *per_row,
            heads,
            tokens,
            to_out.numel(),
            inner.shape[2],
            main_scale,
            projection_scale,
            largest_gate,
            1.0 if bound is None else bound,
            **_constants(u, inner, inner_momentum, chunk_size, rule, read, bound, operand),
        )
    gradients = [to_u, *state, *(None if x is None else x.sum(0) for x in per_row)]
    return [u.new_empty(0) if x is None else x for x in gradients]


@_walk_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    u = arguments[5]
    found = []
    for name, value in zip(NAMES, arguments[5:], strict=False):
        if value is None:
            found.append(u.new_empty(0))
        elif name in ("inner", "outer", "inner_momentum", "outer_momentum"):
            found.append(value.new_empty(*value.shape[:2], *value.shape[3:]))
        else:
            found.append(value.new_empty(value.shape))
    return found


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[: len(NAMES)], inputs[len(NAMES) : -1]
    ctx.given = [x is not None for x in tensors]
    # The histories stand in for the states, whose first slot they hold.
    saved = [tensors[0], *output[5:], *tensors[5:]]
    ctx.save_for_backward(*(x if given else None for x, given in zip(saved, ctx.given, strict=True)))
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *to_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    u, histories = saved[0], saved[1:5]
    to_out = to_outputs[0]
    if to_out is None:
        to_out = torch.zeros_like(u[0])
    to_state: list[Tensor | None] = []
    for gradient, history in zip(to_outputs[1:5], histories, strict=True):
        if history is None:
            to_state.append(None)
        else:
            to_state.append(torch.zeros_like(history[:, :, 0]) if gradient is None else gradient)
    found = _walk_backward(to_out, *to_state, *saved, *ctx.options)
    tensors = [x if given else None for x, given in zip(found, ctx.given, strict=True)]
    return *tensors, *(None for _ in ctx.options), None


_walk.register_autograd(_gradients, setup_context=_remember)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _constants(
    u: Tensor,
    inner: Tensor,
    inner_momentum: Tensor | None,
    chunk_size: int,
    rule: int,
    read: int,
    bound: float | None,
    operand: torch.dtype,
) -> dict[str, Any]:
    """What the kernels are compiled for. Tiles of 64 x 64 need the registers of eight warps."""
    width, hidden = u.shape[-1], inner.shape[-2]
    return {
        "C": chunk_size,
        "K": width,
        "N": hidden,
        "M": 5,
        "RULE": rule,
        "READ": read,
        "MOMENTUM": inner_momentum is not None,
        "BOUNDED": bound is not None,
        "OPERAND": OPERANDS[operand],
        "num_warps": 8 if max(chunk_size, width, hidden) == 64 else 4,
        "num_stages": 1,
    }
