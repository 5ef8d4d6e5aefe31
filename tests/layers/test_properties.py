"""What holds for every mixer: exact splits, no future, no neighbours, documents, no side effects."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nestlearn.layers.attention import Attention, PlainAttention
from nestlearn.layers.delta_net import DeltaNet, GatedDeltaNet
from nestlearn.layers.linear_attention import LinearAttention
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.titans import Titans
from nestlearn.layers.tnt import TNT

State = dict[str, Tensor]
DIM, HEADS = 8, 2
EXACT = 1e-11

RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "self_modifying_titans": lambda: SelfModifyingTitans(DIM, HEADS, chunk_size=4),
    "self_modifying_titans_two_chunk_sizes": lambda: SelfModifyingTitans(
        DIM, HEADS, chunk_size=8, projection_chunk_size=2, momentum=True, read="previous", negative_eigenvalues=True
    ),
    "self_modifying_titans_fast_main_memory": lambda: SelfModifyingTitans(
        DIM, HEADS, chunk_size=2, projection_chunk_size=4, momentum=True, inner_rule="delta", adaptive_query=True
    ),
    "self_modifying_titans_literal": lambda: SelfModifyingTitans(
        DIM, HEADS, chunk_size=4, read="chunk", retain_to="zero", residual_memory=True, write_bound=None
    ),
    "self_modifying_titans_gradient_descent": lambda: SelfModifyingTitans(
        DIM, HEADS, chunk_size=3, inner_rule="gd", momentum=True, retention=False, conv_width=1
    ),
    "tnt": lambda: TNT(
        DIM, HEADS, global_chunk_size=6, global_stride=1, local_chunk_sizes=(2, 4), shard_length=8, project_queries=True
    ),
    "tnt_literal": lambda: TNT(
        DIM,
        HEADS,
        global_chunk_size=4,
        global_stride=1,
        local_chunk_sizes=(1,),
        shard_length=3,
        project_queries=True,
        retain_to="zero",
        momentum=True,
    ),
    "tnt_stride": lambda: TNT(DIM, HEADS, global_chunk_size=6, local_chunk_sizes=(2,), shard_length=8, global_stride=3),
    "titans": lambda: Titans(DIM, HEADS, chunk_size=4),
    "titans_delta": lambda: Titans(DIM, HEADS, chunk_size=3, inner_rule="delta", momentum=False, read="previous"),
    "gated_delta_net": lambda: GatedDeltaNet(DIM, HEADS, chunk_size=4),
    "delta_net": lambda: DeltaNet(DIM, HEADS, chunk_size=4),
    "linear_attention": lambda: LinearAttention(DIM, HEADS, chunk_size=4),
}
MIXERS = RECURRENT | {
    "attention": lambda: Attention(DIM, HEADS),
    "plain_attention": lambda: PlainAttention(DIM, HEADS),
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def build(mixer: str) -> nn.Module:
    """The mixer in float64 with random initial memories, convolutions and biases."""
    torch.manual_seed(0)
    layer = MIXERS[mixer]().double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "memor" in name or "convolution" in name or "bias" in name:
                parameter.normal_(std=0.7)
    return layer


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, DIM, dtype=torch.float64, generator=generator)


def begun(layer: nn.Module, count: list[int]) -> State:
    """The state after each row has read so many tokens."""
    x = tokens(len(count), max(count), seed=9)
    return {n: v.detach() for n, v in layer(x, lengths=torch.tensor(count))[1].items()}


def of_row(state: State, row: int) -> State:
    """One row's state; of an attention cache, what belongs to the row."""
    one = {name: value[row : row + 1] for name, value in state.items()}
    if "keys" in one:
        for name in ("keys", "values"):
            one[name] = one[name][:, :, : int(one["position"])]
    return one


def assert_near(found: Tensor, expected: Tensor, what: str = "outputs") -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if not found.is_floating_point():
        assert torch.equal(found, expected), what
    elif found.numel():
        largest = expected.abs().max().clamp_min(1e-3).item()
        error = (found - expected).abs().max().item() / largest
        assert error <= EXACT, f"{what}: relative error {error:.1e}"


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, name)


def gradients(layer: nn.Module, y: Tensor, state: State, x: Tensor) -> list[Tensor]:
    """Of outputs and final state, for cotangents that depend on the shape alone."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for value in (y, *state.values()):
        if value.is_floating_point():
            total = total + (value * torch.randn(value.shape, dtype=value.dtype, generator=generator)).sum()
    return list(torch.autograd.grad(total, [x, *layer.parameters()], materialize_grads=True, allow_unused=True))


def in_pieces(layer: nn.Module, x: Tensor, cuts: list[int], state: State | None = None) -> tuple[Tensor, State]:
    outputs = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        y, state = layer(x[:, start:stop], state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("cuts", [[5], [1, 4, 5, 11], [3, 3, 8, 13], [2, 4, 6, 7, 12], list(range(1, 13))], ids=str)
@every_mixer
def test_whole_equals_pieces(mixer: str, cuts: list[int]) -> None:
    """In outputs, final state and gradients; pieces may be empty."""
    layer = build(mixer)
    x = tokens(2, 13).requires_grad_()
    y, state = layer(x)
    z, after = in_pieces(layer, x, cuts)
    assert_near(z, y)
    assert_same_state(after, state)
    for found, expected in zip(gradients(layer, z, after, x), gradients(layer, y, state, x), strict=True):
        assert_near(found, expected, "gradient")


@every_mixer
def test_whole_equals_random_pieces_from_any_state(mixer: str) -> None:
    """Rows that stand at different places in their chunks, cut at random."""
    layer = build(mixer)
    start = begun(layer, [1, 6, 3])
    x = tokens(3, 17)
    with torch.no_grad():
        y, state = layer(x, start)
        for seed, rate in enumerate((0.3, 0.3, 0.3, 1.0)):  # the last: token by token
            cuts = (torch.rand(16, generator=torch.Generator().manual_seed(seed)) < rate).nonzero().squeeze(1) + 1
            z, after = in_pieces(layer, x, cuts.tolist(), start)
            assert_near(z, y)
            assert_same_state(after, state)
        assert_same_state(layer(x[:, :0], start)[1], start)


@every_mixer
def test_no_token_sees_the_future(mixer: str) -> None:
    layer = build(mixer)
    x = tokens(2, 11).requires_grad_()
    y, _ = layer(x)
    for t in range(11):
        changed = torch.cat([x[:, : t + 1], 3 * tokens(2, 10 - t, seed=t)], dim=1)
        # Every shape stays, so every kernel does: the past has to be the same to the last digits.
        assert_near(layer(changed)[0][:, : t + 1], y[:, : t + 1])
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert gradient[:, t + 1 :].abs().max() == 0 if t < 10 else True
        assert gradient[:, t].abs().max() > 0


@every_mixer
def test_no_row_sees_another_and_padding_is_nothing(mixer: str) -> None:
    """A right-padded batch gives each row what it would give alone: outputs, state and gradients."""
    layer = build(mixer)
    start = begun(layer, [3, 5, 2, 4])
    lengths = [9, 4, 0, 6]
    x = tokens(4, 9).requires_grad_()
    y, state = layer(x, start, lengths=torch.tensor(lengths))
    weights = tokens(4, 9, seed=7)
    total = sum((y[row, :length] * weights[row, :length]).sum() for row, length in enumerate(lengths))
    assert isinstance(total, Tensor)
    together = torch.autograd.grad(total, [x, *layer.parameters()], materialize_grads=True, allow_unused=True)
    apart = [torch.zeros_like(gradient) for gradient in together]
    for row, length in enumerate(lengths):
        if length == 0:
            assert_same_state(of_row(state, row), of_row(start, row))
            continue
        z, after = layer(x[row : row + 1, :length], of_row(start, row))
        assert_near(y[row : row + 1, :length], z)
        assert_same_state(of_row(state, row), after)
        alone = torch.autograd.grad(
            (z * weights[row, :length]).sum(), [x, *layer.parameters()], materialize_grads=True, allow_unused=True
        )
        apart = [a + b for a, b in zip(apart, alone, strict=True)]
    for found, expected in zip(together, apart, strict=True):
        assert_near(found, expected, "gradient")
    garbage = x.detach().clone()
    for row, length in enumerate(lengths):
        garbage[row, length:] = 1e3
        assert together[0][row, length:].abs().max() == 0 if length < 9 else True
    z, after = layer(garbage, start, lengths=torch.tensor(lengths))
    assert_same_state(after, state)
    for row, length in enumerate(lengths):
        assert_near(z[row, :length], y[row, :length])


@every_mixer
def test_a_row_can_change_beside_the_others(mixer: str) -> None:
    layer = build(mixer)
    start = begun(layer, [3, 5])
    x = tokens(2, 7).requires_grad_()
    y, state = layer(x, start)
    changed = torch.stack([x[0], 100 * x[1].flip(0)])
    other = {
        name: torch.cat([value[:1], value[1:] * (3 if value.is_floating_point() else 1)])
        for name, value in start.items()
    }
    z, after = layer(changed, other)
    assert_near(z[0], y[0])
    assert_same_state(of_row(after, 0), of_row(state, 0))
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    assert gradient[1].abs().max() == 0


@pytest.mark.parametrize("seed", range(4))
@every_mixer
def test_a_document_start_is_a_fresh_state(mixer: str, seed: int) -> None:
    """Packed rows equal their documents one by one, with a state before them, padding behind them, and gradients."""
    layer = build(mixer)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(3, 14, generator=generator) < 0.25
    starts[0, 0], starts[1, 0] = True, False
    starts[1, 5:7] = True
    starts[2] = False
    lengths = [14, 12, 9]
    if seed == 3:
        starts[0, 13] = True
    begin = begun(layer, [2, 5, 3])
    x = tokens(3, 14, seed=seed).requires_grad_()
    weights = tokens(3, 14, seed=7)
    y, state = layer(x, begin, lengths=torch.tensor(lengths), document_starts=starts)
    total = sum((y[row, :length] * weights[row, :length]).sum() for row, length in enumerate(lengths))
    assert isinstance(total, Tensor)
    together = torch.autograd.grad(total, [x, *layer.parameters()], materialize_grads=True, allow_unused=True)
    alone = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths):
        cuts = sorted({0, length, *starts[row, :length].nonzero().squeeze(1).tolist()})
        for first, last in pairwise(cuts):
            fresh = bool(starts[row, first])
            z, after = layer(x[row : row + 1, first:last], None if fresh else of_row(begin, row))
            assert_near(y[row : row + 1, first:last], z)
            alone = alone + (z * weights[row, first:last]).sum()
        assert_same_state(of_row(state, row), after)
    apart = torch.autograd.grad(alone, [x, *layer.parameters()], materialize_grads=True, allow_unused=True)
    for found, expected in zip(together, apart, strict=True):
        assert_near(found, expected, "gradient")
    # What begins in the padding does not count.
    beyond = starts.clone()
    beyond[1:, 12:] = True
    z, after = layer(x, begin, lengths=torch.tensor(lengths), document_starts=beyond)
    assert_same_state(after, state)
    assert_near(z[1, :12], y[1, :12])
    assert_near(z[2, :9], y[2, :9])


@every_mixer
def test_a_packed_batch_goes_on_from_its_state(mixer: str) -> None:
    layer = build(mixer)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, [3, 4]] = starts[1, 9] = True
    x = tokens(2, 12)
    with torch.no_grad():
        y, state = layer(x, document_starts=starts)
        for cut in (2, 4, 5, 10):
            first, middle = layer(x[:, :cut], document_starts=starts[:, :cut])
            second, after = layer(x[:, cut:], middle, document_starts=starts[:, cut:])
            assert_near(torch.cat([first, second], dim=1), y)
            for row in range(2):
                assert_same_state(of_row(after, row), of_row(state, row))


@every_mixer
def test_a_call_has_no_side_effects(mixer: str) -> None:
    layer = build(mixer)
    start = begun(layer, [3, 5])
    x = tokens(2, 9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[1, 4] = True
    lengths = torch.tensor([9, 7])
    given = {"x": x, "starts": starts, "lengths": lengths, **start}
    kept = {name: value.clone() for name, value in given.items()}
    buffers = {name: value.clone() for name, value in layer.state_dict().items()}
    for options in ({}, {"lengths": lengths}, {"document_starts": starts, "lengths": lengths}):
        versions = {name: value._version for name, value in given.items()}
        y, state = layer(x, start, **options)
        z, after = layer(x, start, **options)
        assert torch.equal(y, z)
        assert state.keys() == after.keys() == start.keys()
        assert all(torch.equal(state[name], after[name]) for name in state)
        for name, value in given.items():
            assert value._version == versions[name], f"{name} was written in place"
            assert torch.equal(value, kept[name]), name
    assert all(torch.equal(value, buffers[name]) for name, value in layer.state_dict().items())


@every_mixer
def test_no_state_is_the_initial_state(mixer: str) -> None:
    layer = build(mixer)
    x = tokens(2, 6)
    y, state = layer(x)
    z, after = layer(x, layer.init_state(2, dtype=torch.float64))  # type: ignore[operator]
    assert_near(z, y)
    assert_same_state(after, state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer", RECURRENT)
def test_activation_checkpointing_changes_no_gradient(mixer: str, packed: bool) -> None:
    layer = build(mixer)
    x = tokens(2, 11).requires_grad_()
    start = {n: v.requires_grad_(v.is_floating_point()) for n, v in begun(layer, [3, 3]).items()}
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[0, 6] = packed
    found = []
    for checkpointing in (False, True):
        layer.activation_checkpointing = checkpointing  # type: ignore[assignment]
        y, state = layer(x, start, document_starts=starts)
        found.append([y, *state.values(), *gradients(layer, y, state, x)])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)
