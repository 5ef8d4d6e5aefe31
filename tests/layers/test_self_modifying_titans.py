"""The fast layer against its token-by-token specification: outputs, states, and the gradients of everything."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.layers.self_modifying_specification import specify
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans

State = dict[str, Tensor]

RULES = ("dgd", "gd", "delta")
READS = ("token", "previous", "chunk")
CHUNKS = ((4, 4), (8, 2), (2, 8), (1, 1))
# No multiple of a chunk, and with the positions below, at least one whole chunk of the larger size.
TOKENS = {(4, 4): 6, (8, 2): 9, (2, 8): 9, (1, 1): 3}
TOLERANCE = 1e-10


def build(seed: int = 0, dim: int = 8, **settings: Any) -> SelfModifyingTitans:
    """A layer in float64 with nothing at its initial value: W1, convolution, norm and biases are random."""
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(dim, 2, **settings).double()
    with torch.no_grad():
        layer.memory.outer.normal_(std=0.7)
        layer.streams.convolution.weight.normal_(std=0.7)
        layer.streams.projection.weight.normal_()
        layer.readout.norm.weight.uniform_(0.5, 1.5)
        for name, parameter in layer.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return layer


def random_state(layer: SelfModifyingTitans, position: list[int]) -> State:
    """A state in which running memories, snapshots and momentum all differ, as in the middle of a chunk."""
    state = layer.init_state(len(position), dtype=torch.float64)
    state = {
        name: value if name == "position" else (value + 0.3 * torch.randn_like(value)).detach().requires_grad_()
        for name, value in state.items()
    }
    return state | {"position": torch.tensor(position)}


def everything(
    function: Any, layer: nn.Module, x: Tensor, state: State | None, cotangents: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs and final state, gradients of their product with the cotangents), all by name."""
    y, after = function(x, state)
    results = {"y": y, **after}
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves |= {f"state.{name}": value for name, value in (state or {}).items() if value.requires_grad}
    if cotangents is None:
        torch.manual_seed(17)
        cotangents = {name: torch.randn_like(value) for name, value in results.items() if value.is_floating_point()}
    total = sum((results[name] * cotangent).sum() for name, cotangent in cotangents.items())
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results, dict(zip(leaves, gradients, strict=True))


def difference(found: Tensor, expected: Tensor) -> float:
    """max |difference| / max |expected|; absolute where nothing is expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if found.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest if largest > 1e-12 else 1.0)


def compare(layer: SelfModifyingTitans, tokens: int, state: State | None, batch: int = 2) -> None:
    x = torch.randn(batch, tokens, layer.readout.gate.in_features, dtype=torch.float64, requires_grad=True)
    expected = everything(lambda x, s: specify(layer, x, s), layer, x, state, None)
    found = everything(layer, layer, x, state, None)
    for kind, ours, theirs in zip(("result", "gradient"), found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, reference in theirs.items():
            assert reference.isfinite().all(), f"{kind} {name} of the specification is not finite"
            error = difference(ours[name], reference)
            assert error <= TOLERANCE, f"{kind} of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("adaptive_query", [False, True])
@pytest.mark.parametrize("negative_eigenvalues", [False, True])
@pytest.mark.parametrize("retain_to", ["initial", "zero"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_specification(
    rule: str, momentum: bool, chunks: tuple[int, int], retain_to: str, negative_eigenvalues: bool, adaptive_query: bool
) -> None:
    layer = build(
        inner_rule=rule,
        momentum=momentum,
        chunk_size=chunks[0],
        projection_chunk_size=chunks[1],
        retain_to=retain_to,
        negative_eigenvalues=negative_eigenvalues,
        adaptive_query=adaptive_query,
    )
    for read in READS:
        layer.read = read
        compare(layer, TOKENS[chunks], random_state(layer, [1 % max(chunks)] * 2))
