"""TNT against its token-by-token specification, and its shards at once against its shards one after another."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.layers import compiled_walk
from nestlearn.layers.shards import plan_shards
from nestlearn.layers.tnt import TNT, LocalMemory, project_on_keys
from nestlearn.layers.tnt_specification import specify_tnt

State = dict[str, Tensor]
TOLERANCE = 1e-11
SIZES = {"global_chunk_size": 6, "global_stride": 1, "local_chunk_sizes": (2, 4), "shard_length": 8}


def build(seed: int = 0, **settings: Any) -> TNT:
    """A layer in float64 with nothing at its initial value."""
    torch.manual_seed(seed)
    defaults = {"project_queries": True, "write_scale": 0.6, "gate_hidden_ratio": 1.0}
    layer = TNT(8, 2, **{**SIZES, **defaults, **settings}).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("outer", "_bias", "convolution.weight")):
                parameter.normal_(std=0.7)
        layer.streams.projection.weight.normal_()
        layer.readout.norm.weight.uniform_(0.5, 1.5)
    return layer


def random_state(layer: TNT, position: list[int], shard_position: list[int]) -> State:
    """As in the middle of chunks and shards; fresh where a shard is about to begin."""
    state = layer.init_state(len(position), dtype=torch.float64)
    in_shard = torch.tensor(shard_position)
    for name, value in state.items():
        if value.is_floating_point():
            noise = 0.3 * torch.randn_like(value)
            if name.startswith(("local", "key")):
                noise[in_shard == 0] = 0
            state[name] = (value + noise).detach().requires_grad_()
    return state | {"position": torch.tensor(position), "shard_position": in_shard}


def everything(function: Any, layer: nn.Module, x: Tensor, state: State | None) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of their product with random cotangents, all by name."""
    y, after = function(x, state)
    results = {"y": y, **after}
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves |= {f"state.{name}": value for name, value in (state or {}).items() if value.requires_grad}
    generator = torch.Generator().manual_seed(17)
    total = torch.zeros((), dtype=torch.float64)
    for value in results.values():
        if value.is_floating_point():
            total = total + (value * torch.randn(value.shape, dtype=value.dtype, generator=generator)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        ours = found[name]
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), name
        assert reference.isfinite().all(), name
        if not reference.is_floating_point():
            assert torch.equal(ours, reference), name
        elif reference.numel():
            error = (ours - reference).abs().max().item() / max(reference.abs().max().item(), 1e-6)
            assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


def check(layer: TNT, tokens: int, state: State | None, batch: int = 2) -> None:
    x = torch.randn(batch, tokens, 8, dtype=torch.float64, requires_grad=True)
    expected = everything(lambda x, state: specify_tnt(layer, x, state), layer, x, state)
    compare(everything(layer, layer, x, state), expected)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": True},
    {"inner_rule": "delta", "read": "previous"},
    {"inner_rule": "gd", "retention": False},
    {"retain_to": "zero", "residual_memory": True, "read": "chunk", "write_bound": None},
    {"negative_eigenvalues": True, "adaptive_query": True, "momentum": True},
    {"memory_hidden": 3, "conv_width": 1, "write_bound": 0.2},
    {"local_chunk_sizes": (1,), "shard_length": 3, "global_chunk_size": 1},
    {"local_chunk_sizes": (5, 1, 5), "shard_length": 5, "global_chunk_size": 7},
    {"project_queries": False},
    {"global_stride": 3},
    {"global_stride": 2, "momentum": True, "residual_memory": True},
    {"empty_memory": True, "slowest_gate": 0.001},
    {"global_stride": 6, "inner_rule": "gd", "retain_to": "zero"},
    {"global_stride": 3, "adaptive_query": True, "backend": "torch"},
    {"static_projections": ("key", "value"), "momentum": True},
    {"global_stride": 2, "residual_memory": True, "retain_to": "zero", "backend": "torch"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_specification(settings: dict[str, Any]) -> None:
    """Over several shards and global chunks, ending inside both; from a fresh context and from inside a shard."""
    layer = build(**settings)
    check(layer, 19, None)
    shard = layer.shard_length
    check(layer, 11, random_state(layer, [layer.chunk_size - 1] * 2, [shard - 1] * 2))
    check(layer, 9, random_state(layer, [0, layer.chunk_size // 2, layer.chunk_size - 1], [shard - 1, 0, 1]), batch=3)


def test_equals_the_specification_over_long_chunks() -> None:
    """Longer than what is computed at once."""
    check(build(global_chunk_size=130, local_chunk_sizes=(132,), shard_length=132), 135, None, batch=1)


@pytest.mark.parametrize(
    "settings", [{}, {"adaptive_query": True, "residual_memory": True, "retain_to": "zero"}], ids=str
)
def test_tokens_that_share_a_snapshot_are_read_piece_by_piece(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_walk, "READ_TOGETHER", 4)
    layer = build(global_chunk_size=10, global_stride=5, **settings)
    check(layer, 23, random_state(layer, [3, 9], [1, 0]))
    check(build(global_chunk_size=10, global_stride=5, gate_hidden_ratio=0.25, **settings), 23, None)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_state_can_be_handed_over_in_mid_shard(momentum: bool) -> None:
    """From layer to specification and back, gradients through the state included."""
    layer = build(momentum=momentum)
    x = torch.randn(2, 21, 8, dtype=torch.float64, requires_grad=True)

    def written(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return specify_tnt(layer, x, state)

    def relay(*readers: Any) -> Any:
        def run(x: Tensor, state: State | None) -> tuple[Tensor, State]:
            outputs = []
            for reader, (start, stop) in zip(readers, pairwise([0, 3, 13, 21]), strict=True):
                y, state = reader(x[:, start:stop], state)
                outputs.append(y)
            assert state is not None
            return torch.cat(outputs, dim=1), state

        return run

    expected = everything(written, layer, x, None)
    for readers in ((layer, written, layer), (written, layer, written)):
        compare(everything(relay(*readers), layer, x, None), expected)


def test_shards_at_once_equal_shards_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(shard_length=4, global_chunk_size=8)
    x = torch.randn(2, 24, 8, dtype=torch.float64, requires_grad=True)

    def one_after_another(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        outputs = []
        for part in x.split(4, dim=1):
            y, state = layer(part, state)
            outputs.append(y)
        assert state is not None
        return torch.cat(outputs, dim=1), state

    rows = []
    walk = LocalMemory.walk

    def count(self: LocalMemory, inputs: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(tuple(inputs.shape[:2]))
        return walk(self, inputs, *rest, **options)

    monkeypatch.setattr(LocalMemory, "walk", count)
    found = everything(layer, layer, x, None)
    assert rows == [(12, 4)] * 2  # six shards of both rows, for each of two local memories
    compare(found, everything(one_after_another, layer, x, None))
    assert rows[2:] == [(2, 4)] * 12


def test_local_memories_know_nothing_beyond_their_shard_and_the_global_one_does() -> None:
    layer = build(local_chunk_sizes=(4,), shard_length=8, global_chunk_size=16, conv_width=1)
    x = torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    # Until the global memories take their first snapshot, a shard hears of nothing before it.
    (gradient,) = torch.autograd.grad(y[:, 8:16].sum(), x, retain_graph=True)
    assert gradient[:, :8].abs().max() == 0
    assert gradient[:, 8:16].abs().min(dim=1).values.max() > 0
    (gradient,) = torch.autograd.grad(y[:, 16:].sum(), x)
    assert gradient[:, :16].abs().max() > 1e-8


def test_a_query_is_projected_on_the_keys_up_to_its_own_token() -> None:
    keys = torch.nn.functional.normalize(torch.randn(3, 2, 150, 5, dtype=torch.float64), dim=-1)
    keys[1, :, 40:] = 0
    queries = torch.randn(3, 2, 150, 5, dtype=torch.float64)
    before = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    before = before @ before.mT
    found, after = project_on_keys(queries, keys, before)
    expected, total = [], before
    for t in range(150):
        k = keys[:, :, t]
        total = total + k[..., :, None] * k[..., None, :]
        expected.append((total @ queries[:, :, t, :, None])[..., 0])
    torch.testing.assert_close(found, torch.stack(expected, dim=2))
    torch.testing.assert_close(after, total)
    # It lies in their span: with two keys seen, what is orthogonal to both is gone.
    found, _ = project_on_keys(queries[..., :2, :], keys[..., :2, :], torch.zeros_like(before))
    basis = torch.linalg.qr(keys[..., :2, :].mT).Q
    torch.testing.assert_close(basis @ (basis.mT @ found.mT), found.mT)


def test_pieces_end_with_shards_and_documents() -> None:
    starts = torch.zeros(3, 10, dtype=torch.bool)
    starts[1, [0, 5]] = starts[2, 9] = True
    shards = plan_shards(
        torch.tensor([3, 2, 0]), 10, shard_length=4, lengths=torch.tensor([10, 10, 0]), document_starts=starts
    )
    assert shards.lengths is not None
    assert shards.lengths.tolist() == [1, 4, 4, 1, 4, 1, 4, 1, 0]
    assert shards.position.tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0]
    assert shards.continues.tolist() == [0, 3, 3, 3, 3, 3, 3, 3, 2]
    assert shards.final.tolist() == [3, 7, 8]
    assert shards.after.tolist() == [1, 1, 0]
    x = torch.arange(30.0).view(3, 10, 1)
    pieces = shards.spread(x)
    assert pieces[:4, :, 0].tolist()[1] == [1, 2, 3, 4]
    assert torch.equal(shards.collect(pieces, 10)[:2], x[:2])
    whole = plan_shards(torch.tensor([0, 0]), 8, shard_length=4)
    assert whole.lengths is None
    assert whole.source is None
    assert whole.final.tolist() == [4, 4]  # afresh
    ending = plan_shards(torch.tensor([2]), 2, shard_length=4)
    assert (ending.final.tolist(), ending.after.tolist()) == ([1], [0])


@pytest.mark.parametrize("stride", [1, 4])
def test_detach_every_counts_chunks(stride: int) -> None:
    """Gradients stop at the end of each chunk of a memory, however many steps compute it."""
    kept, cut = (
        build(
            global_chunk_size=80,
            global_stride=stride,
            local_chunk_sizes=(80,),
            shard_length=160,
            detach_every=n,
            conv_width=1,
        )
        for n in (None, 1)
    )
    x = torch.randn(1, 160, 8, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(layer(x)[0][:, start:].sum(), x)[0] for layer in (kept, cut) for start in (40, 80)]
    within, across, within_cut, across_cut = gradients
    assert within[:, :40].abs().max() > 1e-9
    assert across[:, :80].abs().max() > 1e-9
    assert within_cut[:, :40].abs().max() > 1e-9
    # Of the query projection, which no write of a memory passes through, the gradient goes on.
    assert across_cut[:, :80].norm() < across[:, :80].norm()
    assert torch.equal(kept(x)[0], cut(x)[0])


def test_smaller_local_chunks_need_no_other_parameters() -> None:
    first, second = build(), build(seed=1, local_chunk_sizes=(1, 2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    assert not torch.allclose(first(x)[0], second(x)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_chunk_size": 0}, "global_chunk_size: expected a whole number of at least 1, got 0"),
        ({"shard_length": 2.0}, "shard_length: expected a whole number of at least 1, got 2.0"),
        ({"global_stride": 4}, "a divisor of global_chunk_size, got 4 and 6; for example 2"),
        ({"local_chunk_sizes": ()}, r"one size for each local memory, for example \(8, 16\); got none"),
        ({"local_chunk_sizes": (0,)}, "local_chunk_sizes: expected whole numbers of at least 1, got 0"),
        ({"local_chunk_sizes": (4, 3)}, "divisors of shard_length, got 3 and 8; a shard_length of 9 would hold"),
        ({"read": "next"}, "read: expected one of"),
        ({"backend": "triton"}, "backend: the Triton kernels know self-modifying Titans alone, not TNT"),
        ({"initial_gate": 1.0}, "initial_gate: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TNT(8, 2, **{**SIZES, **settings})


@pytest.mark.parametrize("lengths", [[3], [4, 4], [8, 4], [4, 8, 0], [0, 0], [1]])
def test_rows_whose_pieces_are_equally_long_may_be_padded(lengths: list[int]) -> None:
    layer = build(global_chunk_size=4, global_stride=2, local_chunk_sizes=(2,), shard_length=4)
    x = torch.randn(len(lengths), 8, 8, dtype=torch.float64)
    y, after = layer(x, None, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone, state = layer(x[row : row + 1, :length])
        torch.testing.assert_close(y[row, :length], alone[0])
        for name, value in state.items():
            torch.testing.assert_close(after[name][row], value[0], msg=name)


def test_no_row_and_no_token_are_no_trouble() -> None:
    layer = build()
    for shape in ((0, 4, 8), (2, 0, 8)):
        y, state = layer(torch.zeros(shape, dtype=torch.float64))
        assert y.shape == shape
        assert state["position"].shape == shape[:1]


def test_a_state_of_another_dtype_is_refused() -> None:
    """By the walk, which TNT calls itself."""
    layer = build()
    state = layer.init_state(2, dtype=torch.float64)
    state["inner"] = state["inner"].float()
    with pytest.raises(ValueError, match=r"state: expected inner as torch\.float64"):
        layer(torch.zeros(2, 3, 8, dtype=torch.float64), state)


def test_memories_that_start_empty_are_so_in_every_resolution() -> None:
    layer = build(empty_memory=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    before = layer(x)[0]
    main = [layer.memory.outer, *(local.memory.outer for local in layer._locals())]
    before.square().sum().backward()
    for outer in main:
        assert outer[:, -1].abs().max() > 0  # whatever the parameter holds
        assert outer.grad is None or outer.grad[:, -1].abs().max() == 0
    with torch.no_grad():
        for outer in main:
            outer[:, -1] = 0
    torch.testing.assert_close(layer(x)[0], before, rtol=0, atol=1e-12)
