"""The compiled walk against the walk in PyTorch operations: outputs, states and every gradient, in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.functional.kernels import native
from nestlearn.functional.kernels.native import elementwise
from nestlearn.layers import SelfModifyingTitans, Titans

BATCH, TOKENS, DIM, HEADS = 3, 11, 8, 2

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled walk here: {native.unavailable()}"
)

# A bound that most errors exceed, so that its derivative counts.
DEFAULTS: dict[str, Any] = {"chunk_size": 4, "write_bound": 1.0}
OPTIONS: dict[str, list[Any]] = {
    "inner_rule": ["gd", "delta"],
    "momentum": [True],
    "read": ["previous", "chunk"],
    "retain_to": ["zero"],
    "retention": [False],
    "negative_eigenvalues": [True],
    "adaptive_query": [True],
    "static_projections": [("key",), ("value", "rate")],
    "residual_memory": [True],
    "empty_memory": [True],
    "write_bound": [None, 4.0],
    "projection_chunk_size": [2, 8],
    "memory_hidden": [6, 17],
    "gate_hidden_ratio": [0.25, 0.6],
    "detach_every": [2],
}
SINGLE: list[dict[str, Any]] = [{name: value} for name, values in OPTIONS.items() for value in values]
PAIRS = [a | b for a, b in itertools.combinations(SINGLE, 2) if a.keys() != b.keys()]
# A memory that decays to zero cannot stay as it is.
PAIRS = [p for p in PAIRS if not ("static_projections" in p and p.get("retain_to") == "zero")]
PAIRS = [p for p in PAIRS if not {"empty_memory", "residual_memory"} <= p.keys()]


def label(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "defaults"


def stir(layer: nn.Module) -> nn.Module:
    """No parameter at its initial value, no memory empty."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def run(layer: nn.Module, x: Tensor, state: dict[str, Tensor] | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that comes out of one call, and the gradient of everything that went in."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    if state is not None:
        state = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in state.items()}
    y, after = layer(x, state, **options)
    generator = torch.Generator().manual_seed(1)
    results = {"y": y} | {f"state {name}": after[name] for name in sorted(after) if after[name].is_floating_point()}
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in results.values()]
    # Zeros that narrow memories are padded with are no results.
    weights = [w * (t.detach() != 0) for w, t in zip(weights, results.values(), strict=True)]
    torch.stack([(t * w).sum() for t, w in zip(results.values(), weights, strict=True)]).sum().backward()
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    gradients |= {f"old {name}": t.grad for name, t in (state or {}).items() if t.is_floating_point()}
    found = {name: t.detach() for name, t in results.items()}
    return found | {f"gradient of {name}": torch.zeros(1) if g is None else g for name, g in gradients.items()}


def assert_equal_walks(layer: Any, x: Tensor, state: dict[str, Tensor] | None = None, **options: Any) -> None:
    walks = {}
    for backend in ("torch", "cpp"):
        layer.backend = backend
        walks[backend] = run(layer, x, state, options)
    for name, expected in walks["torch"].items():
        difference = (walks["cpp"][name] - expected).abs().max() if expected.numel() else torch.tensor(0.0)
        assert difference <= 1e-11 * expected.abs().max().clamp_min(1e-6), (name, float(difference))


def half_a_chunk_on(layer: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        state: dict[str, Tensor] = layer(torch.randn(BATCH, 6, DIM, dtype=torch.float64))[1]
    return state


@pytest.mark.parametrize("options", [{}, *SINGLE], ids=label)
def test_compiled_walk_equals_the_walk_in_operations(options: dict[str, Any]) -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, **{**DEFAULTS, **options}).double())
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    assert_equal_walks(layer, x)
    state = half_a_chunk_on(layer)
    assert_equal_walks(layer, x, state)
    assert_equal_walks(layer, x[:, :1], state)
    assert_equal_walks(layer, x, lengths=torch.tensor([TOKENS, 5, 0]))
    starts = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    starts[0, 3] = starts[1, 8] = starts[2, 0] = True
    assert_equal_walks(layer, x, state, document_starts=starts)


@pytest.mark.parametrize("options", PAIRS, ids=label)
def test_compiled_walk_equals_the_walk_in_operations_for_pairs_of_options(options: dict[str, Any]) -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, **{**DEFAULTS, **options}).double())
    assert_equal_walks(layer, torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64), half_a_chunk_on(layer))


@pytest.mark.parametrize("rule", ["gd", "dgd", "delta"])
@pytest.mark.parametrize("momentum", [True, False])
def test_compiled_walk_of_titans(rule: Any, momentum: bool) -> None:
    layer = stir(Titans(DIM, HEADS, inner_rule=rule, momentum=momentum, **DEFAULTS).double())
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    assert_equal_walks(layer, x)
    assert_equal_walks(layer, x, half_a_chunk_on(layer))


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 100, 130])
@pytest.mark.parametrize("momentum", [False, True])
def test_compiled_walk_at_the_sizes_it_is_made_for(tokens: int, momentum: bool) -> None:
    """Heads of 64, chunks of 64: whole vectors, which small sizes never fill."""
    layer = stir(SelfModifyingTitans(64, 1, momentum=momentum).double())
    with torch.no_grad():  # so large a stir would make errors of thousands
        for parameter in layer.memory.parameters():
            parameter.mul_(0.3)
    assert_equal_walks(layer, torch.randn(2, tokens, 64, dtype=torch.float64))


@pytest.mark.parametrize("hidden", [None, 24])
def test_compiled_walk_in_single_precision(hidden: int | None) -> None:
    """Against the walk in operations in float64."""
    layer = SelfModifyingTitans(64, 2, chunk_size=16, memory_hidden=hidden).double()
    with torch.no_grad():
        layer.memory.outer.normal_(std=0.1)
    x = torch.randn(2, 45, 64, dtype=torch.float64)
    layer.backend = "torch"
    exact = {name: t.clone() for name, t in run(layer, x, None, {}).items()}
    layer.backend = "cpp"
    rounded = run(layer.float(), x.float(), None, {})
    for name, expected in exact.items():
        difference = (rounded[name].double() - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max(), (name, float(difference), float(expected.abs().max()))


def test_number_of_threads_changes_nothing() -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, backend="cpp", **DEFAULTS).double())
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(layer, x, None, {}))
    finally:
        torch.set_num_threads(before)
    for name in ("y", "gradient of memory.inner", "gradient of gate_bias"):
        assert torch.equal(found[0][name], found[1][name]), name


def test_without_gradients_the_same_comes_out() -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, backend="cpp", **DEFAULTS).double())
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    y, state = layer(x)
    with torch.no_grad():
        again, state_again = layer(x)
    torch.testing.assert_close(again, y, rtol=0, atol=1e-13)  # the layer's norm takes another form without gradients
    assert all(torch.equal(state[name], state_again[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    """A walk that has diverged must show it."""
    layer = stir(SelfModifyingTitans(DIM, HEADS, backend="cpp", **DEFAULTS)).to(dtype)
    with torch.no_grad():
        layer.gate_bias[0] = torch.nan  # type: ignore[index]
    y, state = layer(torch.randn(1, TOKENS, DIM, dtype=dtype))
    assert y.isnan().any()
    assert state["inner"][:, 0].isnan().any()
    assert not state["inner"][:, 1].isnan().any()  # of the other head


def test_second_derivatives_are_refused_and_found_in_operations() -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, backend="cpp", **DEFAULTS).double())
    x = torch.randn(1, 5, DIM, dtype=torch.float64, requires_grad=True)

    def twice() -> Tensor:
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    with pytest.raises(RuntimeError, match='backend="torch"'):
        twice()
    layer.backend = "torch"
    assert twice().abs().max() > 0


def test_without_a_compiler_auto_walks_in_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, **DEFAULTS).double())
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    expected = layer(x)[0]
    monkeypatch.setenv(native.SWITCH, "1")
    native._found.cache_clear()
    try:
        torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)
        layer.backend = "cpp"
        with pytest.raises(RuntimeError, match=f'backend="cpp".*{native.SWITCH} is set'):
            layer(x)
    finally:
        monkeypatch.undo()
        native._found.cache_clear()


def test_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._found.cache_clear()
    try:
        assert "no such header" in str(native.unavailable())
        assert not list((tmp_path / "cache" / "nestlearn").iterdir())
    finally:
        monkeypatch.undo()
        native._found.cache_clear()


@pytest.mark.parametrize("gate_hidden_ratio", [0.25, 1.0])
@pytest.mark.parametrize("part", ["y", "inner"])
def test_gradients_of_one_result_alone(part: str, gate_hidden_ratio: float) -> None:
    layer = stir(
        SelfModifyingTitans(
            DIM, HEADS, **{**DEFAULTS, "gate_hidden_ratio": gate_hidden_ratio, "momentum": True}
        ).double()
    )
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("torch", "cpp"):
        layer.backend = backend  # type: ignore[assignment]
        y, state = layer(x)
        result = y if part == "y" else state["inner"]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (result * weights * (result.detach() != 0)).sum().backward()
        found.append([x.grad, *(p.grad for p in layer.memory.parameters())])
        x.grad = None
        layer.zero_grad()
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("bias", [-15.0, 15.0])
def test_the_gradient_of_a_momentum_gate_that_is_nearly_shut_or_open(bias: float) -> None:
    layer = stir(SelfModifyingTitans(DIM, HEADS, **{**DEFAULTS, "momentum": True}))
    nn.init.constant_(layer.momentum_bias, bias)
    x = torch.randn(BATCH, TOKENS, DIM)
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "cpp")):
        model = copy.deepcopy(layer).to(dtype)
        model.backend = backend  # type: ignore[assignment]
        model(x.to(dtype))[0].square().sum().backward()
        found.append(model.momentum_bias.grad.double())  # type: ignore[union-attr]
    exact, plain, compiled = found
    assert (compiled - exact).norm() <= 10 * (plain - exact).norm() + 1e-5 * exact.norm()


def test_extremes_of_the_hidden_layer_in_single_precision() -> None:
    x = torch.tensor([[[-3e38, -1e30, -100.0, -88.5, 0.0, 88.5, 100.0, 3e38]]])
    gate = x.expand(1, 1, 8).clone()
    found = elementwise.gated_norm(torch.ones(1, 1, 8), torch.ones(8), gate, 0.0)
    torch.testing.assert_close(found, nn.functional.silu(gate), rtol=1e-6, atol=1e-36)
    h, slope = elementwise.gelu_backward(gate.clone(), torch.ones_like(gate))
    torch.testing.assert_close(slope[0, 0, [0, 7]], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(h[0, 0, 0], torch.tensor(-0.0))
