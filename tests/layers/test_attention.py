"""Both attention mixers against plain softmax attention, in every way of cutting, padding and packing the stream."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestlearn.layers.attention import Attention, PlainAttention
from nestlearn.layers.readout import GatedReadout
from nestlearn.layers.rotary import apply_rotary, rotary_table
from nestlearn.layers.short_convolution import causal_convolution

DIM, HEADS, HEAD_DIM = 12, 3, 4
MIXERS = ["attention", "plain_attention"]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def mixer(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = {"attention": Attention, "plain_attention": PlainAttention}[name](DIM, HEADS).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def inputs(seed: int, batch: int = 2, tokens: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, DIM, dtype=torch.float64, generator=generator)
    return x, torch.rand(batch, tokens, generator=generator) < 0.15


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE)


def turned(x: Tensor) -> Tensor:
    """Rotary positions of (T, Dh), one pair at a time, as complex numbers."""
    tokens, width = x.shape
    columns: list[Tensor] = [x[:, 0]] * width
    for pair in range(width // 2):
        angle = torch.arange(tokens, dtype=torch.float64) * 10000.0 ** (-2 * pair / width)
        z = torch.complex(x[:, pair], x[:, pair + width // 2]) * torch.polar(torch.ones_like(angle), angle)
        columns[pair], columns[pair + width // 2] = z.real, z.imag
    return torch.stack(columns, dim=1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor) -> Tensor:
    logits = scale * turned(q) @ turned(k).T
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def head_of(t: Tensor, part: int, head: int) -> Tensor:
    begin = part * DIM + head * HEAD_DIM
    return t[:, begin : begin + HEAD_DIM]


def test_plain_attention_is_the_textbook_one() -> None:
    layer = mixer("plain_attention")
    x, _ = inputs(1, batch=1)
    qkv = x[0] @ layer.projection.weight.T
    o = [softmax_attention(*(head_of(qkv, part, h) for part in range(3)), HEAD_DIM**-0.5) for h in range(HEADS)]
    torch.testing.assert_close(layer(x)[0][0], torch.cat(o, 1) @ layer.output.weight.T, **TOLERANCE)


def test_attention_is_the_sum_of_its_parts() -> None:
    layer = mixer("attention")
    x, _ = inputs(1, batch=1)
    projected = x @ layer.streams.projection.weight.T
    mixed = nn.functional.silu(causal_convolution(projected, layer.streams.convolution.weight))[0]
    outputs = []
    for h in range(HEADS):
        q, k, v = (head_of(mixed, part, h) for part in range(3))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        o = softmax_attention(q, k, v, layer.query_scale[h])
        outputs.append(o / (o.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.readout.norm.weight)
    gated = torch.cat(outputs, 1) * nn.functional.silu(x[0] @ layer.readout.gate.weight.T)
    torch.testing.assert_close(layer(x)[0][0], gated @ layer.readout.output.weight.T, **TOLERANCE)


def test_query_scale_starts_at_ten() -> None:
    assert torch.equal(Attention(DIM, HEADS).query_scale, torch.full((HEADS,), 10.0))


@pytest.mark.parametrize("name", MIXERS)
@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, 16), max_size=16), seed=st.integers(0, 100), documents=st.booleans())
def test_whole_equals_any_split(name: str, cuts: set[int], seed: int, documents: bool) -> None:
    layer = mixer(name)
    x, starts = inputs(seed)
    y, state = layer(x, document_starts=starts if documents else None)
    again, _ = layer(x, document_starts=starts if documents else None)
    assert torch.equal(y, again)
    pieces, piece_state = [], layer.init_state(2)
    for begin, end in pairwise([0, *sorted(cuts), 17]):
        held = {key: value.clone() for key, value in piece_state.items()}
        piece = starts[:, begin:end] if documents else None
        out, new_state = layer(x[:, begin:end], piece_state, document_starts=piece)
        assert all(torch.equal(piece_state[key], held[key]) for key in held)
        pieces.append(out)
        piece_state = new_state
    torch.testing.assert_close(torch.cat(pieces, 1), y, **TOLERANCE)
    assert_same_state(piece_state, state)


@pytest.mark.parametrize("name", MIXERS)
def test_token_by_token_and_decode_step_equal_the_whole(name: str) -> None:
    layer = mixer(name)
    x, _ = inputs(3, tokens=70)
    y, state = layer(x)
    one_by_one, decoding = layer.init_state(2), layer.init_state(2)
    with torch.no_grad():
        for t in range(70):
            out, one_by_one = layer(x[:, t : t + 1], one_by_one)
            torch.testing.assert_close(out, y[:, t : t + 1], **TOLERANCE)
            out, decoding = layer.decode_step(x[:, t : t + 1], decoding)
            torch.testing.assert_close(out, y[:, t : t + 1], **TOLERANCE)
    assert_same_state(one_by_one, state)
    assert decoding["keys"].shape[2] > 70
    y_more, more = layer(x, state)
    y_decoded, decoded = layer(x, decoding)
    torch.testing.assert_close(y_decoded, y_more, **TOLERANCE)
    assert_same_state(decoded, more)


@pytest.mark.parametrize("name", MIXERS)
def test_decode_step_after_a_padded_prompt(name: str) -> None:
    layer = mixer(name)
    x, _ = inputs(4)
    lengths = torch.tensor([5, 12])
    with torch.no_grad():
        _, prompt = layer(x, lengths=lengths)
        held = {key: value.clone() for key, value in prompt.items()}
        state = dict(prompt)
        for step in range(3):
            out, state = layer.decode_step(x[:, step : step + 1], state)
            for row, length in enumerate(lengths.tolist()):
                alone, _ = layer(torch.cat([x[row : row + 1, :length], x[row : row + 1, : step + 1]], 1))
                torch.testing.assert_close(out[row, 0], alone[0, -1], **TOLERANCE)
    assert all(torch.equal(prompt[key], held[key]) for key in held)  # the cache was copied before it was written


@pytest.mark.parametrize("name", MIXERS)
@settings(deadline=None, max_examples=25)
@given(
    first=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    seed=st.integers(0, 100),
    documents=st.booleans(),
)
def test_each_row_of_a_padded_batch_is_what_it_is_alone(
    name: str, first: list[int], second: list[int], seed: int, documents: bool
) -> None:
    layer = mixer(name)
    x, starts = inputs(seed, batch=3, tokens=13)
    document_starts = (starts[:, :6], starts[:, 6:]) if documents else (None, None)
    y1, state = layer(x[:, :6], layer.init_state(3), lengths=torch.tensor(first), document_starts=document_starts[0])
    y2, state = layer(x[:, 6:], state, lengths=torch.tensor(second), document_starts=document_starts[1])
    assert y1.isfinite().all()
    assert y2.isfinite().all()
    for row, (n1, n2) in enumerate(zip(first, second, strict=True)):
        alone = torch.cat([x[row : row + 1, :n1], x[row : row + 1, 6 : 6 + n2]], dim=1)
        joined = torch.cat([starts[row : row + 1, :n1], starts[row : row + 1, 6 : 6 + n2]], dim=1)
        if n1 + n2 == 0:
            assert state["position"][row] == 0
            continue
        y, expected = layer(alone, document_starts=joined if documents else None)
        torch.testing.assert_close(torch.cat([y1[row, :n1], y2[row, :n2]]), y[0], **TOLERANCE)
        kept = int(expected["position"])
        assert state["position"][row] == kept
        for key in ("keys", "values"):
            torch.testing.assert_close(state[key][row, :, :kept], expected[key][0], **TOLERANCE)
            assert (state[key][row, :, kept:] == 0).all()
        if "tail" in state:
            torch.testing.assert_close(state["tail"][row], expected["tail"][0], **TOLERANCE)


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_without_tokens_keeps_its_state_also_if_its_padding_starts_a_document(name: str) -> None:
    layer = mixer(name)
    x, _ = inputs(8)
    _, state = layer(x[:, :5])
    starts = torch.ones(2, 4, dtype=torch.bool)
    _, new = layer(x[:, 5:9], state, lengths=torch.tensor([0, 3]), document_starts=starts)
    assert new["position"].tolist() == [5, 1]
    for key in state.keys() - {"position"}:
        torch.testing.assert_close(new[key][0], state[key][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("cut", [0, 4])
def test_no_future_and_no_other_row_reaches_an_output(name: str, cut: int) -> None:
    """By gradients, which see every path: after a state, with documents, and without."""
    layer = mixer(name)
    x, starts = inputs(5, batch=2, tokens=9)
    for document_starts in (None, starts):
        leaf = x.clone().requires_grad_()
        state = None
        if cut:
            state = layer(leaf[:, :cut], document_starts=None if document_starts is None else starts[:, :cut])[1]
        y, _ = layer(leaf[:, cut:], state, document_starts=None if document_starts is None else starts[:, cut:])
        for t in range(9 - cut):
            (reach,) = torch.autograd.grad(y[0, t].sum(), leaf, retain_graph=True)
            assert (reach[1] == 0).all()
            assert (reach[0, cut + t + 1 :] == 0).all()
            assert (reach[0, cut + t] != 0).any()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("many", [False, True], ids=["call per document", "mask"])
def test_a_document_start_is_a_fresh_start(name: str, many: bool) -> None:
    layer = mixer(name)
    x, _ = inputs(6, tokens=200)
    starts = torch.zeros(2, 200, dtype=torch.bool)
    starts[0, 150] = True
    starts[1, [20, 90, 130]] = True
    if many:
        starts[:, :20] = True
    polluted = x.clone()
    polluted[0, :150] *= 100
    y, state = layer(polluted, document_starts=starts)
    for row, begin in ((0, 150), (1, 130)):
        fresh, fresh_state = layer(x[row : row + 1, begin:])
        torch.testing.assert_close(y[row, begin:], fresh[0], **TOLERANCE)
        kept = int(fresh_state["position"])
        torch.testing.assert_close(state["keys"][row, :, :kept], fresh_state["keys"][0], **TOLERANCE)
    _, after = layer(x, state, document_starts=starts)
    assert after["keys"].shape[2] == 70  # the earlier documents are gone, not only hidden


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_through_the_state(name: str) -> None:
    layer = mixer(name)
    x, starts = inputs(7)
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(whole, document_starts=starts)[0].pow(2).sum().backward()
    first, state = layer(parts[:, :6], document_starts=starts[:, :6])
    second, _ = layer(parts[:, 6:], state, document_starts=starts[:, 6:])
    torch.cat([first, second], 1).pow(2).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad, **TOLERANCE)


def test_rotary_depends_on_distance_only_also_far_out() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def product(i: int, j: int, dtype: torch.dtype) -> float:
        turn = [rotary_table(torch.tensor([[at]]), 8, dtype=dtype) for at in (i, j)]
        return float((apply_rotary(q.to(dtype), *turn[0]) * apply_rotary(k.to(dtype), *turn[1])).sum())

    assert product(7, 3, torch.float64) != pytest.approx(product(3, 7, torch.float64), abs=1e-3)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        near, far = product(7, 3, dtype), product(1_000_007, 1_000_003, dtype)
        assert far == pytest.approx(near, abs=tolerance)


def test_rotary_keeps_the_dtype_and_has_exact_gradients() -> None:
    table = rotary_table(torch.arange(5).unsqueeze(0), 6, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_rotary(t, *table), (x,))
    assert torch.autograd.gradgradcheck(lambda t: apply_rotary(t, *table).pow(2), (x,))
    half = apply_rotary(torch.randn(1, 5, 1, 6).bfloat16(), *rotary_table(torch.arange(5)[None], 6))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Attention, PlainAttention])
def test_half_precision_by_autocast_and_by_weights(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = kind(DIM, HEADS)
    x = torch.randn(2, 6, DIM)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = layer(x[:, :4], layer.init_state(2))
        y, state = layer(x[:, 4:], state)
    torch.testing.assert_close(y.float(), expected[:, 4:], rtol=0.05, atol=0.05)
    assert state["keys"].dtype == torch.bfloat16
    layer.bfloat16()
    _, state = layer(x[:, :4].bfloat16(), layer.init_state(2))
    y, _ = layer(x[:, 4:].bfloat16(), state)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected[:, 4:], rtol=0.05, atol=0.05)


def test_readout_takes_any_head_width() -> None:
    assert GatedReadout(DIM, 2, 5)(torch.randn(3, 2, 7, 5), torch.randn(3, 7, DIM)).shape == (3, 7, DIM)


@pytest.mark.parametrize(("dim", "heads"), [(10, 3), (6, 2), (8, 0)])
@pytest.mark.parametrize("kind", [Attention, PlainAttention])
def test_heads_that_do_not_fit_are_refused(kind: type[nn.Module], dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"got dim={dim}, heads={heads}. Choose dim"):
        kind(dim, heads)
