"""What is said of memories is what the layers do: checked against the states that the model itself leaves."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from nestlearn import HopeConfig, HopeLM
from nestlearn.inspect.memories import describe_memories, memories_table, plot_memories


def model_of(mixer: str = "self_modifying_titans", **settings) -> HopeLM:
    torch.manual_seed(0)
    made = {"dim": 16, "depth": 2, "heads": 2, "chunk_size": 8, "vocab_size": 30, **settings}
    made |= {"global_chunk_size": 8, "global_stride": 1, "local_chunk_sizes": (2, 4), "shard_length": 8}
    model = HopeLM(HopeConfig(mixer=mixer, **made)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


TOKENS = torch.arange(20) * 7 % 30


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "tnt", "titans"])
def test_shapes_and_ranges(mixer: str) -> None:
    record = describe_memories(model_of(mixer), TOKENS)
    memories = 1 if mixer == "titans" else 5
    assert len(record.names) == memories
    assert record.write.shape == record.half_life.shape == (2, 2, 20)
    assert record.error.shape == (2, 2, memories, 20)
    assert record.change.shape == (2, 2, memories, 3)
    assert record.positions.tolist() == [8, 16, 20]
    assert ((record.write > 0) & (record.write < 1)).all()
    assert (record.half_life > 0).all()
    assert record.bound == 4.0


@pytest.mark.parametrize("retain_to", ["initial", "zero"])
def test_change_is_that_of_the_memories(retain_to: str) -> None:
    model = model_of(retain_to=retain_to)
    record = describe_memories(model, TOKENS)
    _, state = model(TOKENS[None])
    mixer = model.blocks[1].mixer
    inner, outer = state["blocks.1.inner"][0], state["blocks.1.outer"][0]
    if retain_to == "zero":
        inner, outer = inner - mixer.memory.initial.inner, outer - mixer.memory.initial.outer
    expected = (inner.square().sum((-2, -1)) + outer.square().sum((-2, -1))).sqrt()
    torch.testing.assert_close(record.change[1, :, :, -1], expected.detach())


@pytest.mark.parametrize("settings", [{}, {"adaptive_query": True}, {"residual_memory": True}], ids=str)
def test_gates_and_errors_explain_what_the_layer_writes(settings: dict) -> None:
    # With chunks of one token, without erasing and without bound, a token's whole effect on W1 is known:
    # alpha W1 - scale write error hidden^T with write = s / (1 - s + s |hidden|^2).
    model = model_of(inner_rule="gd", chunk_size=1, depth=1, write_bound=None, **settings)
    record = describe_memories(model, TOKENS[:6])
    mixer = model.blocks[0].mixer
    x = model.blocks[0].norm(model.embedding(TOKENS[None, :6]))
    retain = torch.exp2(-1 / record.half_life[0])  # (H, T)
    projections = len(record.names) - 1
    scale = torch.tensor([mixer.projection_write_scale] * projections + [mixer.write_scale], dtype=torch.float64)
    state = mixer.init_state(1)
    for t in range(6):
        before = state
        _, state = mixer(x[:, t : t + 1], before)
        base = mixer.memory.initial
        written = (state["outer"] - retain[:, t, None, None, None] * before["outer"])[0]
        keys = _keys(mixer, x[:, : t + 1])
        hidden = torch.nn.functional.silu(keys @ (before["inner"][0] + base.inner).mT)[..., 0, :]
        s = record.write[0, :, t, None]
        squared = hidden.square().sum(-1)
        write = scale * s / (1 - s + s * squared)
        expected = write * record.error[0, :, :, t] * squared.sqrt()
        torch.testing.assert_close(written.flatten(-2).norm(dim=-1), expected, rtol=1e-8, atol=1e-10)


def _keys(mixer, x: torch.Tensor) -> torch.Tensor:
    """Keys of the last token of x, (H, 1, 1, K), Eq. 83."""
    state = mixer.init_state(1)
    if x.shape[1] > 1:
        _, state = mixer(x[:, :-1])
    u = mixer.streams.split(mixer.streams(x[:, -1:], state["convolution"])[0])[1][0, :, 0]
    inner = state["inner_snapshot"][0, :, 0] + mixer.memory.initial.inner[:, 0]
    outer = state["outer_snapshot"][0, :, 0] + mixer.memory.initial.outer[:, 0]
    k = u + (outer @ torch.nn.functional.silu(inner @ u[..., None]))[..., 0]
    return (k / k.norm(dim=-1, keepdim=True))[:, None, None]


def test_other_mixers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two-layer memories.*'delta_net'"):
        describe_memories(model_of("delta_net"), TOKENS)
    with pytest.raises(ValueError, match="at least one"):
        describe_memories(model_of(), TOKENS[:0])


def test_looking_leaves_no_hook_behind() -> None:
    model = model_of()
    describe_memories(model, TOKENS)
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "tnt", "titans"])
def test_table_and_picture(mixer: str, tmp_path: Path) -> None:
    record = describe_memories(model_of(mixer), TOKENS)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(memories_table(record))
    for name in record.names:
        assert name in captured.get()
    assert "after 20 tokens" in captured.get()
    plot_memories(record, tmp_path / "memories.png", title="memories")
    assert (tmp_path / "memories.png").read_bytes().startswith(b"\x89PNG")
