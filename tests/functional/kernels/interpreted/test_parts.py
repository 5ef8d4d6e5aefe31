"""The two parts of the kernels that a careless form would get wrong in fp32."""

import pytest
import torch
import triton
import triton.language as tl

from nestlearn.functional.kernels.parts import load_tile, log_sigmoid, store_tile, unit_triangular_inverse

pytestmark = pytest.mark.triton_interpret


@triton.jit
def invert(factor, inverse, C: tl.constexpr):  # type: ignore[no-untyped-def]
    store_tile(inverse, unit_triangular_inverse(load_tile(factor, C, C), C), C, C)


@triton.jit
def log_of_sigmoid(x, y, C: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, C)
    tl.store(y + places, log_sigmoid(tl.load(x + places)))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("kind", ["equal keys", "opposite keys", "random keys"])
def test_the_inverse_is_as_exact_as_substitution(size: int, kind: str) -> None:
    """Equal and opposite keys give the factors whose powers grow fastest: a Neumann series of 64 loses every digit."""
    keys = torch.nn.functional.normalize(torch.randn(size, 4, dtype=torch.float64), dim=-1)
    if kind != "random keys":
        keys = torch.ones(size, 1, dtype=torch.float64)
    if kind == "opposite keys":
        keys[1::2] *= -1
    factor = (0.99 * keys @ keys.T).tril(-1)
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + factor)
    found = torch.empty(size, size)
    invert[(1,)](factor.float(), found, C=size)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(found, found.tril())


def test_the_logarithm_of_a_sigmoid_near_one_keeps_its_digits() -> None:
    """A half-life of 16,384 tokens is a log retention of -4e-5, which 1 + y would round away."""
    x = torch.linspace(-80, 80, 64)
    found = torch.empty(64)
    log_of_sigmoid[(1,)](x, found, C=64)
    torch.testing.assert_close(found.double(), torch.nn.functional.logsigmoid(x.double()), rtol=1e-6, atol=1e-38)
