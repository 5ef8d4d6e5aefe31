"""Layers made of parts that are computed again for the backward pass: the ways in which they are used."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.functional.kernels.native import elementwise, unavailable
from nestlearn.layers import SelfModifyingTitans
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.streams import Streams
from nestlearn.memory.continuum import ContinuumMemory, MLPLevel


def gradients(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    module.zero_grad()
    y = run()
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def without_compiler(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "available", lambda: False)
        return run()


def test_streams_by_heads_are_the_streams() -> None:
    streams = Streams(24, 2, streams=4).double()
    x = torch.randn(3, 37, 24, dtype=torch.float64)
    starts = torch.rand(3, 37) < 0.2
    lengths = torch.tensor([37, 0, 5])
    tail = torch.randn(3, 3, 96, dtype=torch.float64)
    for before, marks in ((None, {}), (tail, {}), (None, {"lengths": lengths}), (None, {"document_starts": starts})):
        found = streams.by_heads(x, before, **marks)
        expected = streams(x, before, **marks)
        torch.testing.assert_close(streams.split(found[0]), streams.split(expected[0]))
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.skipif(unavailable() is not None or not elementwise.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_streams_that_are_not_kept_give_the_same_gradients(use_reentrant: bool | None) -> None:
    layer = SelfModifyingTitans(32, 2, chunk_size=8).double()
    x = torch.randn(2, 29, 32, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        if use_reentrant is None:
            return layer(x)[0]
        out: Tensor = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
        return out

    expected = without_compiler(lambda: gradients(layer, lambda: layer(x)[0]))
    torch.testing.assert_close(gradients(layer, run), expected)


@pytest.mark.skipif(unavailable() is not None or not elementwise.available(), reason="no C++ compiler here")
def test_a_weight_that_was_changed_before_the_backward_pass_is_an_error() -> None:
    layer = SelfModifyingTitans(32, 2, chunk_size=8)
    y, _ = layer(torch.randn(2, 20, 32))
    with torch.no_grad():
        layer.streams.convolution.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_levels_under_transforms(variant: str) -> None:
    memory = ContinuumMemory(12, periods=(1, 4), variant=variant).double()  # type: ignore[arg-type]
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in memory.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(memory, values, (row,))
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = gradients(memory, lambda row=row: memory(row))[1:]  # type: ignore[misc]
        torch.testing.assert_close([found[name][i] for name in parameters], expected)


def test_levels_twice_differentiated() -> None:
    memory = ContinuumMemory(6, periods=(1, 4)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(memory, x)


def test_levels_under_compile() -> None:
    memory = ContinuumMemory(12, periods=(1, 4)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    compiled = torch.compile(memory, backend="eager", fullgraph=True)
    torch.testing.assert_close(gradients(memory, lambda: compiled(x)), gradients(memory, lambda: memory(x)))


def test_levels_under_autocast() -> None:
    memory = ContinuumMemory(12, periods=(1, 4))
    x = torch.randn(2, 7, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert memory.levels[0](x).dtype == torch.bfloat16
        gradients(memory, lambda: memory(x))


def test_a_part_that_was_replaced_or_is_watched_is_called() -> None:
    level, readout = MLPLevel(8, 16), GatedReadout(8, 2, 4)
    x, o = torch.randn(2, 3, 8), torch.randn(2, 2, 3, 4)
    seen: list[str] = []
    for module, name in ((level, "up"), (level, "norm"), (readout, "output")):
        getattr(module, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    level(x), readout(o, x)
    assert sorted(seen) == ["norm", "output", "up"]

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    level, other = MLPLevel(8, 16), MLPLevel(8, 16)
    other.down = Twice(16, 8, bias=False)
    other.load_state_dict(copy.deepcopy(level.state_dict()))
    torch.testing.assert_close(other(x), 2 * level(x))
    torch.testing.assert_close(F.linear(F.gelu(level.up(level.norm(x))), level.down.weight), level(x))
