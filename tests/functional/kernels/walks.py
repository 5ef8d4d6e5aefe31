"""The kernels' walk beside that of the plain layer, with the same parameters, inputs and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.functional.kernels import self_modifying_walk
from nestlearn.layers.chunked_memory import MemoryState
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.timeline import plan_timeline
from nestlearn.memory.mlp import MLPWeights

Tensors = dict[str, Tensor]
READOUTS = ("gate_readout", "gate_bias", "retain_readout", "retain_bias", "momentum_readout", "momentum_bias")


def build(width: int = 16, heads: int = 1, seed: int = 0, **settings: Any) -> SelfModifyingTitans:
    """A layer in float64 with W1 and all biases random."""
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(
        width * heads,
        heads,
        **{"chunk_size": 16, "write_scale": 0.6, "write_bound": 0.5, "gate_hidden_ratio": 1.0, **settings},
    ).double()
    with torch.no_grad():
        layer.memory.outer.normal_(std=0.3)
        for name, parameter in layer.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return layer


def leaves_of(layer: SelfModifyingTitans, tokens: int, batch: int = 1) -> Tensors:
    """What the walk is a function of, in float64: u, a random state, what is fixed of the memories, the read-outs."""
    heads = layer.heads
    width = layer.memory.inner.shape[-1]
    leaves = {"u": torch.randn(4, batch, heads, tokens, width, dtype=torch.float64)}
    for name, value in layer.init_state(batch).items():
        if name in ("inner", "outer", "inner_momentum", "outer_momentum"):
            leaves[name] = value + 0.1 * torch.randn_like(value)
    if layer.retain_to == "initial":
        leaves |= {"base_inner": layer.memory.inner, "base_outer": layer.memory.outer}
    leaves |= {name: getattr(layer, name) for name in READOUTS if hasattr(layer, name)}
    return {name: value.detach().requires_grad_() for name, value in leaves.items()}


def plain_walk(layer: SelfModifyingTitans, leaves: Tensors) -> Tensors:
    """Outputs and final state by the layer's own segments."""
    for name in READOUTS:
        if name in leaves:
            setattr(layer, name, torch.nn.Parameter(leaves[name]))
            layer._parameters[name] = leaves[name]  # type: ignore[assignment]
    if "base_inner" in leaves:
        layer.memory._parameters.update(inner=leaves["base_inner"], outer=leaves["base_outer"])  # type: ignore[arg-type]
    u = leaves["u"]
    _, batch, _, tokens, _ = u.shape
    weights = MLPWeights(leaves["inner"], leaves["outer"])
    momentum = MLPWeights(leaves["inner_momentum"], leaves["outer_momentum"]) if layer.momentum else None
    state = MemoryState(weights, weights, momentum)
    inputs = u.permute(1, 3, 0, 2, 4).flatten(2)  # what `Streams.split` undoes
    start = torch.zeros(batch, dtype=torch.long)
    timeline = plan_timeline(start, tokens, chunk=layer.chunk_size, period=layer.chunk_size)
    outputs = []
    for segment, part in zip(timeline.segments, timeline.cut(inputs), strict=True):
        out, state = layer._segment(part, state, segment)
        outputs.append(out)
    return {"out": torch.cat(outputs, dim=2), **{k: v for k, v in state.named().items() if "snapshot" not in k}}


def options_of(layer: SelfModifyingTitans) -> dict[str, Any]:
    scale = layer._scale(torch.ones(1, dtype=torch.float64)).flatten()
    return {
        "chunk_size": layer.chunk_size,
        "main_scale": scale[-1].item(),
        "projection_scale": scale[0].item(),
        "rule": layer.inner_rule,
        "read": layer.read,
        "bound": layer.write_bound,
        "largest_gate": layer.largest_gate,
    }


def kernel_walk(
    layer: SelfModifyingTitans, leaves: Tensors, operand: torch.dtype = torch.float32, **changed: Any
) -> Tensors:
    """The same by the kernels, from leaves in fp32."""
    names = ("u", "inner", "outer", "base_inner", "base_outer", *READOUTS, "inner_momentum", "outer_momentum")
    arguments = [leaves.get(name) for name in names]
    walk = self_modifying_walk(*arguments, **(options_of(layer) | changed), operand=operand)  # type: ignore[arg-type]
    return {name: value for name, value in walk._asdict().items() if value is not None}


def single(leaves: Tensors, device: str = "cpu") -> Tensors:
    return {name: value.detach().to(device, torch.float32).requires_grad_() for name, value in leaves.items()}


def gradients(results: Tensors, leaves: Tensors) -> Tensors:
    """Of the product of all results with fixed random cotangents."""
    generator = torch.Generator().manual_seed(17)
    total = torch.zeros((), dtype=torch.float64)
    for value in results.values():
        cotangent = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        total = total + (value * cotangent.to(value)).sum().cpu()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def worst(found: Tensors, expected: Tensors) -> dict[str, float]:
    """max |difference| / max |expected| of each tensor."""
    assert found.keys() == expected.keys()
    differences = {}
    for name, reference in expected.items():
        assert found[name].shape == reference.shape, name
        assert reference.isfinite().all(), name
        largest = reference.abs().max().item()
        distance = (found[name].cpu().double() - reference).abs().max().item()
        differences[name] = distance / (largest if largest > 1e-12 else 1.0)
    return differences


def compare(
    layer: SelfModifyingTitans,
    tokens: int,
    *,
    batch: int = 1,
    operand: torch.dtype = torch.float32,
    tolerance: float,
    gradient_tolerance: float | None = None,
    device: str = "cpu",
) -> None:
    """Outputs, final state and the gradient of every input, against the plain walk in float64."""
    leaves = leaves_of(layer, tokens, batch)
    expected = plain_walk(layer, leaves)
    ours = single(leaves, device)
    found = kernel_walk(layer, ours, operand)
    for what, limit, differences in (
        ("result", tolerance, worst(found, expected)),
        ("gradient", gradient_tolerance or tolerance, worst(gradients(found, ours), gradients(expected, leaves))),
    ):
        print(what, {name: f"{difference:.1e}" for name, difference in differences.items()})
        for name, difference in differences.items():
            assert difference <= limit, f"{what} {name}: {difference:.1e}"
