"""Where compiled code may take the place of modules and operations: nobody watches them, and nothing is unusual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

# From so many rows on, the matrix products of PyTorch are faster than those of the compiled code for a token, which
# reads a large matrix once and is made for little else.
MANY_ROWS = 4


def held(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of this name. An attribute of a module is slow to look up, and a token needs many."""
    tensor = module._parameters.get(name)
    found: Tensor | None = getattr(module, name) if tensor is None else tensor
    return found


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class and has no hooks."""
    return (
        module is not None
        and type(module) is kind
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or _has_any_global_hook()
        )
    )


def plain_weight(module: nn.Module | None, kind: type[nn.Module], like: Tensor) -> Tensor | None:
    """The weight of a plain module without bias, if compiled code can read it beside `like`, a tensor on the CPU."""
    if module is None or not is_plain(module, kind) or module._parameters.get("bias") is not None:
        return None
    weight = held(module, "weight")
    if weight is None or weight.dtype != like.dtype or not weight.is_cpu or not weight.is_contiguous():
        return None
    return weight


def readable(*tensors: Tensor) -> bool:
    """Whether compiled code may read such tensors here: ordinary ones on the CPU, of one dtype, fp32 or fp64, and none
    of the ways to run PyTorch that have to see every operation."""
    dtype = tensors[0].dtype
    return (
        not torch.compiler.is_compiling()
        and dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == dtype and t.numel() for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_small(x: Tensor) -> bool:
    """Whether compiled code may take x (B, ..., D) of one token: no gradients, and few rows."""
    return x.shape[0] < MANY_ROWS and not torch.is_grad_enabled() and readable(x)
