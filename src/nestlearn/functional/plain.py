"""Which modules do no more than their class says, so that compiled code may take their place for one token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# From so many rows on, the matrix products of PyTorch are faster than those of the compiled code, which reads a large
# matrix once and is made for little else.
MANY = 4


def held(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of this name. An attribute of a module is slow to look up, and a token needs many."""
    tensor = module._parameters.get(name)
    found: Tensor | None = getattr(module, name) if tensor is None else tensor
    return found


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class and has no hooks."""
    return module is not None and type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def plain_weight(module: nn.Module | None, kind: type[nn.Module], like: Tensor) -> Tensor | None:
    """The weight of a plain module without bias, if compiled code can read it beside `like`, a tensor on the CPU."""
    if module is None or not is_plain(module, kind) or module._parameters.get("bias") is not None:
        return None
    weight = held(module, "weight")
    if weight is None or weight.dtype != like.dtype or not weight.is_cpu or not weight.is_contiguous():
        return None
    return weight


def is_small(x: Tensor) -> bool:
    """Whether compiled code may take x (B, ..., D) of one token: no gradients, few rows, on the CPU, fp32 or fp64."""
    return (
        x.is_cpu
        and x.shape[0] < MANY
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
