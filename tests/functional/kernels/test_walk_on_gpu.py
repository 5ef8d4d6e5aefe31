"""The compiled kernels against the plain layer in float64 on the CPU. They have never been run: see docs/kernels.md."""

import os
from typing import Any

import pytest
import torch

from nestlearn.functional.kernels import available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and available()) or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a CUDA device and Triton that compiles: TRITON_INTERPRET unset",
    ),
]


@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (16, {"chunk_size": 16, "inner_rule": "gd", "read": "chunk"}),
        (32, {"chunk_size": 32, "inner_rule": "delta", "read": "previous", "momentum": True}),
        (64, {"chunk_size": 64}),
        (64, {"chunk_size": 64, "momentum": True, "memory_hidden": 32, "retain_to": "zero"}),
    ],
)
@pytest.mark.parametrize(
    ("operand", "tolerance", "gradient_tolerance"),
    # Half precision rounds operands by up to 2^-11, bf16 by 2^-9; see `test_half_precision_operands_are_near`.
    [(torch.float32, 1e-3, 1e-3), (torch.float16, 5e-3, 3e-2), (torch.bfloat16, 2e-2, 0.12)],
)
def test_equals_the_layer(
    width: int, settings: dict[str, Any], operand: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    from walks import build, compare

    compare(
        build(width=width, heads=2, **settings),
        2 * settings["chunk_size"] + 5,
        batch=2,
        operand=operand,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
        device="cuda",
    )
