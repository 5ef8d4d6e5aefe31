"""The surprises in closed form against autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.functional import linear_surprise, mlp_surprise
from nestlearn.functional.surprise import clip_norm, normalize, silu_slope


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_linear_surprise_is_minus_the_gradient() -> None:
    """Eq. 93: value key^T = -d/dM 1/2 |M k - target|^2, summed over tokens."""
    torch.manual_seed(0)
    memory, keys, targets = normal(2, 3, 4), normal(2, 6, 4), normal(2, 6, 3)
    surprise = linear_surprise(memory, keys, targets)
    (gradient,) = torch.autograd.grad((keys @ memory.mT - targets).square().sum() / 2, memory)
    torch.testing.assert_close(surprise.value.mT @ surprise.key, -gradient)


@pytest.mark.parametrize("residual", [False, True])
def test_mlp_surprise_is_minus_the_gradient_of_each_map(residual: bool) -> None:
    torch.manual_seed(1)
    outer, inner, keys, targets = normal(2, 4, 5), normal(2, 5, 4), normal(2, 6, 4), normal(2, 6, 4)
    surprise = mlp_surprise(outer, inner, keys, targets, residual=residual)
    read = F.silu(keys @ inner.mT) @ outer.mT + (keys if residual else 0)
    loss = (read - targets).square().sum() / 2
    expected = torch.autograd.grad(loss, (inner, outer), create_graph=True)
    found = [pair.value.mT @ pair.key for pair in surprise]
    torch.testing.assert_close(found, [-gradient for gradient in expected])
    # And once more: the surprises are differentiated by the outer loss.
    cotangents = [torch.randn_like(gradient) for gradient in expected]
    leaves = (outer, inner, keys, targets)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, cotangents),
        torch.autograd.grad([-gradient for gradient in expected], leaves, cotangents),
    )


def test_the_bound_holds_for_the_error_and_for_its_image() -> None:
    torch.manual_seed(2)
    outer, inner, keys, targets = normal(4, 5), normal(5, 4), normal(6, 4), normal(6, 4)
    free, tight = (mlp_surprise(outer, inner, keys, targets, bound=bound) for bound in (None, 0.3))
    for ours, theirs in zip(tight, free, strict=True):
        assert (theirs.value.norm(dim=-1) > 0.3).any()
        assert ours.value.norm(dim=-1).max() <= 0.3 + 1e-12
        torch.testing.assert_close(F.normalize(ours.value, dim=-1), F.normalize(theirs.value, dim=-1))
        assert torch.equal(ours.key, theirs.key)
    # The image is that of the bounded error, bounded once more.
    error = -tight.outer.value
    z = keys @ inner.mT
    (image,) = torch.autograd.grad(F.silu(z) @ outer.mT, z, error, create_graph=True)
    norm = image.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(tight.inner.value, -image * (0.3 / norm).clamp_max(1.0))


def test_clip_norm_is_the_identity_inside_and_safe_at_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [3.0, 4.0], [1e-30, 0.0]], dtype=torch.float64, requires_grad=True)
    y = clip_norm(x, 1.0)
    torch.testing.assert_close(y[:2], x[:2])
    torch.testing.assert_close(y[2].norm(), torch.tensor(1.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[:2], torch.ones(2, 2, dtype=torch.float64))
    assert clip_norm(x, None) is x
    assert torch.autograd.gradcheck(lambda x: clip_norm(x, 1.0), normal(5, 3))


def test_normalize_and_slope() -> None:
    x = normal(5, 3)
    torch.testing.assert_close(normalize(x).norm(dim=-1), torch.ones(5, dtype=torch.float64))
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(normalize(zero), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.autograd.grad(normalize(zero).sum(), zero)[0].isfinite().all()
    (slope,) = torch.autograd.grad(F.silu(x).sum(), x)
    torch.testing.assert_close(silu_slope(x, F.silu(x)), slope)
