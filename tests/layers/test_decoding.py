"""Decoding token by token equals the chunked form, in outputs and every state tensor, and works in place."""

import pytest
import torch
from test_properties import MIXERS, RECURRENT, begun, build, every_mixer, tokens
from torch import Tensor, nn

from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.titans import Titans

State = dict[str, Tensor]
EXACT = 1e-12
# Beside the mixers of test_properties: each option with and without what it interacts with.
OPTIONS = {
    f"{rule}{' momentum' * momentum}{' negative' * negative} {read}": (
        lambda rule=rule, momentum=momentum, negative=negative, read=read: SelfModifyingTitans(
            8,
            2,
            chunk_size=4,
            projection_chunk_size=2 if read == "previous" else None,
            inner_rule=rule,
            momentum=momentum,
            negative_eigenvalues=negative,
            read=read,
            adaptive_query=momentum != negative,
            residual_memory=read == "chunk",
            retain_to="zero" if negative else "initial",
            retention=rule != "delta" or not momentum,
            write_bound=None if momentum and negative else 0.3,
            memory_hidden=6 if rule == "gd" else None,
        )
    )
    for rule in ("dgd", "gd", "delta")
    for momentum in (False, True)
    for negative in (False, True)
    for read in ("token", "previous", "chunk")
} | {
    f"titans {rule}{' momentum' * momentum} {read}": (
        lambda rule=rule, momentum=momentum, read=read: Titans(
            8, 2, chunk_size=3, inner_rule=rule, momentum=momentum, read=read, memory_hidden=6
        )
    )
    for rule, momentum, read in (("dgd", True, "chunk"), ("dgd", False, "token"), ("gd", False, "previous"))
}


@pytest.fixture(autouse=True)
def _known_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mixer in OPTIONS.items():
        monkeypatch.setitem(MIXERS, name, mixer)


def decode(layer: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for token in x.split(1, dim=1):
        y, state = layer.decode_step(token, state)  # type: ignore[operator]
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def assert_near(found: Tensor, expected: Tensor, what: str = "outputs") -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if found.is_floating_point() and found.numel():
        error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()
        assert error <= EXACT, f"{what}: relative error {error:.1e}"
    else:
        assert torch.equal(found, expected), what


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # An attention cache has room to spare after a decoded token.
        room = value.shape[2] if name in ("keys", "values") else None
        assert_near(found[name] if room is None else found[name][:, :, :room], value, name)


@pytest.mark.parametrize("mixer", [*MIXERS, *OPTIONS])
@torch.no_grad()
def test_decoding_equals_reading(mixer: str) -> None:
    """From a prefilled state whose rows stand at different places of their chunks, after every token, and back."""
    layer = build(mixer)
    x, further = tokens(3, 19), tokens(3, 6, seed=2)
    for count in ([1, 6, 3], [2, 2, 2]):
        start = begun(layer, count)
        state = copied(start)
        whole, _ = layer(x, start)
        for t in range(x.shape[1]):
            y, state = layer.decode_step(x[:, t : t + 1], state)  # type: ignore[operator]
            assert_near(y, whole[:, t : t + 1])
            if t in (0, 1, 2, 3, 5, 6, 18):
                expected = layer(x[:, : t + 1], start)[1]
                assert_same_state(state, expected)
        y, after = layer(further, state)
        z, expected = layer(further, expected)
        assert_near(y, z)
        assert_same_state(after, expected)
        # Decoded, read and decoded again.
        y, after = decode(layer, further, after)
        z, expected = layer(further, expected)
        assert_near(y, z)
        assert_same_state(after, expected)


@every_mixer
@torch.no_grad()
def test_decoding_from_the_initial_state(mixer: str) -> None:
    layer = build(mixer)
    x = tokens(2, 9)
    y, state = decode(layer, x, layer.init_state(2, dtype=torch.float64))  # type: ignore[operator]
    z, expected = layer(x)
    assert_near(y, z)
    assert_same_state(state, expected)


# TNT decodes by its forward, which makes a new state.
@pytest.mark.parametrize("mixer", [mixer for mixer in RECURRENT if not mixer.startswith("tnt")])
@torch.no_grad()
def test_the_state_stays_where_it_is(mixer: str) -> None:
    """No tensor grows, moves or shares its place with another one, at the end of a chunk neither."""
    layer = build(mixer)
    x = tokens(2, 20)
    _, state = decode(layer, x[:, :1], begun(layer, [3, 3]))
    places = {name: value.data_ptr() for name, value in state.items() if value.numel()}
    sizes = {name: value.untyped_storage().nbytes() for name, value in state.items()}
    assert len(set(places.values())) == len(places)
    for t in range(1, 20):
        _, state = decode(layer, x[:, t : t + 1], state)
        assert {name: value.data_ptr() for name, value in state.items() if value.numel()} == places
    assert {name: value.untyped_storage().nbytes() for name, value in state.items()} == sizes


@pytest.mark.parametrize("mixer", RECURRENT)
def test_states_that_cannot_be_overwritten_are_copied(mixer: str) -> None:
    """A state of a graph, of one prompt for many rows, or of inference mode: right results, and the owner's stay."""
    layer = build(mixer)
    x = tokens(1, 7)
    _, prompt = layer(x)
    versions = {name: value._version for name, value in prompt.items() if value.requires_grad}
    assert versions
    for rows in (1, 3):
        shared = {name: value.expand(rows, *value.shape[1:]) for name, value in prompt.items()}
        begin = copied({name: value.detach() for name, value in shared.items()})
        new = tokens(rows, 6, seed=5)
        shared = {name: value if value.requires_grad else value.clone() for name, value in shared.items()}
        y, state = decode(layer, new, shared)
        z, expected = layer(new, begin)
        assert not any(value.requires_grad for value in state.values())
        assert_near(y, z.detach())
        assert_same_state(state, {name: value.detach() for name, value in expected.items()})
    assert all(prompt[name]._version == version for name, version in versions.items())
    with torch.inference_mode():
        _, frozen = layer(x)
        decoded, _ = decode(layer, x, layer(x)[1])
    y, _ = decode(layer, x, frozen)
    assert_near(y, decoded.clone())


@torch.no_grad()
def test_a_change_of_the_weights_or_of_the_state_is_seen() -> None:
    """The remembered sum of initial memories and snapshot never outlives either."""
    layer = build("self_modifying_titans")
    x = tokens(2, 3)
    _, state = decode(layer, x, begun(layer, [1, 1]))
    for changed in (layer.memory.inner, "outer_snapshot"):  # type: ignore[union-attr]
        (changed if isinstance(changed, Tensor) else state[changed]).mul_(1.1)
        start = copied(state)
        y, state = decode(layer, x[:, :1], state)
        assert_near(y, layer(x[:, :1], start)[0])
    other = build("self_modifying_titans")
    other.load_state_dict({name: 1.2 * value for name, value in layer.state_dict().items()})
    start = copied(state)
    y, _ = decode(other, x[:, :1], state)
    assert_near(y, other(x[:, :1], start)[0])


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "titans", "delta_net"])
@torch.no_grad()
def test_decoding_in_single_precision_stays_close(mixer: str) -> None:
    x = tokens(1, 2000)
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = build(mixer).to(dtype)
        state = layer.init_state(1, dtype=dtype)
        found.append(decode(layer, x.to(dtype), state)[0])
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[1].abs().max()


@torch.no_grad()
def test_decoding_under_autocast_keeps_the_memories_in_single_precision() -> None:
    for mixer in ("self_modifying_titans", "titans", "gated_delta_net"):
        layer = build(mixer).float()
        x = tokens(2, 6).float()
        exact, _ = decode(layer, x, layer.init_state(2))  # type: ignore[operator]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = decode(layer, x, layer.init_state(2))  # type: ignore[operator]
        assert all(value.dtype == torch.float32 for name, value in state.items() if "inner" in name or name == "memory")
        assert (y.float() - exact).abs().max() < 0.1 * exact.abs().max()
