"""The layer that walks by kernels beside the layer that walks in operations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from walks import build

pytestmark = pytest.mark.triton_interpret


def run(layer: Any, x: Tensor, backend: str, **options: Any) -> dict[str, Tensor]:
    layer.backend = backend
    layer.zero_grad()
    y, state = layer(x, **options)
    (y.square().sum() + sum(w.square().sum() for name, w in state.items() if name != "position")).backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {name: t.detach().clone() for name, t in {"y": y, **state, **gradients}.items() if t is not None}


@pytest.mark.parametrize("options", [{}, {"momentum": True, "inner_rule": "delta"}], ids=["defaults", "momentum"])
def test_layer_walks_by_kernels(options: dict[str, Any]) -> None:
    layer = build(**options).float()
    x = torch.randn(2, 21, 16)
    expected, found = run(layer, x, "torch"), run(layer, x, "triton")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max()
        assert difference <= 1e-4 * tensor.abs().max(), (name, float(difference))


def test_padded_rows_are_walked_in_operations() -> None:
    layer = build().float()
    x = torch.randn(2, 21, 16)
    lengths = torch.tensor([21, 7])
    expected, found = run(layer, x, "torch", lengths=lengths), run(layer, x, "triton", lengths=lengths)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_query": True}, "setting of adaptive_query"),
        ({"static_projections": ("value",)}, "setting of static_projections"),
        ({"chunk_size": 8}, "expected sizes of 16, 32, 64, got chunk_size 8"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f'backend="triton".*{message}'):
        run(build(**options).float(), torch.randn(1, 3, 16), "triton")
