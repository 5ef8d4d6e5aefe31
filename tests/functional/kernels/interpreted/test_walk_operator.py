"""The walk as an operator of torch: registered soundly, opaque to the compiler, and plain about what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from walks import build, gradients, kernel_walk, leaves_of, options_of, single, worst

from nestlearn.functional.kernels import available, op

pytestmark = pytest.mark.triton_interpret


def test_the_interpreter_counts_as_available() -> None:
    assert available()


@pytest.mark.parametrize("momentum", [False, True])
def test_registrations_are_sound(momentum: bool) -> None:
    layer = build(momentum=momentum, retention=momentum, retain_to="initial" if momentum else "zero")
    leaves = single(leaves_of(layer, 1))
    options = options_of(layer)
    arguments = [
        *(leaves.get(name) for name in op.NAMES),
        options["chunk_size"],
        op.RULES[options["rule"]],
        op.READS[options["read"]],
        options["bound"],
        options["main_scale"],
        options["projection_scale"],
        options["largest_gate"],
        torch.float32,
    ]
    static = ("test_schema", "test_faketensor")
    traced = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    forward = (*static, *traced) if momentum else static
    torch.library.opcheck(op._walk, (*arguments, True), test_utils=forward, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out, *others = op._walk(*arguments, True)
        state = [None if x is None else torch.ones_like(x) for x in arguments[1:5]]
        histories = [None if x is None else y for x, y in zip(arguments[1:5], others[4:], strict=True)]
        backward = (torch.ones_like(out), *state, arguments[0], *histories, *arguments[5:])
        torch.library.opcheck(op._walk_backward, backward, test_utils=static, rtol=1e-4, atol=1e-5)


def test_a_compiled_walk_is_the_same() -> None:
    layer = build()
    leaves = single(leaves_of(layer, 1))
    expected = kernel_walk(layer, leaves)
    compiled = torch.compile(op.self_modifying_walk, backend="aot_eager", fullgraph=True)
    names = ("u", "inner", "outer", "base_inner", "base_outer", "gate_readout", "gate_bias", "retain_readout")
    walk = compiled(
        *(leaves[name] for name in names), leaves["retain_bias"], **options_of(layer), operand=torch.float32
    )
    found = {name: value for name, value in walk._asdict().items() if value is not None}
    assert max(worst(found, {name: x.detach().double() for name, x in expected.items()}).values()) == 0
    ours, theirs = gradients(found, leaves), gradients(expected, leaves)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def refused(message: str, **changed: Any) -> None:
    layer = build(momentum=True)
    leaves = single(leaves_of(layer, 1))
    tensors = {name: value for name, value in changed.items() if value is None or isinstance(value, Tensor)}
    others = {name: value for name, value in changed.items() if name not in tensors}
    operand = others.pop("operand", torch.float32)
    with pytest.raises(ValueError, match=message):
        kernel_walk(layer, leaves | tensors, operand, **others)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chunk_size": 8}, 'chunk_size: the kernels expect one of 16, 32, 64, got 8; take backend="torch"'),
        ({"rule": "sgd"}, "rule: the kernels expect one of 'dgd', 'gd', 'delta', got 'sgd'"),
        ({"read": "next"}, "read: the kernels expect one of"),
        ({"bound": 0.0}, "bound: expected a positive norm, or None"),
        ({"largest_gate": 1.0}, "negative_eigenvalues, which the kernels do not cover"),
        ({"operand": torch.float64}, r"operand: expected torch.float32, torch.bfloat16 or torch.float16"),
        ({"u": torch.zeros(5, 1, 1, 1, 16)}, "adaptive_query, which the kernels do not cover"),
        ({"u": torch.zeros(4, 1, 1, 1, 24)}, "u: the width K: the kernels expect 16, 32 or 64, got 24"),
        ({"inner": torch.zeros(1, 1, 6, 16, 16)}, "inner: expected five memories"),
        ({"inner": torch.zeros(1, 1, 5, 48, 16)}, "inner: the hidden width N: the kernels expect 16, 32 or 64, got 48"),
        ({"outer": torch.zeros(1, 1, 5, 16, 32)}, r"outer: expected \(1, 1, 5, 16, 16\), got \(1, 1, 5, 16, 32\)"),
        ({"gate_bias": torch.zeros(2)}, r"gate_bias: expected \(1,\), got \(2,\)"),
        ({"gate_bias": torch.zeros(1).double()}, "gate_bias: expected fp32, got torch.float64; convert it"),
        ({"base_outer": None}, "base_inner was given without base_outer: pass both, or neither"),
        ({"retain_readout": None}, "retain_bias was given without retain_readout"),
        ({"inner_momentum": None}, "momentum_readout was given without inner_momentum"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(changed: dict[str, Any], message: str) -> None:
    refused(message, **changed)
