"""Parts of a block that keep little for their backward pass: what is cheap to compute again is not kept.

Each equals a few PyTorch operations, named `plain_*`, which are taken wherever these forms have no place: on a GPU,
under autocast, torch.compile, torch.func and forward-mode differentiation, and where the backward pass is
differentiated again. Matrix products are never computed twice.

Shapes: B batch, T tokens, D model width, N hidden width, S streams, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.functional.kernels.native import elementwise
from nestlearn.functional.plain import readable

# Without gradients, below so many numbers the operations count, above it the passes over memory.
SMALL = 1 << 14

# Stands for a tensor that is computed again.
_AGAIN = object()

__all__ = [
    "convolved_heads",
    "gated_output",
    "heads_available",
    "mlp_behind_norm",
    "not_kept",
    "recomputable",
    "rms_norm",
]


def recomputable(*tensors: Tensor) -> bool:
    """Whether these forms may take such tensors, and are worth it for the first of them."""
    return (torch.is_grad_enabled() or tensors[0].numel() > SMALL) and readable(*tensors)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; keeps x alone. x (..., D), weight (D,)."""
    if weight.shape != x.shape[-1:] or not recomputable(x, weight):
        return plain_rms_norm(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:2]
            return *_differentiate(partial(plain_rms_norm, eps=ctx.eps), (x, weight), wanted, *gradients), None
        return *_normed_backward(x, weight, gradients[0].contiguous(), ctx.eps), None


def plain_mlp_behind_norm(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    return F.linear(F.gelu(F.linear(plain_rms_norm(x, weight, eps), up)), down)


def mlp_behind_norm(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    """down gelu(up rms_norm(x)); keeps x and what goes into gelu.

    Args:
        x: (..., D).
        weight: (D,), of the norm.
        up: (N, D).
        down: (D, N).
        eps: of the norm.
    """
    y: Tensor = _MLPBehindNorm.apply(x, weight, up, down, eps)
    return y


class _MLPBehindNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
        u = F.linear(_normed(x, weight, eps), up)
        ctx.save_for_backward(x, weight, up, down, u)
        ctx.eps = eps
        return F.linear(F.gelu(u), down)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, u = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            given = (x, weight, up, down)
            return *_differentiate(partial(plain_mlp_behind_norm, eps=ctx.eps), given, needs[:4], *gradients), None
        grad = gradients[0].reshape(-1, down.shape[0])
        u = u.reshape(-1, up.shape[0])
        d_h = grad @ down
        if elementwise.available():
            h, d_u = elementwise.gelu_backward(u, d_h)
        else:
            h, d_u = F.gelu(u), torch.ops.aten.gelu_backward(d_h, u)
        d_down = grad.mT @ h if needs[3] else None
        del h, d_h
        rows = x.reshape(-1, up.shape[1])
        d_up = d_u.mT @ _normed(rows, weight, ctx.eps) if needs[2] else None
        d_x, d_weight = _normed_backward(rows, weight, d_u @ up, ctx.eps, overwrite=True)
        return d_x.view(x.shape), d_weight, d_up, d_down, None


def plain_gated_output(o: Tensor, weight: Tensor, gate: Tensor, output: Tensor, eps: float) -> Tensor:
    return F.linear(plain_rms_norm(o, weight, eps).flatten(-2) * F.silu(gate), output)


def gated_output(o: Tensor, weight: Tensor, gate: Tensor, output: Tensor, eps: float) -> Tensor:
    """output (rms_norm(o) * silu(gate)), with each head normalised; keeps o and gate.

    Args:
        o: (B, T, H, K).
        weight: (K,), of the norm.
        gate: (B, T, H K).
        output: (D, H K).
        eps: of the norm.

    Returns:
        (B, T, D).
    """
    y: Tensor = _GatedOutput.apply(o.contiguous(), weight.contiguous(), gate.contiguous(), output, eps)
    return y


class _GatedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, weight: Tensor, gate: Tensor, output: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(o, weight, gate, output)
        ctx.eps = eps
        if not elementwise.available():
            return plain_gated_output(o, weight, gate, output, eps)
        return F.linear(elementwise.gated_norm(o, weight, gate.view_as(o), eps).flatten(-2), output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        o, weight, gate, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            given = (o, weight, gate, output)
            return *_differentiate(partial(plain_gated_output, eps=ctx.eps), given, needs[:4], *gradients), None
        grad = gradients[0].flatten(0, -2)
        d_z = (grad @ output).view_as(o)
        if elementwise.available():
            z, d_o, d_weight, d_gate = elementwise.gated_norm_backward(o, weight, gate.view_as(o), d_z, ctx.eps)
        else:
            normed, silu = plain_rms_norm(o, weight, ctx.eps), F.silu(gate).view_as(o)
            z = normed * silu
            d_gate = torch.ops.aten.silu_backward(d_z * normed, gate.view_as(o))
            d_o, d_weight = _normed_backward(o, weight, d_z * silu, ctx.eps)
        d_output = grad.mT @ z.view(grad.shape[0], -1) if needs[3] else None
        return d_o, d_weight, d_gate.view_as(gate), d_output, None


def heads_available(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolved_heads` may take such tensors here."""
    return weight.shape[-1:] == x.shape[-1:] and readable(x, weight) and elementwise.available()


def convolved_heads(x: Tensor, weight: Tensor, streams: int, heads: int) -> Tensor:
    """silu of a causal depthwise convolution, each stream and head apart; keeps x alone.

    Args:
        x: (B, T, S H K).
        weight: (taps, S H K), the last tap meets the current token.
        streams: S.
        heads: H.

    Returns:
        (S, B, H, T, K).
    """
    out: Tensor = _ConvolvedHeads.apply(x.contiguous(), weight.contiguous(), streams, heads)
    return out


@contextmanager
def not_kept(heads: Tensor) -> Iterator[None]:
    """Within it nothing keeps `heads`, a view of what `convolved_heads` gave, which computes it again where needed."""
    node: Any = (heads if heads._base is None else heads._base).grad_fn
    sizes = getattr(node, "streams_and_heads", None)
    find_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if sizes is None or find_hooks is None:
        yield
        return
    first, count = heads.data_ptr(), heads.numel()
    # Only the innermost hooks are called: those around, as activation checkpointing's, get all else from here.
    outer_pack, outer_unpack = find_hooks(True) or (lambda t: t, lambda kept: kept)

    def pack(t: Tensor) -> Any:
        return _AGAIN if t.data_ptr() == first and t.numel() == count else outer_pack(t)

    def unpack(kept: Any) -> Tensor:
        if kept is not _AGAIN:
            return outer_unpack(kept)
        node.unpacked = node.saved_tensors  # activation checkpointing gives them out once only
        return elementwise.convolved_heads(*node.unpacked, *sizes)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def plain_convolved_heads(x: Tensor, weight: Tensor, streams: int, heads: int) -> Tensor:
    taps, tokens = weight.shape[0], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = torch.stack([padded[:, i : i + tokens] * weight[i] for i in range(taps)]).sum(0)
    return F.silu(y).unflatten(-1, (streams, heads, -1)).permute(2, 0, 3, 1, 4)


class _ConvolvedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, streams: int, heads: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.streams_and_heads = (streams, heads)
        return elementwise.convolved_heads(x, weight, streams, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.__dict__.pop("unpacked", None) or ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:2]
            found = _differentiate(
                lambda *own: plain_convolved_heads(*own, *ctx.streams_and_heads), (x, weight), wanted, *gradients
            )
            return *found, None, None
        return (
            *elementwise.convolved_heads_backward(x, weight, gradients[0].contiguous(), *ctx.streams_and_heads),
            None,
            None,
        )


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if elementwise.available():
        return elementwise.rms_norm(x.contiguous(), weight.contiguous(), eps)
    return plain_rms_norm(x, weight, eps)


def _normed_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, eps: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """d_x and d_weight; d_x may overwrite d_y."""
    if elementwise.available():
        x, weight = x.contiguous(), weight.contiguous()
        return elementwise.rms_norm_backward(x, weight, d_y, d_y if overwrite else torch.empty_like(x), eps)
    r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    unit = x * r
    d_weight = (d_y * unit).flatten(0, -2).sum(0)
    g = d_y * weight
    return (g - unit * (g * unit).mean(-1, keepdim=True)).mul_(r), d_weight


def _differentiate(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the plain form that can be differentiated again."""
    # Through views: an input may depend on another one, and each wants its own part of the gradient alone.
    own = [t.view_as(t) for t in inputs]
    found = iter(
        torch.autograd.grad(
            plain(*own), [t for t, want in zip(own, wanted, strict=True) if want], grad, create_graph=True
        )
    )
    return [next(found) if want else None for want in wanted]
