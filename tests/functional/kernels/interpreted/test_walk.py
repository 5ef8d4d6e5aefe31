"""The kernels, interpreted: equal to the plain layer, in every way of cutting the sequence, and causal."""

from typing import Any

import pytest
import torch
from walks import build, compare, gradients, kernel_walk, leaves_of, single, worst

pytestmark = pytest.mark.triton_interpret

# Every rule with every read; the other options so that each value of one meets each of another somewhere.
# C = 16 unless named: lengths below, at and above a chunk, and of several chunks.
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"inner_rule": "dgd", "read": "token", "momentum": True}),
    (2, {"inner_rule": "delta", "read": "token", "momentum": False, "retain_to": "zero"}),
    (15, {"inner_rule": "gd", "read": "previous", "momentum": True, "write_bound": None}),
    (16, {"inner_rule": "dgd", "read": "previous", "momentum": False, "memory_hidden": 32}),
    (17, {"inner_rule": "delta", "read": "previous", "momentum": True, "retain_to": "zero", "memory_hidden": 32}),
    (37, {"inner_rule": "dgd", "read": "token", "momentum": False}),
    (17, {"inner_rule": "delta", "read": "chunk", "momentum": True, "write_bound": None}),
    (17, {"inner_rule": "gd", "read": "token", "momentum": False, "retention": False}),
    (16, {"inner_rule": "dgd", "read": "chunk", "momentum": True, "retention": False, "retain_to": "zero"}),
    (16, {"inner_rule": "gd", "read": "chunk", "momentum": False, "write_bound": None, "memory_hidden": 32}),
    (37, {"inner_rule": "dgd", "read": "previous", "momentum": True, "chunk_size": 32, "write_bound": None}),
    (70, {"inner_rule": "delta", "read": "token", "momentum": False, "chunk_size": 64, "retention": False}),
    (20, {"inner_rule": "dgd", "read": "token", "momentum": False, "width": 32, "memory_hidden": 16}),
]


# fp32 against float64: sums of at most 64 products, a few tens of steps deep, and gradients that cancel.
@pytest.mark.parametrize(("tokens", "settings"), CASES)
def test_equals_the_layer(tokens: int, settings: dict[str, Any]) -> None:
    compare(build(**settings), tokens, tolerance=1e-4)


def test_equals_the_layer_with_several_rows_and_heads() -> None:
    compare(build(heads=2), 2, batch=2, tolerance=1e-4)


@pytest.mark.parametrize("settings", [{}, {"inner_rule": "delta", "momentum": True, "read": "previous"}])
def test_half_precision_operands_are_near(settings: dict[str, Any]) -> None:
    """fp16 rounds each operand by up to 2^-11 = 5e-4, and about ten products lie between an input and an output, twice
    as many between a cotangent and a gradient. A bias's gradient is one number, a sum over all tokens that cancels."""
    layer = build(**settings)
    compare(layer, 17, operand=torch.float16, tolerance=5e-3, gradient_tolerance=3e-2)


def test_a_split_walk_equals_the_whole() -> None:
    layer = build(momentum=True)
    whole = single(leaves_of(layer, 18))
    split = {name: value.detach().clone().requires_grad_() for name, value in whole.items()}
    expected = kernel_walk(layer, whole)
    first = kernel_walk(layer, split | {"u": split["u"][..., :16, :]})
    second = kernel_walk(
        layer, split | {name: value for name, value in first.items() if name != "out"} | {"u": split["u"][..., 16:, :]}
    )
    second["out"] = torch.cat([first["out"], second["out"]], dim=2)
    assert all(torch.equal(second[name], value) for name, value in expected.items())
    differences = worst(gradients(second, split), gradients(expected, whole))
    assert max(differences.values()) <= 1e-6


def test_rows_do_not_touch_each_other() -> None:
    layer = build()
    leaves = single(leaves_of(layer, 3, batch=2))
    together = kernel_walk(layer, leaves)
    per_row = ("inner", "outer")
    for row in range(2):
        alone = {name: value[row : row + 1] if name in per_row else value for name, value in leaves.items()}
        alone["u"] = leaves["u"][:, row : row + 1]
        found = kernel_walk(layer, alone)
        assert all(torch.equal(found[name][0], value[row]) for name, value in together.items())


@pytest.mark.parametrize("settings", [{"momentum": True}, {"inner_rule": "delta", "read": "previous"}])
def test_no_output_sees_a_later_token(settings: dict[str, Any]) -> None:
    layer = build(**settings)
    with torch.no_grad():
        leaves = single(leaves_of(layer, 18))
        expected = kernel_walk(layer, leaves)["out"]
        changed = leaves["u"].clone()
        changed[..., 9, :] += 1.0
        found = kernel_walk(layer, leaves | {"u": changed})["out"]
    assert torch.equal(found[:, :, :9], expected[:, :, :9])
    assert all(not torch.equal(found[:, :, token], expected[:, :, token]) for token in (10, 17))


def test_without_gradients_nothing_changes() -> None:
    """Then the states of all chunks share one place."""
    layer = build(momentum=True, read="chunk")
    leaves = single(leaves_of(layer, 18))
    before = {name: value.detach().clone() for name, value in leaves.items()}
    expected = kernel_walk(layer, leaves)
    with torch.no_grad():
        found = kernel_walk(layer, leaves)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(leaves[name], value) for name, value in before.items())


def test_no_tokens_leave_the_state() -> None:
    layer = build(momentum=True)
    leaves = single(leaves_of(layer, 0))
    found = kernel_walk(layer, leaves)
    assert found["out"].shape == (1, 1, 0, 16)
    assert all(torch.equal(found[name], leaves[name]) for name in found if name != "out")
    (gradient,) = torch.autograd.grad(found["inner"].sum(), leaves["inner"])
    assert torch.equal(gradient, torch.ones_like(gradient))
