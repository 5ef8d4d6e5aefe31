"""Triton kernels for the GPU, and in `native` C++ for the CPU, behind functions of plain tensors.

`self_modifying_walk` carries the memories of self-modifying Titans over whole sequences, forward and backward. Its
kernels compile for Hopper (sm_90) and are tested in Triton's interpreter on the CPU; they have never been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

__all__ = ["available", "self_modifying_walk"]


def available() -> bool:
    """Whether the kernels can run here: Triton is installed, and there is a CUDA device or its interpreter is on.

    The interpreter (`TRITON_INTERPRET=1`, set before the first import of Triton) is for tests: it is thousands of times
    slower, and its bf16 is wrong.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()


def __getattr__(name: str) -> Any:
    # Importing Triton takes a second, and is not possible everywhere.
    if name == "self_modifying_walk":
        from nestlearn.functional.kernels.op import self_modifying_walk

        return self_modifying_walk
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
