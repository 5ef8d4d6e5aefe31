"""HopeLM with every mixer: one sequence read in any way, rows that never meet, states that are values, sizes."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from nestlearn.io import atomic_save_safetensors, load_safetensors
from nestlearn.models.config import PRESETS, HopeConfig, Mixer
from nestlearn.models.hope import HopeLM

State = dict[str, Tensor]

VOCABULARY = 11
TINY: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 16, "depth": 2, "heads": 2, "chunk_size": 4}
# Every mixer, and the settings of memories that change what their state holds or when it changes.
MODELS: dict[str, dict[str, Any]] = {mixer: {"mixer": mixer} for mixer in get_args(Mixer)} | {
    "tnt": {
        "mixer": "tnt",
        "global_chunk_size": 6,
        "global_stride": 3,
        "local_chunk_sizes": (2, 4),
        "shard_length": 8,
        "project_queries": True,
    },
    "momentum": {"momentum": True, "adaptive_query": True},
    "two chunk sizes": {"chunk_size": 2, "projection_chunk_size": 6, "read": "previous", "retain_to": "zero"},
    "paper": {**HopeConfig.paper(**TINY).to_dict(), "vocab_size": VOCABULARY},
    "independent levels": {"cms_variant": "independent", "mixer": "delta_net"},
}
TOLERANCE = 1e-9


def build(name: str, seed: int = 0, **settings: Any) -> HopeLM:
    """A model in float64 in which no parameter is at its initial value; no memory is empty at the start."""
    torch.manual_seed(seed)
    model = HopeLM(HopeConfig(**{**TINY, **MODELS[name], **settings})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if found.numel() == 0:
        return 0.0
    assert expected.isfinite().all()
    return (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def trimmed(state: State) -> State:
    """The state without the spare room of an attention cache."""
    short = dict(state)
    for name in state:
        if name.endswith(("keys", "values")):
            longest = int(state[name.rsplit(".", 1)[0] + ".position"].max())
            short[name] = state[name][:, :, :longest]
    return short


def row_of(state: State, row: int) -> State:
    return trimmed({name: value[row : row + 1] for name, value in state.items()})


def assert_same(found: State, expected: State) -> None:
    found, expected = trimmed(found), trimmed(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = difference(found[name], value)
        assert error <= TOLERANCE, f"{name} differs by {error:.1e}"


def assert_close(found: Tensor, expected: Tensor) -> None:
    error = difference(found, expected)
    assert error <= TOLERANCE, f"logits differ by {error:.1e}"


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_equals_splits_equals_tokens(name: str) -> None:
    model = build(name)
    tokens = random_tokens(2, 15)
    logits, state = model(tokens)
    begun, _ = model(tokens, model.init_state(2))
    assert_close(begun, logits)
    for cuts in ([1, 6, 13], [4, 8], [3]):
        pieces, running = [], None
        for piece in tokens.tensor_split(cuts, dim=1):
            out, running = model(piece, running)
            pieces.append(out)
        assert_close(torch.cat(pieces, dim=1), logits)
        assert running is not None
        assert_same(running, state)
    steps, running = [], model.init_state(2)
    for token in tokens.unbind(1):
        out, running = model.decode_step(token, running)
        steps.append(out)
    assert_close(torch.stack(steps, dim=1), logits)
    assert_same(running, state)
    # A state that decoding left behind is read by a longer call like any other.
    further = random_tokens(2, 5, seed=2)
    assert_close(model(further, running)[0], model(further, state)[0])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_empty_call_changes_nothing(name: str) -> None:
    model = build(name)
    _, state = model(random_tokens(2, 6))
    logits, after = model(random_tokens(2, 0), state)
    assert logits.shape == (2, 0, VOCABULARY)
    assert_same(after, state)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_output_depends_on_a_later_token(name: str) -> None:
    model = build(name)
    tokens = random_tokens(1, 14)
    logits, _ = model(tokens)
    for place in (1, 5, 8, 13):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 1) % VOCABULARY
        other, _ = model(changed)
        assert_close(other[:, :place], logits[:, :place])
        assert difference(other[:, place], logits[:, place]) > 1e-4  # its own token does matter


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_are_independent_whatever_their_lengths(name: str) -> None:
    model = build(name)
    tokens = random_tokens(4, 11)
    for lengths in (None, torch.tensor([11, 1, 8, 6])):
        first, state = model(tokens, lengths=lengths)
        # The second call finds rows that stand at different places of their chunks.
        further = random_tokens(4, 7, seed=3)
        more = None if lengths is None else torch.tensor([2, 7, 4, 0])
        second, after = model(further, state, lengths=more)
        for row in range(4):
            one = tokens[row : row + 1, : None if lengths is None else int(lengths[row])]
            two = further[row : row + 1, : None if more is None else int(more[row])]
            alone, middle = model(one)
            assert_close(first[row : row + 1, : one.shape[1]], alone)
            assert_same(row_of(state, row), middle)
            alone, last = model(two, middle)
            assert_close(second[row : row + 1, : two.shape[1]], alone)
            assert_same(row_of(after, row), last)


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_crosses_rows(name: str) -> None:
    model = build(name)
    found = []
    model.embedding.register_forward_hook(lambda _, __, output: (output.retain_grad(), found.append(output))[0])
    logits, _ = model(random_tokens(3, 9), lengths=torch.tensor([9, 4, 7]))
    logits[1, :4].square().sum().backward()
    gradient = found[0].grad
    assert gradient is not None
    assert gradient[1, :4].abs().sum() > 0
    assert gradient[[0, 2]].abs().max() == 0
    assert gradient[1, 4:].abs().max() == 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_document_starts_are_fresh_contexts(name: str) -> None:
    model = build(name)
    tokens = random_tokens(3, 13)
    starts = torch.zeros(3, 13, dtype=torch.bool)
    starts[0, 6] = starts[1, 0] = starts[1, 9] = starts[1, 11] = True
    _, before = model(random_tokens(3, 5, seed=4))
    logits, state = model(tokens, before, document_starts=starts)
    for row, cuts in enumerate(([6], [0, 9, 11], [])):
        running: State | None = row_of(before, row)
        pieces = []
        for number, piece in enumerate(tokens[row : row + 1].tensor_split(cuts, dim=1)):
            if not piece.shape[1]:
                continue
            out, running = model(piece, running if number == 0 else None)
            pieces.append(out)
        assert_close(logits[row : row + 1], torch.cat(pieces, dim=1))
        assert running is not None
        assert_same(row_of(state, row), running)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_calls_repeat_and_change_nothing(name: str) -> None:
    model = build(name)
    _, state = model(random_tokens(2, 6))
    tokens = random_tokens(2, 7, seed=5)
    lengths = torch.tensor([7, 3])
    starts = torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 2] = True
    arguments = {"tokens": tokens, "lengths": lengths, "starts": starts}
    kept, kept_state = copied(arguments), copied(state)
    parameters = copied(dict(model.state_dict()))
    first, after = model(tokens, state, lengths=lengths, document_starts=starts)
    second, again = model(tokens, state, lengths=lengths, document_starts=starts)
    valid = torch.arange(7) < lengths[:, None]
    assert torch.equal(first[valid], second[valid])
    for name_, value in after.items():
        assert torch.equal(value, again[name_])
    for original, now in ((kept, arguments), (kept_state, state), (parameters, dict(model.state_dict()))):
        assert all(torch.equal(value, now[name_]) for name_, value in original.items())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_saved_state_goes_on(name: str, tmp_path: Path) -> None:
    model = build(name)
    _, state = model(random_tokens(2, 7))
    assert {key.split(".")[0] for key in state} == {"blocks"}
    atomic_save_safetensors(state, tmp_path / "state.safetensors")
    loaded = load_safetensors(tmp_path / "state.safetensors")
    further = random_tokens(2, 6, seed=6)
    assert torch.equal(model(further, loaded)[0], model(further, state)[0])
    # So does that of a fresh context, although its tensors are views of one another.
    atomic_save_safetensors(model.init_state(2), tmp_path / "fresh.safetensors")
    assert_close(model(further, load_safetensors(tmp_path / "fresh.safetensors"))[0], model(further)[0])


@torch.no_grad()
def test_a_state_does_not_grow_except_for_attention() -> None:
    for name in MODELS:
        model = build(name)
        sizes = [
            sum(value.numel() * value.element_size() for value in model(random_tokens(2, length))[1].values())
            for length in (3, 40)
        ]
        assert (sizes[0] == sizes[1]) == ("attention" not in name or name == "linear_attention"), name


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = build(name)
    tokens = random_tokens(2, 13)
    results = []
    for on in (False, True):
        model.set_activation_checkpointing(on)
        model.zero_grad()
        logits, state = model(tokens)
        floats = [value for value in state.values() if value.is_floating_point()]
        (logits.square().sum() + sum(value.square().sum() for value in floats)).backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        results.append(gradients)
    assert results[0].keys() == results[1].keys() == dict(model.named_parameters()).keys()
    for key, gradient in results[0].items():
        assert torch.equal(gradient, results[1][key]), key


def test_activation_checkpointing_keeps_less_of_each_chunk() -> None:
    model = build("self_modifying_titans", backend="torch")
    tokens = random_tokens(1, 32)

    def kept(on: bool) -> int:
        model.set_activation_checkpointing(on)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(tokens)
        assert outputs[0].requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(5, dtype=torch.long)}, r"tokens: expected whole numbers of shape \(B, T\)"),
        ({"tokens": torch.zeros(2, 5)}, r"tokens: expected whole numbers .* got torch.float32"),
        ({"tokens": torch.tensor([[1, VOCABULARY]])}, r"tokens: .*0 to 10.*got 1 to 11"),
        ({"tokens": torch.tensor([[-1, 2]])}, r"tokens: .*got -1 to 2"),
        ({"tokens": random_tokens(2, 5), "lengths": torch.tensor([5])}, r"lengths: expected .*\(2,\), got"),
        (
            {"tokens": random_tokens(2, 5), "document_starts": torch.zeros(2, 4, dtype=torch.bool)},
            r"document_starts: expected the tokens' shape \(2, 5\), got \(2, 4\)",
        ),
        (
            {"tokens": random_tokens(1, 5), "state": {"other": torch.zeros(1)}},
            r"state: nothing in it is named blocks.0",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("self_modifying_titans")(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 30, "heads": 4}, r"dim must be a multiple of heads, got dim 30 and heads 4; .* (28|32)"),
        ({"dim": 0}, "dim: expected a whole number of at least 1, got 0"),
        ({"depth": 2.5}, "depth: expected a whole number of at least 1, got 2.5"),
        ({"vocab_size": True}, "vocab_size: expected a whole number of at least 1, got True"),
        ({"mixer": "mamba"}, "mixer: expected one of 'self_modifying_titans', .*; got 'mamba'"),
        ({"inner_rule": "sgd"}, "inner_rule: expected one of 'dgd', 'gd', 'delta'; got 'sgd'"),
        ({"read": "later"}, "read: expected one of .*'previous'.*; got 'later'"),
        ({"retain_to": "one"}, "retain_to: expected one of 'initial', 'zero'; got 'one'"),
        ({"cms_variant": "parallel"}, "cms_variant: expected one of .*'nested'; got 'parallel'"),
        ({"cms_periods": ()}, r"CMS periods: .*for example \(1, 4, 16\); got \(\)"),
        ({"cms_periods": (4, 1)}, r"CMS periods: .*ascending.*got \(4, 1\)"),
        ({"cms_expansion": 0.0}, "cms_expansion: expected a positive number, got 0.0"),
        ({"chunk_size": 12, "projection_chunk_size": 5}, "one must divide the other, got 12 and 5; for example"),
        ({"initial_gate": 1.0}, "initial_gate: expected a number between 0 and 1, got 1.0"),
        (
            {"slowest_gate": 0.1, "heads": 1},
            "slowest_gate: one head is the first and the last; choose initial_gate=0.1",
        ),
        ({"slowest_gate": 0.1, "mixer": "titans"}, "slowest_gate: titans has no heads that may write slowly"),
        ({"empty_memory": True, "mixer": "delta_net"}, "empty_memory: delta_net has no memory that may start empty"),
        ({"empty_memory": True, "residual_memory": True}, "empty_memory: with residual_memory"),
        ({"write_bound": -1.0}, "write_bound: expected a norm from 1e-18 to 1e18, or None for no bound; got -1.0"),
        ({"mixer": "attention", "dim": 6, "heads": 2}, "even head width, got dim 6 / heads 2 = 3"),
    ],
)
def test_config_errors_say_expected_got_and_how_to_mend(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HopeConfig(**settings)


def test_configs_survive_json() -> None:
    for name, settings in MODELS.items():
        config = HopeConfig(**{**TINY, **settings})
        assert HopeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name
    assert HopeConfig.from_dict(HopeConfig.transformer(dim=64).to_dict()) == HopeConfig.transformer(dim=64)
    with pytest.raises(ValueError, match="no setting 'chunksize'; did you mean 'chunk_size'"):
        HopeConfig.from_dict({"chunksize": 4})
    with pytest.raises(ValueError, match="no setting 'zzz'; known are vocab_size, "):
        HopeConfig.from_dict({"zzz": 4})


def test_presets_have_the_size_of_their_name() -> None:
    sizes = {"tiny": 1e6, "small": 10e6, "340M": 340e6, "760M": 760e6, "1.3B": 1.3e9}
    assert PRESETS.keys() == sizes.keys()
    for name, size in sizes.items():
        with torch.device("meta"):
            count = HopeLM(HopeConfig.preset(name)).num_parameters()
        assert count == pytest.approx(size, rel=0.1 if size > 1e8 else 0.35), f"{name}: {count:,}"
    assert HopeConfig.preset("tiny", depth=1).depth == 1
    with pytest.raises(ValueError, match=r"preset: expected one of 'tiny', .*; got 'huge'"):
        HopeConfig.preset("huge")


def test_untied_embeddings_are_counted_twice() -> None:
    tied, untied = (HopeLM(HopeConfig(**TINY, tie_embeddings=tie)) for tie in (True, False))
    assert untied.num_parameters() - tied.num_parameters() == VOCABULARY * 16


def test_a_linear_mixer_costs_the_same_at_any_length_and_attention_more() -> None:
    linear, quadratic = HopeLM(HopeConfig(**TINY)), HopeLM(HopeConfig.transformer(**TINY))
    assert linear.flops_per_token(64) == linear.flops_per_token(4096)
    assert quadratic.flops_per_token(4096) > 2 * quadratic.flops_per_token(64)


@pytest.mark.parametrize("name", MODELS)
def test_levels_hold_every_parameter_once(name: str) -> None:
    model = build(name, cms_periods=(1, 4, 16))
    groups = model.level_parameters()
    assert sorted(groups) == [1, 4, 16]
    named = [pair for group in groups.values() for pair in group]
    assert sorted(key for key, _ in named) == sorted(key for key, _ in model.named_parameters())
    assert len({id(parameter) for _, parameter in named}) == len(named)
    assert all(f".memory_system.levels.{i}." in key for i in (1, 2) for key, _ in groups[4**i])


def test_levels_are_named_and_ordered_by_frequency() -> None:
    model = build("self_modifying_titans", cms_periods=(1, 4), projection_chunk_size=8)
    levels = model.levels()
    assert len({level.name for level in levels}) == len(levels)
    by_name = {level.name: (level.period, level.unit) for level in levels}
    assert by_name["blocks.0.mixer.memory"] == (1, "token")
    assert by_name["blocks.1.mixer.projections"] == (8, "token")
    assert by_name["blocks.1.memory_system.levels.1"] == (4, "step")
    for unit in ("token", "step"):
        periods = [level.period for level in levels if level.unit == unit]
        assert periods == sorted(periods)
    slow = {level.name for level in build("tnt", static_projections=("key", "value", "rate", "retention")).levels()}
    assert not any(name.endswith("projections") for name in slow)
    literal = {level.name: level.period for level in build("paper").levels()}
    assert literal["blocks.0.mixer.memory"] == 4  # reads of the snapshot change once a chunk


@torch.no_grad()
def test_a_state_of_a_deeper_model_is_refused_and_none_is_a_fresh_context() -> None:
    settings = {"vocab_size": 8, "dim": 8, "heads": 2}
    shallow, deep = (HopeLM(HopeConfig(depth=depth, **settings)).double() for depth in (1, 2))
    token = torch.tensor([1, 2])
    for read in (lambda state: shallow(token[:, None], state), lambda state: shallow.decode_step(token, state)):
        with pytest.raises(ValueError, match=r"expected one of 1 blocks, got one with blocks\.1"):
            read(deep.init_state(2))
    assert_close(shallow.decode_step(token, None)[0], shallow(token[:, None])[0][:, 0])
