"""The fast layer against its token-by-token specification: outputs, states, and the gradients of everything."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.layers.chunked_memory import LARGEST_GATE
from nestlearn.layers.self_modifying_specification import specify, specify_reads
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.titans import Titans

State = dict[str, Tensor]

RULES = ("dgd", "gd", "delta")
READS = ("token", "previous", "chunk")
CHUNKS = ((4, 4), (8, 2), (2, 8), (1, 1))
# Where the rows begin, and how many tokens they read: over a boundary of both chunk sizes, ending in mid-chunk.
SPANS = {(4, 4): (2, 5), (8, 2): (5, 5), (2, 8): (5, 5), (1, 1): (0, 2)}
TOLERANCE = 1e-11


def build(seed: int = 0, dim: int = 8, **settings: Any) -> SelfModifyingTitans:
    """A layer in float64 with nothing at its initial value: W1, convolution, norm and biases are random.

    All memories are as wide, so that a state may be random everywhere; narrower ones have a test of their own.
    """
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(dim, 2, **{"write_scale": 0.6, "gate_hidden_ratio": 1.0, **settings}).double()
    with torch.no_grad():
        for name, parameter in layer.memory.named_parameters():
            if name.endswith("outer"):
                parameter.normal_(std=0.7)
        layer.streams.convolution.weight.normal_(std=0.7)
        layer.streams.projection.weight.normal_()
        layer.readout.norm.weight.uniform_(0.5, 1.5)
        for name, parameter in layer.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return layer


def random_state(layer: SelfModifyingTitans, position: list[int]) -> State:
    """A state in which running memories, snapshots and momentum all differ, as in the middle of a chunk."""
    state = layer.init_state(len(position), dtype=torch.float64)
    state = {
        name: value if name == "position" else (value + 0.3 * torch.randn_like(value)).detach().requires_grad_()
        for name, value in state.items()
    }
    return state | {"position": torch.tensor(position)}


def without_padding(layer: SelfModifyingTitans, state: State) -> State:
    """Zero where narrow memories have no hidden units."""
    kept = {}
    for name, value in state.items():
        if value.ndim < 5:
            kept[name] = value
            continue
        mask = torch.zeros_like(value)
        for memory, hidden in enumerate(layer.memory.hidden):
            (mask[:, :, memory, :hidden] if name.startswith("inner") else mask[:, :, memory, :, :hidden]).fill_(1)
        kept[name] = (value.detach() * mask).requires_grad_()
    return kept


def everything(
    function: Any, layer: nn.Module, x: Tensor, state: State | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs and final state, gradients of their product with random cotangents), all by name."""
    y, after = function(x, state)
    results = {**(y if isinstance(y, dict) else {"y": y}), **after}
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves |= {f"state.{name}": value for name, value in (state or {}).items() if value.requires_grad}
    generator = torch.Generator().manual_seed(17)
    total = torch.zeros((), dtype=torch.float64)
    for value in results.values():
        if value.is_floating_point():
            value = value * (value.detach() != 0)  # zeros that narrow memories are padded with are no results
            total = total + (value * torch.randn(value.shape, dtype=value.dtype, generator=generator)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results, dict(zip(leaves, gradients, strict=True))


def difference(found: Tensor, expected: Tensor) -> float:
    """max |difference| / max |expected|; absolute where nothing is expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if found.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest if largest > 1e-12 else 1.0)


def compare(layer: SelfModifyingTitans, tokens: int, state: State | None, batch: int = 2) -> None:
    """Layer and specification under every timing of the reads: the gradients are those of the sum of the three."""
    x = torch.randn(batch, tokens, layer.readout.gate.in_features, dtype=torch.float64, requires_grad=True)
    own = layer.read

    def written(x: Tensor, state: State | None) -> tuple[dict[str, Tensor], State]:
        reads, after = specify_reads(layer, x, state)
        return {f"y of {read}": y for read, y in reads.items()}, after

    def fast(x: Tensor, state: State | None) -> tuple[dict[str, Tensor], State]:
        outputs, after = {}, {}
        for read in READS:
            layer.read = read
            outputs[f"y of {read}"], after = layer(x, state)
        layer.read = own
        return outputs, after

    expected = everything(written, layer, x, state)
    found = everything(fast, layer, x, state)
    for kind, ours, theirs in zip(("result", "gradient"), found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, reference in theirs.items():
            assert reference.isfinite().all(), f"{kind} {name} of the specification is not finite"
            error = difference(ours[name], reference)
            assert error <= TOLERANCE, f"{kind} of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("adaptive_query", [False, True])
@pytest.mark.parametrize("negative_eigenvalues", [False, True])
@pytest.mark.parametrize("retain_to", ["initial", "zero"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_specification(
    rule: str, momentum: bool, chunks: tuple[int, int], retain_to: str, negative_eigenvalues: bool, adaptive_query: bool
) -> None:
    layer = build(
        inner_rule=rule,
        momentum=momentum,
        chunk_size=chunks[0],
        projection_chunk_size=chunks[1],
        retain_to=retain_to,
        negative_eigenvalues=negative_eigenvalues,
        adaptive_query=adaptive_query,
    )
    position, tokens = SPANS[chunks]
    compare(layer, tokens, random_state(layer, [position] * 2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_static_projections_equal_the_specification_and_are_never_written(backend: str, rule: str) -> None:
    names = ("key", "retention")
    layer = build(inner_rule=rule, momentum=True, backend=backend, static_projections=names, chunk_size=4)
    compare(layer, 7, random_state(layer, [3, 3]))
    _, state = layer(torch.randn(2, 9, 8, dtype=torch.float64))
    written = state["inner"].flatten(3).abs().amax(dim=(0, 1, 3)) > 0
    expected = [name not in names for name in ("key", "value", "rate", "retention", "memory")]
    assert written.tolist() == expected


def test_static_projections_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"static_projections: expected one of 'key', .* got 'query'"):
        build(static_projections=("query",))
    with pytest.raises(ValueError, match="static_projections: a memory stays as it is only where"):
        build(static_projections=("key",), retain_to="zero")
    with pytest.raises(ValueError, match=r'static_projections: expected names, for example \("key",\)'):
        build(static_projections="key")
    with pytest.raises(ValueError, match="static_projections: expected each name once, got key, key"):
        build(static_projections=("key", "key"))


@pytest.mark.parametrize("adaptive_query", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_narrow_memories_equal_the_specification(backend: str, rule: str, momentum: bool, adaptive_query: bool) -> None:
    layer = build(
        inner_rule=rule,
        momentum=momentum,
        adaptive_query=adaptive_query,
        backend=backend,
        memory_hidden=5,
        gate_hidden_ratio=0.4,
        chunk_size=4,
        projection_chunk_size=2,
    )
    compare(layer, 7, without_padding(layer, random_state(layer, [3, 3])))


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
@pytest.mark.parametrize("write_bound", [None, 0.2, 4.0])
@pytest.mark.parametrize("residual_memory", [False, True])
@pytest.mark.parametrize("retention", [False, True])
def test_equals_the_specification_with_other_settings(
    retention: bool, residual_memory: bool, write_bound: float | None, negative_eigenvalues: bool
) -> None:
    for rule, momentum in (("dgd", True), ("delta", False)):
        layer = build(
            inner_rule=rule,
            momentum=momentum,
            retention=retention,
            residual_memory=residual_memory,
            write_bound=write_bound,
            write_scale=1.0,
            negative_eigenvalues=negative_eigenvalues,
            chunk_size=3,
        )
        compare(layer, 5, random_state(layer, [2, 2]))


def test_a_small_bound_clips_both_maps() -> None:
    """The bound of 0.2 of the settings above is reached by errors and by their images, or it would test nothing.

    The first token finds nothing to erase: it moves each inner map by the write gate times its image, whose norm is the
    bound in all memories of a head that are clipped, and each outer map by no more than that times its own input.
    """
    settings = {"retention": False, "write_scale": 1.0, "projection_write_scale": 1.0, "chunk_size": 3}
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    tight, free = (build(write_bound=bound, **settings)(x)[1] for bound in (0.2, None))
    moved = torch.linalg.matrix_norm(tight["inner"]).sort(dim=-1).values  # (B, H, M)
    torch.testing.assert_close(moved[..., -2], moved[..., -1], rtol=1e-9, atol=0)
    assert moved.max() < 0.2
    ratio = torch.linalg.matrix_norm(tight["outer"]) / torch.linalg.matrix_norm(free["outer"])
    assert ratio.min() < 0.5
    assert ratio.max() <= 1 + 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_hidden": 3},
        {"memory_hidden": 7, "inner_rule": "delta", "momentum": True},
        {"write_scale": 1.0, "inner_rule": "gd", "projection_chunk_size": 2},
        {"conv_width": 1},
        {"conv_width": 2, "adaptive_query": True},
        {"initial_gate": 0.05, "retain_to": "zero"},
        {"slowest_gate": 0.001, "negative_eigenvalues": True},
        {"slowest_gate": 0.001, "empty_memory": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_equals_the_specification_with_other_shapes(settings: dict[str, Any]) -> None:
    layer = build(chunk_size=4, **settings)
    compare(layer, 6, None)
    compare(layer, 5, random_state(layer, [3, 3]))


@pytest.mark.parametrize(("rule", "momentum"), [("dgd", True), ("delta", False)])
def test_equals_the_specification_over_many_chunks(rule: str, momentum: bool) -> None:
    layer = build(inner_rule=rule, momentum=momentum, chunk_size=8, projection_chunk_size=4)
    compare(layer, 29, None, batch=1)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS[:3])
@pytest.mark.parametrize("rule", RULES)
def test_rows_may_stand_at_different_places_in_their_chunks(rule: str, chunks: tuple[int, int], momentum: bool) -> None:
    layer = build(
        inner_rule=rule, momentum=momentum, chunk_size=chunks[0], projection_chunk_size=chunks[1], read="previous"
    )
    compare(layer, 6, random_state(layer, [1, max(chunks) - 1, 0]), batch=3)
    compare(layer, 1, random_state(layer, [1, max(chunks) - 1, 0]), batch=3)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("retain_to", ["initial", "zero"])
@pytest.mark.parametrize("chunks", [(4, 4), (8, 2), (2, 8)])
def test_a_state_can_be_handed_over_in_mid_chunk(chunks: tuple[int, int], retain_to: str, momentum: bool) -> None:
    """From layer to specification and back, gradients through the state included."""
    layer = build(
        inner_rule="delta",
        momentum=momentum,
        retain_to=retain_to,
        chunk_size=chunks[0],
        projection_chunk_size=chunks[1],
    )
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)

    def relay(first: Any, second: Any) -> Any:
        def run(x: Tensor, state: State | None) -> tuple[Tensor, State]:
            start, middle = first(x[:, :5], state)
            end, after = second(x[:, 5:], middle)
            return torch.cat([start, end], dim=1), after

        return run

    def written(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        return specify(layer, x, state)

    expected = everything(written, layer, x, None)
    for function in (relay(layer, written), relay(written, layer), relay(layer, layer)):
        for ours, theirs in zip(everything(function, layer, x, None), expected, strict=True):
            for name, reference in theirs.items():
                assert difference(ours[name], reference) <= TOLERANCE, name


def test_without_gradients_the_specification_is_the_same() -> None:
    layer = build(chunk_size=4, momentum=True)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    expected, state = specify(layer, x)
    with torch.no_grad():
        y, after = specify(layer, x)
    assert not y.requires_grad
    assert difference(y, expected) <= TOLERANCE
    assert all(difference(after[name], state[name]) <= TOLERANCE for name in state)


def test_single_precision_is_near() -> None:
    layer = build(chunk_size=8, momentum=True)
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    expected, state = specify(layer, x)
    y, after = layer.float()(x.float())
    assert y.dtype == torch.float32
    assert difference(y.double(), expected) < 1e-4
    for name in ("inner", "outer", "inner_momentum", "outer_momentum"):
        assert difference(after[name].double(), state[name]) < 1e-4


def test_the_specification_refuses_to_cut_gradients() -> None:
    with pytest.raises(ValueError, match="detach_every: expected None, got 2"):
        specify(build(detach_every=2), torch.zeros(1, 1, 8, dtype=torch.float64))


def test_detach_every_cuts_gradients_and_nothing_else() -> None:
    """With a cut after each chunk, no gradient passes from one chunk of outputs to an earlier token's write."""
    layer, cut = build(chunk_size=4, conv_width=1), build(chunk_size=4, conv_width=1, detach_every=1)
    x = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    y, z = layer(x)[0], cut(x)[0]
    assert torch.equal(y, z)
    (through,) = torch.autograd.grad(y[:, 4:].sum(), x)
    (stopped,) = torch.autograd.grad(z[:, 4:].sum(), x)
    assert through[:, :4].abs().max() > 1e-6
    assert stopped[:, :4].abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_rule": "sgd"}, "inner_rule: expected one of 'dgd', 'gd', 'delta'; got 'sgd'"),
        ({"read": "next"}, "read: expected one of"),
        ({"retain_to": "half"}, "retain_to: expected one of"),
        ({"chunk_size": 0}, "at least 1"),
        ({"chunk_size": 6, "projection_chunk_size": 4}, "one must divide the other; got 6 and 4"),
        ({"write_bound": 0.0}, "write_bound: expected a norm"),
        ({"write_scale": 0.0}, "write_scale: expected a positive fraction"),
        ({"initial_gate": 1.0}, "initial_gate: expected a number between 0 and 1, got 1.0"),
        ({"initial_gate": 0.0, "slowest_gate": 0.1}, "initial_gate: expected a number between 0 and 1, got 0.0"),
        ({"slowest_gate": 0.0}, "slowest_gate: expected a number between 0 and 1, got 0.0"),
        ({"slowest_gate": "x"}, "slowest_gate: expected a number between 0 and 1, got 'x'"),
        ({"slowest_gate": 0.6}, "slowest_gate: expected at most initial_gate, the first head's, 0.5; got 0.6"),
        ({"empty_memory": True, "residual_memory": True}, "empty_memory: with residual_memory the query is read"),
        ({"detach_every": 0}, "detach_every: expected at least 1"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfModifyingTitans(8, 2, **settings)


def test_write_gates_start_as_a_geometric_series_over_the_heads() -> None:
    layer = SelfModifyingTitans(16, 4, initial_gate=0.5, slowest_gate=0.0005)
    gates = LARGEST_GATE * layer.gate_bias.double().sigmoid()
    assert gates.tolist() == pytest.approx([0.5, 0.05, 0.005, 0.0005], rel=1e-5)
    for kind in (SelfModifyingTitans, Titans):
        equal = LARGEST_GATE * kind(16, 4, initial_gate=0.2).gate_bias.sigmoid()
        assert equal.tolist() == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_empty_memory_gives_back_what_the_context_wrote(backend: str) -> None:
    def outer_after_training(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        layer = SelfModifyingTitans(8, 2, chunk_size=4, backend=backend, **settings).double()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        for _ in range(3):
            layer(torch.randn(2, 9, 8, dtype=torch.float64))[0].square().sum().backward()
            optimizer.step()
        return layer.memory.outer.detach()

    assert outer_after_training()[:, -1].abs().max() > 0
    assert outer_after_training(empty_memory=True)[:, -1].abs().max() == 0

    layer = build(empty_memory=True, chunk_size=4, backend=backend, read="previous")  # whatever the parameter holds
    assert layer.memory.outer[:, -1].abs().max() > 0
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    assert layer(x)[0].abs().max() == 0
    assert layer.decode_step(x, layer.init_state(2, dtype=torch.float64))[0].abs().max() == 0


def test_what_slow_heads_of_an_empty_memory_read_leaves_the_norm_at_full_size() -> None:
    def outputs(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        layer = SelfModifyingTitans(8, 2, chunk_size=4, retention=False, **settings).double()
        with torch.no_grad():
            layer.readout.output.weight[:, :4] = 0  # the first head's
        return layer(torch.randn(1, 12, 8, dtype=torch.float64))[0]

    # Gates of 1e-4 and 1e-5 write sums, whose ratios are the same.
    slow, slower = (outputs(initial_gate=0.1, slowest_gate=gate, empty_memory=True) for gate in (1e-4, 1e-5))
    assert (slow - slower).abs().max() < 2e-2 * slow.abs().max()
    learnt = SelfModifyingTitans(8, 2, slowest_gate=1e-4)
    assert SelfModifyingTitans(8, 2, slowest_gate=1e-25, empty_memory=True)(torch.randn(1, 5, 8))[0].isfinite().all()
    assert learnt.readout.norm.eps == 1e-6  # a W1 that starts at zero and is learnt would get gradients without bound


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of heads"):
        SelfModifyingTitans(9, 2)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_state_of_another_layer_dtype_or_batch_is_refused(backend: str) -> None:
    layer = build(backend=backend)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for other, rows in (
        (build(momentum=True), 2),
        (build(memory_hidden=6), 2),
        (build(adaptive_query=True), 2),
        (build().float(), 2),
        (build(), 1),
        (build(), 3),
    ):
        with pytest.raises(ValueError, match="state: expected"):
            layer(x, other.init_state(rows))
