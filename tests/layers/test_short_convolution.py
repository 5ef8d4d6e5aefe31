"""The short convolution against its definition, in every way of cutting the stream."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.layers.short_convolution import ShortConvolution, causal_convolution


def by_definition(x: Tensor, weight: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """One token, one tap at a time; walking back ends at a document start."""
    batch, tokens, channels = x.shape
    rows = []
    for b in range(batch):
        outputs = []
        for t in range(tokens):
            y = x.new_zeros(channels)
            for delay in range(weight.shape[0]):
                if t - delay < 0:
                    break
                y = y + weight[-1 - delay] * x[b, t - delay]
                if document_starts is not None and document_starts[b, t - delay]:
                    break
            outputs.append(y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def layer(channels: int = 6, width: int = 4) -> ShortConvolution:
    torch.manual_seed(0)
    conv = ShortConvolution(channels, width).double()
    with torch.no_grad():
        conv.weight.normal_()
    return conv


def starts_of(batch: int, tokens: int, seed: int, rate: float = 0.2) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < rate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("rate", [None, 0.0, 0.02, 0.1, 0.6])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_equals_the_definition_with_gradients(dtype: torch.dtype, width: int, rate: float | None, tokens: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(3, tokens, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, 5, dtype=dtype, requires_grad=True)
    starts = None if rate is None else starts_of(3, tokens, 1, rate)
    gradient = torch.randn(3, tokens, 5, dtype=dtype)
    expected = by_definition(x, weight, starts)
    found = causal_convolution(x, weight, starts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weight), gradient), torch.autograd.grad(expected, (x, weight), gradient)
    )


@pytest.mark.parametrize("starts", [None, starts_of(2, 30, 3, 0.05)], ids=["whole", "documents"])
def test_the_fast_form_has_second_derivatives(starts: Tensor | None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 30, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def second(form) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        first = torch.autograd.grad(form(x, weight, starts).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weight))

    torch.testing.assert_close(second(causal_convolution), second(by_definition), rtol=1e-4, atol=1e-2)


def test_it_takes_any_memory_layout() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 30, 2).transpose(0, 2), torch.randn(4, 10)[:, ::2]
    torch.testing.assert_close(causal_convolution(x, weight), by_definition(x, weight))


@pytest.mark.parametrize("width", [1, 4])
def test_untrained_all_taps_are_alike(width: int) -> None:
    weight = ShortConvolution(1000, width).weight.detach()
    bound = width**-0.5
    assert weight.abs().max() <= bound
    # Uniform in +-bound: standard deviation bound / sqrt(3) in every tap.
    torch.testing.assert_close(weight.std(1), torch.full((width,), bound / 3**0.5), rtol=0.1, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.sets(st.integers(1, 22), max_size=22),
    seed=st.integers(0, 100),
    documents=st.booleans(),
    width=st.integers(1, 5),
)
def test_whole_equals_any_split(cuts: set[int], seed: int, documents: bool, width: int) -> None:
    conv = layer(width=width)
    x = torch.randn(2, 23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    starts = starts_of(2, 23, seed) if documents else None
    y, tail = conv(x, document_starts=starts)
    pieces, piece_tail = [], conv.init_state(2)
    for begin, end in pairwise([0, *sorted(cuts), 23]):
        piece = None if starts is None else starts[:, begin:end]
        out, piece_tail = conv(x[:, begin:end], piece_tail, document_starts=piece)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(piece_tail, tail, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    seed=st.integers(0, 100),
    documents=st.booleans(),
    past=st.booleans(),
)
def test_each_row_of_a_padded_batch_is_what_it_is_alone(
    lengths: list[int], seed: int, documents: bool, past: bool
) -> None:
    conv = layer()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 9, 6, dtype=torch.float64, generator=generator)
    tail = torch.randn(3, 3, 6, dtype=torch.float64, generator=generator) if past else conv.init_state(3)
    starts = starts_of(3, 9, seed, 0.3) if documents else None
    before = tail.clone()
    y, new = conv(x, tail, lengths=torch.tensor(lengths), document_starts=starts)
    assert torch.equal(tail, before)
    for row, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(new[row], tail[row])
            continue
        piece = None if starts is None else starts[row : row + 1, :length]
        y_alone, alone = conv(x[row : row + 1, :length], tail[row : row + 1], document_starts=piece)
        torch.testing.assert_close(y[row, :length], y_alone[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(new[row], alone[0])


def test_a_row_without_tokens_keeps_its_tail_also_if_its_padding_starts_a_document() -> None:
    tail = torch.randn(2, 3, 6, dtype=torch.float64)
    starts = torch.ones(2, 5, dtype=torch.bool)
    _, new = layer()(torch.randn(2, 5, 6).double(), tail, lengths=torch.tensor([0, 1]), document_starts=starts)
    assert torch.equal(new[0], tail[0])
    assert (new[1, :2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_crosses_a_document_start(dtype: torch.dtype) -> None:
    """Whatever came before, infinities included."""
    conv = layer().to(dtype)
    x = torch.randn(2, 40, 6, dtype=dtype)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 38] = True
    polluted = x.clone()
    polluted[:, :38] = float("inf")
    y, tail = conv(polluted, torch.full((2, 3, 6), float("nan"), dtype=dtype), document_starts=starts)
    fresh, fresh_tail = conv(x[:, 38:], conv.init_state(2))
    torch.testing.assert_close(y[:, 38:], fresh)
    assert torch.equal(tail, fresh_tail)


def test_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width >= 1, got 0"):
        ShortConvolution(4, 0)
