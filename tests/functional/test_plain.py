"""Compiled code stands aside for what it does not know, and says so with the plain operations' own words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.layers import SelfModifyingTitans
from nestlearn.layers.short_convolution import ShortConvolution
from nestlearn.memory.continuum import ContinuumMemory, MLPLevel


@pytest.mark.parametrize("width", [4, 16, 4096])
def test_a_norm_of_another_width_is_refused(width: int) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        RMSNorm(8, eps=1e-5)(torch.ones(2, width))


def test_a_strided_weight_is_read_as_it_is() -> None:
    norm = RMSNorm(8, eps=1e-5)
    norm.weight = nn.Parameter(torch.arange(16.0)[::2])
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-5))


class Shifted(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 100


def test_a_norm_of_another_class_is_called() -> None:
    level = MLPLevel(8, 16)
    plain = level(torch.ones(2, 8))
    level.norm = Shifted(8, eps=1e-5)
    assert not torch.allclose(level(torch.ones(2, 8)), plain)


class Doubled(ShortConvolution):
    def forward(self, *inputs: Tensor, **options: Tensor | None) -> tuple[Tensor, Tensor]:
        y, tail = super().forward(*inputs, **options)
        return 2 * y, tail


def test_a_convolution_of_another_class_or_with_a_hook_is_called() -> None:
    layer = SelfModifyingTitans(8, 2).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    before = layer(x)[0]
    calls: list[int] = []
    handle = layer.streams.convolution.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x)[0], before)
    assert calls == [1]
    handle.remove()
    doubled = Doubled(4 * 8, 4).double()
    doubled.load_state_dict(layer.streams.convolution.state_dict())
    layer.streams.convolution = doubled
    fresh, given = layer(x)[0], layer(x, layer.init_state(2, dtype=torch.float64))[0]
    assert not torch.allclose(fresh, before)
    torch.testing.assert_close(fresh, given)


def test_a_hook_on_all_modules_sees_the_parts_of_a_level() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        MLPLevel(8, 16)(torch.randn(2, 8))
    finally:
        handle.remove()
    assert seen == ["RMSNorm", "Linear", "Linear", "MLPLevel"]


def test_a_level_takes_a_single_vector() -> None:
    level = MLPLevel(8, 16).double()
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(level, (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by which PyTorch differentiates a norm forwards
def test_forward_mode_differentiation() -> None:
    norm = RMSNorm(8, eps=1e-5).double()
    x, tangent = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: nn.functional.rms_norm(x, (8,), norm.weight, 1e-5), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_one_token_of_a_level_under_vmap_and_with_fake_tensors() -> None:
    memory = ContinuumMemory(8, periods=(1, 4))
    x = torch.randn(3, 1, 8)
    torch.testing.assert_close(torch.func.vmap(memory.decode_step)(x), memory(x))
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert memory.decode_step(mode.from_tensor(x[0])).shape == (1, 8)


@torch.no_grad()
def test_decoding_by_turns_in_compiled_code_and_in_operations() -> None:
    layer = SelfModifyingTitans(8, 2, chunk_size=4).double()
    nn.init.normal_(layer.memory.outer)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    expected = layer(x)[0]
    state = layer.init_state(1, dtype=torch.float64)
    for i in range(12):
        layer.backend = "torch" if i == 0 or i > 6 else "auto"
        y, state = layer.decode_step(x[:, i : i + 1], state)
        torch.testing.assert_close(y[:, 0], expected[:, i])


def test_a_graph_notices_that_decoding_overwrote_what_it_kept() -> None:
    layer = SelfModifyingTitans(8, 2)
    state = layer.init_state(1)
    weight = torch.ones((), requires_grad=True)
    kept = (weight * state["inner"]).sum()
    layer.decode_step(torch.randn(1, 1, 8), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
