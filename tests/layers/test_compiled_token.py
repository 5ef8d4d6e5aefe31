"""A token in compiled code against the layer in PyTorch operations, token by token, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.functional import plain
from nestlearn.functional.kernels import native
from nestlearn.layers import SelfModifyingTitans, Titans, compiled_token
from nestlearn.memory.continuum import ContinuumMemory

DIM, HEADS, TOKENS = 12, 3, 9
EXACT = 1e-11
FEW, MANY = (1, 3), plain.MANY_ROWS + 1
OPTIONS: list[dict[str, Any]] = [
    {},
    {"inner_rule": "gd", "memory_hidden": 7},
    {"inner_rule": "delta", "read": "previous", "momentum": True},
    {"momentum": True, "retain_to": "zero", "projection_chunk_size": 2},
    {"read": "chunk", "projection_chunk_size": 8, "residual_memory": True},
    {"empty_memory": True, "slowest_gate": 0.001, "negative_eigenvalues": True},
    {"negative_eigenvalues": True, "adaptive_query": True, "gate_hidden_ratio": 1.0},
    {"static_projections": ("key", "retention"), "momentum": True},
    {"adaptive_query": True, "momentum": True, "retention": False, "write_bound": None, "memory_hidden": 17},
]
TITANS: list[dict[str, Any]] = [
    {},
    {"momentum": False, "inner_rule": "dgd", "read": "previous"},
    {"memory_hidden": 5, "retain_to": "zero", "read": "chunk"},
]

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled code: {native.unavailable()}")
each_layer = pytest.mark.parametrize(
    ("kind", "options"), [(kind, o) for kind, all_ in ((SelfModifyingTitans, OPTIONS), (Titans, TITANS)) for o in all_]
)


def build(kind: type[nn.Module], options: dict[str, Any], *, conv_width: int = 4) -> Any:
    """A layer none of whose parameters is at its start, with a bound that many errors exceed."""
    torch.manual_seed(0)
    settings = {"chunk_size": 4, "write_bound": 0.5} | options
    layer = kind(DIM, HEADS, conv_width=conv_width, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tokens(rows: int) -> Tensor:
    return torch.randn(rows, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if found.numel():
        assert (found - expected).abs().max() <= EXACT * expected.abs().max().clamp_min(1e-3), what


def assert_decodes(layer: Any, rows: int) -> None:
    """decode_step in compiled code equals forward in PyTorch operations, after every token."""
    x, state = tokens(rows), None
    decoded = layer.init_state(rows)
    for t in range(TOKENS):
        layer.backend = "torch"
        with torch.no_grad():
            y, state = layer(x[:, t : t + 1], state)
        layer.backend = "cpp"
        found, decoded = layer.decode_step(x[:, t : t + 1], decoded)
        assert_near(found, y, f"output {t}")
        assert decoded.keys() == state.keys()
        for name, value in state.items():
            assert_near(decoded[name], value, f"{name} after token {t}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each token in compiled code: whether it went through the whole layer."""
    seen: list[bool] = []
    run_token = compiled_token.run_token

    def spy(token: Any) -> None:
        seen.append(token.projection is not None)
        run_token(token)

    monkeypatch.setattr(compiled_token, "run_token", spy)
    return seen


@each_layer
@pytest.mark.parametrize("conv_width", [1, 4])
def test_a_token_equals_the_layer(
    kind: type[nn.Module], options: dict[str, Any], conv_width: int, calls: list[bool]
) -> None:
    layer = build(kind, options, conv_width=conv_width)
    for rows in (*FEW, MANY):
        calls.clear()
        assert_decodes(layer, rows)
        assert calls == [rows in FEW] * TOKENS


@each_layer
def test_threads_share_a_token(kind: type[nn.Module], options: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_decodes(build(kind, options), 3)
    finally:
        torch.set_num_threads(before)


def test_a_layer_that_was_changed_keeps_its_change(calls: list[bool]) -> None:
    """Hooks, other classes, biases and other dtypes inside a layer do what they do in forward."""

    def hooked(layer: Any) -> None:
        layer.readout.gate.register_forward_hook(lambda _, __, out: 2 * out)

    def biased(layer: Any) -> None:
        layer.streams.projection.bias = nn.Parameter(torch.ones(4 * DIM, dtype=torch.float64))

    def replaced(layer: Any) -> None:
        layer.readout.output = nn.Sequential(layer.readout.output, nn.Tanh())

    def parametrized(layer: Any) -> None:
        nn.utils.parametrizations.weight_norm(layer.readout.gate)
        layer.readout.gate.parametrizations.weight.original0.data.mul_(3)

    def scattered(layer: Any) -> None:
        for module in (layer.readout.gate, layer.memory):
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(value.mT.contiguous().mT))

    for change in (hooked, biased, replaced, parametrized, scattered):
        layer = build(SelfModifyingTitans, {})
        change(layer)
        assert_decodes(layer, 2)
    assert not any(calls)


def test_new_weights_are_seen_at_once() -> None:
    """Nothing of a layer is remembered between tokens: in place, by assignment, or loaded."""
    layer, other = build(SelfModifyingTitans, {}), build(SelfModifyingTitans, {})
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    assert_decodes(layer, 1)
    layer.gate_bias.data.add_(1.0)
    assert_decodes(layer, 1)
    layer.readout.output.weight = nn.Parameter(2 * layer.readout.output.weight.detach())
    assert_decodes(layer, 1)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert_decodes(layer, 1)


def test_only_the_given_state_is_overwritten() -> None:
    """Not the prompt's, whose rows or snapshot it may share, not x, not a parameter."""
    layer, x = build(SelfModifyingTitans, {}), tokens(3)
    parameters = {name: value.clone() for name, value in layer.state_dict().items()}
    _, prompt = layer(x[:1])
    kept = {name: value.detach().clone() for name, value in prompt.items()}
    shared = {name: value.expand(3, *value.shape[1:]) for name, value in prompt.items()}
    given = x.clone()
    for t in range(TOKENS):
        _, shared = layer.decode_step(given[:, t : t + 1], shared)
    assert torch.equal(given, x)
    assert all(torch.equal(prompt[name], value) for name, value in kept.items())
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in parameters.items())


@each_layer
def test_autograd_notices_that_a_state_was_overwritten(kind: type[nn.Module], options: dict[str, Any]) -> None:
    layer = build(kind, options)
    _, state = layer(tokens(2)[:, :3].detach())
    state = {name: value.detach() for name, value in state.items()}
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    seen = {name: (weight * value).sum() for name, value in state.items() if value.is_floating_point()}
    layer.decode_step(tokens(2)[:, 3:4], state)
    for name in ("inner", "outer", "convolution"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            seen[name].backward()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("inner", lambda value: value[:1]),
        ("outer_snapshot", lambda value: value.float()),
        ("convolution", lambda value: value[:, 1:]),
        ("position", lambda value: value.int()),
        ("inner_momentum", lambda value: None),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name: str, wrong: Any) -> None:
    layer = build(SelfModifyingTitans, {"momentum": True})
    state = layer.init_state(2)
    state[name] = wrong(state[name])
    if state[name] is None:
        del state[name]
    with pytest.raises(ValueError, match=name):
        layer.decode_step(tokens(2)[:, :1], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [*FEW, MANY])
@torch.no_grad()
def test_levels_read_a_token(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    for variant in ("sequential", "nested", "independent"):
        system = ContinuumMemory(10, periods=(1, 2), expansion=1.7, variant=variant).to(dtype)  # type: ignore[arg-type]
        x = torch.randn(rows, 10, dtype=dtype)
        torch.testing.assert_close(system.decode_step(x), system(x))
        system.levels[0].up.register_forward_hook(lambda _, __, out: out + 1)  # type: ignore[union-attr]
        torch.testing.assert_close(system.decode_step(x), system(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(system.decode_step(x), system(x))
