"""Parts that keep little for their backward pass, against the plain operations that they equal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.functional import recomputed
from nestlearn.functional.kernels.native import elementwise

Form = Callable[..., Tensor]

# Sizes that no vector, thread or stretch of tokens divides.
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[Any, ...]]] = {
    "rms_norm": (((3, 131, 37), (37,)), (1e-5,)),
    "mlp_behind_norm": (((3, 131, 13), (13,), (37, 13), (13, 37)), (1e-5,)),
    "gated_output": (((3, 131, 3, 11), (11,), (3, 131, 33), (10, 33)), (1e-6,)),
    "convolved_heads": (((3, 131, 66), (4, 66)), (2, 3)),
}
SMALL = {
    "rms_norm": (((2, 3, 5), (5,)), (1e-5,)),
    "mlp_behind_norm": (((2, 3, 3), (3,), (4, 3), (3, 4)), (1e-5,)),
    "gated_output": (((1, 3, 2, 3), (3,), (1, 3, 6), (2, 6)), (1e-6,)),
    "convolved_heads": (((1, 5, 4), (3, 4)), (2, 1)),
}


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, where there are any, and in PyTorch operations alone."""
    if request.param == "compiled" and not elementwise.available():
        pytest.skip("no C++ compiler here")
    if request.param == "torch":
        monkeypatch.setattr(elementwise, "available", lambda: False)
    return str(request.param)


def both(name: str, form: str) -> tuple[Form, Form]:
    if (name, form) == ("convolved_heads", "torch"):
        pytest.skip("its form in PyTorch operations is that of Streams")
    return getattr(recomputed, name), getattr(recomputed, f"plain_{name}")


def inputs(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def assert_equal(fused: Form, plain: Form, given: list[Tensor], settings: tuple[Any, ...]) -> None:
    found, expected = fused(*given, *settings), plain(*given, *settings)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    # A sum over all tokens rounds in fp32 by its largest terms.
    tolerance = {} if found.dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(
        torch.autograd.grad(found, given, gradient), torch.autograd.grad(expected, given, gradient), **tolerance
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_the_plain_operations(
    name: str, dtype: torch.dtype, threads: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "_threads", lambda numbers: threads)
    fused, plain = both(name, form)
    shapes, settings = CASES[name]
    assert_equal(fused, plain, inputs(shapes, dtype), settings)


@pytest.mark.parametrize("tokens", [1, 2, 3, 128, 129, 260])
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
def test_convolution_of_any_length(tokens: int, taps: int) -> None:
    fused, plain = both("convolved_heads", "compiled" if elementwise.available() else "torch")
    assert_equal(fused, plain, inputs(((2, tokens, 12), (taps, 12))), (3, 2))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_once_and_twice(name: str, form: str) -> None:
    fused, _ = both(name, form)
    shapes, settings = SMALL[name]
    given = inputs(shapes)
    assert torch.autograd.gradcheck(lambda *own: fused(*own, *settings), given)
    assert torch.autograd.gradgradcheck(lambda *own: fused(*own, *settings), given)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_some_inputs_alone(name: str, form: str) -> None:
    fused, plain = both(name, form)
    shapes, settings = CASES[name]
    for wanted in range(len(shapes)):
        given = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs(shapes))]
        gradients = [torch.autograd.grad(f(*given, *settings).square().sum(), given[wanted]) for f in (fused, plain)]
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_gradients_stay_as_they_were(name: str, form: str) -> None:
    fused, _ = both(name, form)
    shapes, settings = CASES[name]
    given = inputs(shapes)
    found = fused(*given, *settings)
    gradient = torch.randn_like(found)
    before = [x.clone() for x in (*given, gradient)]
    first = torch.autograd.grad(found, given, gradient, retain_graph=True)
    again = torch.autograd.grad(found, given, gradient)
    for one, two in zip((*before, *first), (*given, gradient, *again), strict=True):
        assert torch.equal(one, two)


def test_not_a_number_and_infinity_show() -> None:
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, torch.inf]], requires_grad=True)
    y = recomputed.rms_norm(x, torch.ones(2), 1e-5)
    assert y.isfinite().all(-1).tolist() == [True, False, False]
    if elementwise.available():
        h, d_u = elementwise.gelu_backward(torch.tensor([torch.nan, 0.0, 2.0**99]), torch.ones(3))
        assert h[0].isnan()
        assert d_u[0].isnan()
        assert h[1:].tolist() == [0.0, 2.0**99]
        assert d_u[1:].tolist() == [0.5, 1.0]


def test_gelu_over_its_whole_range() -> None:
    if not elementwise.available():
        pytest.skip("no C++ compiler here")
    u = torch.linspace(-12, 12, 4001)
    d_h = torch.randn(4001)
    expected = torch.nn.functional.gelu(u), torch.ops.aten.gelu_backward(d_h, u)
    torch.testing.assert_close(elementwise.gelu_backward(u, d_h.clone()), expected, atol=1e-6, rtol=1e-5)


def test_takes_no_tensors_that_it_does_not_know() -> None:
    x = torch.randn(300, 300, requires_grad=True)
    assert recomputed.recomputable(x)
    assert not recomputed.recomputable(x.bfloat16())
    assert not recomputed.recomputable(x, x.double())
    assert not recomputed.recomputable(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not recomputed.recomputable(x)
    with torch.no_grad():
        assert recomputed.recomputable(x)
        assert not recomputed.recomputable(x[:10])
    seen = []
    torch.func.grad(lambda y: (seen.append(recomputed.recomputable(y)), y.sum())[1])(x)
    assert seen == [False]
