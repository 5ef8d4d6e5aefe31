"""Newton-Schulz: what it does to singular values, and to nothing else."""

import pytest
import torch
from torch import Tensor

from nestlearn.functional import newton_schulz
from nestlearn.functional.newton_schulz import CUBIC, QUINTIC

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1), (1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("coefficients", [QUINTIC, CUBIC])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_acts_on_singular_values_alone(shape: tuple[int, int], coefficients: tuple[float, float, float]) -> None:
    """X = U s V^T becomes U p(p(...p(s/|s|))) V^T with p(s) = a s + b s^3 + c s^5: tall, wide and square alike."""
    x = random(*shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    a, b, c = coefficients
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(x, coefficients=coefficients), u @ torch.diag(s) @ vh)


def test_the_quintic_brings_singular_values_near_one() -> None:
    """From condition numbers up to a hundred, within Muon's band after its five steps."""
    u, v = torch.linalg.qr(random(16, 16)).Q, torch.linalg.qr(random(16, 16, seed=1)).Q
    x = u @ torch.diag(torch.logspace(0, -2, 16, dtype=torch.float64)) @ v
    s = torch.linalg.svdvals(newton_schulz(x))
    assert s.min() > 0.65
    assert s.max() < 1.25


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cubic_converges_to_the_nearest_semi_orthogonal_matrix(shape: tuple[int, int]) -> None:
    x = random(*shape)
    found = newton_schulz(x, steps=40, coefficients=CUBIC)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(found, u @ vh, rtol=1e-9, atol=1e-9)
    gram = found @ found.mT if shape[0] <= shape[1] else found.mT @ found
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_a_cubic_step_is_gradient_descent_towards_orthogonality() -> None:
    """Eq. 43-44 without the proximity term and step 1/4: O - 1/4 * 2 O (O^T O - I)."""
    x = random(4, 6)
    o = x / (x.norm() + 1e-7)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(x, steps=1, coefficients=CUBIC), o - 0.5 * o @ (o.mT @ o - identity))


@pytest.mark.parametrize("coefficients", [QUINTIC, CUBIC])
def test_scale_and_transpose(coefficients: tuple[float, float, float]) -> None:
    x = random(4, 7)
    found = newton_schulz(x, coefficients=coefficients)
    torch.testing.assert_close(newton_schulz(1e4 * x, coefficients=coefficients), found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(newton_schulz(x.mT, coefficients=coefficients), found.mT)


def test_a_zero_matrix_stays_zero_and_no_steps_normalise() -> None:
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    assert torch.equal(newton_schulz(zero), torch.zeros(2, 3, 4))
    x = random(3, 4)
    torch.testing.assert_close(newton_schulz(x, steps=0), x / (x.norm() + 1e-7))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_batch_is_its_matrices_and_nothing_changes_in_place(shape: tuple[int, int]) -> None:
    x = random(2, 3, *shape)
    kept = x.clone()
    found = newton_schulz(x)
    assert torch.equal(x, kept)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], newton_schulz(x[i, j]))


def test_single_precision_and_gradients() -> None:
    x = random(5, 8)
    found = newton_schulz(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), newton_schulz(x), rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, steps=3), random(2, 3).requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": torch.zeros(3)}, "matrix: expected"),
        ({"matrix": torch.zeros(3, 3), "steps": -1}, "steps: expected 0 or more, got -1"),
        ({"matrix": torch.zeros(3, 3), "coefficients": (1.0, 2.0)}, "coefficients: expected three numbers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz(**arguments)  # type: ignore[arg-type]
