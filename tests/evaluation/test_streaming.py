"""Long streams: what the watcher sees is what happened, and it tells every kind of failure."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evaluation.streaming import (
    STREAMS,
    WriteProbe,
    make_jobs,
    memory_sizes,
    perturb,
    stream,
    stream_bytes,
    table,
    verdict,
)
from nestlearn.memory.mlp import InnerRule
from nestlearn.models import HopeConfig, HopeLM

GOOD: dict[str, Any] = {
    "finite": True,
    "tokens": 100,
    "entry": [1.0, 2.0, 3.0],
    "norm": [2.0, 3.0, 4.0],
    "written": 3.9,
    "writes": 10,
    "bound": 4.0,
    "state_bytes": [100],
}


def build(**settings: Any) -> HopeLM:
    torch.manual_seed(0)
    return HopeLM(HopeConfig(**{"dim": 16, "depth": 2, "heads": 2, "chunk_size": 16, **settings}))


@pytest.mark.parametrize("rule", ["dgd", "gd", "delta"])
@pytest.mark.parametrize("kind", ["untrained", "perturbed"])
def test_streams_stay_finite_bounded_and_of_one_size(rule: InnerRule, kind: str) -> None:
    model = build(inner_rule=rule, initial_gate=0.95)
    if kind == "perturbed":
        perturb(model, 0.5)
    record = stream(model, stream_bytes("stdlib", 1500), call=500)
    assert verdict({**record, "bound": model.config.write_bound}) == []
    assert record["tokens"] == 1500
    # Two maps of five memories, at every token of every head, row and block.
    assert record["writes"] == 2 * 5 * 1500 * 2 * 3 * 2
    assert 0 < record["written"] <= 4.0 * (1 + 1e-5)


def test_the_length_of_a_call_changes_nothing() -> None:
    model, tokens = build(), stream_bytes("stdlib", 300)
    records = [stream(model, tokens, call=call) for call in (300, 77)]
    assert records[0]["final"] == pytest.approx(records[1]["final"], rel=1e-3)
    assert records[0]["written"] == pytest.approx(records[1]["written"], rel=1e-3)
    assert records[0]["writes"] == records[1]["writes"]


def test_a_memory_counts_whole_and_by_row() -> None:
    model = build()
    with torch.no_grad():
        model.blocks[1].mixer.memory.inner[0, 0, 0, 0] = 50.0
        state = model.init_state(2)
        entry, norm = memory_sizes(model, state)  # nothing is written yet: this is M_0 alone
        assert entry.tolist() == [50.0, 50.0]
        assert (norm >= 50.0).all()
        state["blocks.0.outer"] = state["blocks.0.outer"].clone()
        state["blocks.0.outer"][1, 0, 0, 0, 0] = -70.0
        assert memory_sizes(model, state)[0].tolist() == [50.0, 70.0]
    literal = build(retain_to="zero")  # where the state holds the memory itself
    entry, _ = memory_sizes(literal, literal.init_state(1))
    largest = max(block.mixer.memory.initial.inner.abs().max().item() for block in literal.blocks)
    assert entry.item() == pytest.approx(largest)


def test_the_probe_sees_errors_beyond_the_bound_and_leaves_no_trace() -> None:
    import nestlearn.memory.mlp as mlp

    original = mlp.mlp_error_surprise
    free, bound = build(write_bound=None, write_scale=1.0), build(write_bound=0.25, write_scale=1.0)
    for model in (free, bound):
        perturb(model, 1.0)
    tokens = stream_bytes("stdlib", 400)
    unbounded = stream(free, tokens, call=400)
    assert unbounded["written"] is None or unbounded["written"] > 1.0
    assert verdict({**unbounded, "bound": 0.25})[0].startswith(("wrote", "not finite"))
    assert stream(bound, tokens, call=400)["written"] == pytest.approx(0.25, rel=1e-4)
    assert mlp.mlp_error_surprise is original
    with pytest.raises(RuntimeError, match="stopped"), WriteProbe().watching(model):
        raise RuntimeError("stopped")
    assert mlp.mlp_error_surprise is original


def test_a_stream_that_breaks_is_told_and_ends() -> None:
    model = build()
    with torch.no_grad():
        model.head.weight[ord("a")] = math.inf
    record = stream(model, stream_bytes("stdlib", 400), call=100)
    assert not record["finite"]
    assert record["tokens"] == 100
    assert "not finite within 100 tokens" in verdict({**record, "bound": 4.0})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"finite": False}, "not finite within 100 tokens"),
        ({"written": 4.1}, "wrote 4.1, beyond the bound 4"),
        ({"written": None}, "wrote None, beyond the bound 4"),
        ({"written": 9.0, "bound": None}, None),
        ({"entry": [1.0, 100.0, 2.0]}, "a memory reached 100"),
        ({"entry": [1.0, None, 2.0]}, "a memory reached inf"),
        ({"writes": 0}, "no written error was seen, so none was checked"),
        ({"state_bytes": [100, 200]}, "the state's size changed: [100, 200]"),
    ],
)
def test_verdicts(changed: dict[str, Any], message: str | None) -> None:
    record = {**GOOD, **changed}
    assert verdict(record) == ([] if message is None else [message])
    line = table([{**record, "job": {"kind": "untrained", "rule": "dgd", "gate": 0.5}, "wrong": verdict(record)}])
    assert (message or "ok") in line.splitlines()[-1]


def test_streams_are_three_and_repeatable(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    found = stream_bytes(str(tmp_path / "short.txt"), 7)
    assert found.shape == (len(STREAMS), 7)
    assert bytes(found[1].tolist()) == b"abcabca"
    assert found[2].unique().numel() == 1
    assert torch.equal(found, stream_bytes(str(tmp_path / "short.txt"), 7))
    assert stream_bytes("stdlib", 2000)[0].unique().numel() == 256


def test_noise_is_relative_to_each_parameter() -> None:
    before, after = build(), build()
    perturb(after, 0.5)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        change = (new - old).square().mean().sqrt().item()
        size = old.square().mean().sqrt().item() or old.shape[-1] ** -0.5
        assert change > 0, name
        if old.numel() > 100:
            assert change == pytest.approx(0.5 * size, rel=0.3), name


def test_trained_models_are_told_apart_by_rule_and_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        Path("a"): build(inner_rule="gd", initial_gate=0.95),
        Path("b"): build(inner_rule="delta"),
        Path("c"): build(mixer="titans"),
    }
    monkeypatch.setattr("nestlearn.evaluation.streaming.load_model", lambda path: (models[path], None))
    common: dict[str, Any] = {"text": "stdlib", "tokens": 9, "call": 3, "noise": 0.5, "seed": 0}
    none: dict[str, Any] = {"rules": [], "gates": [], "kinds": [], "settings": {}}
    jobs = make_jobs(argparse.Namespace(**common, **none, checkpoint=[Path("a"), Path("b")]))
    assert [(job["kind"], job["rule"], job["gate"]) for job in jobs] == [
        ("trained", "gd", 0.95),
        ("trained", "delta", 0.5),
    ]
    assert len({job["name"] for job in jobs}) == 2
    with pytest.raises(ValueError, match=r"--checkpoint c: expected a Hope .* 'titans'"):
        make_jobs(argparse.Namespace(**common, **none, checkpoint=[Path("c")]))
