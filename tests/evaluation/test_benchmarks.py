"""The benchmarks: what they report, and that they give no speed for what is wrong. No test depends on a time."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn import HopeConfig, HopeLM
from nestlearn.evaluation.benchmarks import MIXERS, ModelBenchmark, NotEqual, benchmark_models, check_equality
from nestlearn.evaluation.benchmarks import peak_memory as memory_module
from nestlearn.evaluation.benchmarks import run as run_module
from nestlearn.evaluation.benchmarks.context import context_of, growing_tensors
from nestlearn.evaluation.benchmarks.machine import Machine, Needs, measure_machine
from nestlearn.evaluation.benchmarks.peak_memory import peak_memory
from nestlearn.evaluation.benchmarks.plots import plot_benchmark
from nestlearn.evaluation.benchmarks.settings import Kind, split_models
from nestlearn.evaluation.benchmarks.turns import Progress, timing_row
from nestlearn.evaluation.benchmarks.work import Work, make_work
from nestlearn.layers import DeltaNet, PlainAttention

KINDS: tuple[Kind, ...] = ("train", "prefill", "decode")
SMALL: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "threads": 1, "alternations": 2}
SMALL |= {"batches": (1, 2), "lengths": (8, 20), "turn_tokens": 3, "memory": False}
MACHINE = Machine(product_flops=1e9, batched_flops=1e8, copy_bytes={1: 1e9, 64: 1e8})
TIMING = {"milliseconds", "ratio", "ratio_min", "ratio_max", "gflops_per_second", "seconds"}
TIMING |= {"floor_milliseconds", "floor_set_by", "over_floor"}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second is spent on measuring the machine; one test does."""
    monkeypatch.setattr(run_module, "measure_machine", lambda device: MACHINE)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_equal_to_reading_token_by_token(mixer: str) -> None:
    for kind in ("prefill", "decode"):  # both compare what "train" does, too
        assert 0 <= check_equality(HopeConfig(mixer=mixer), kind, tokens=21) < 1e-9  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"projection_chunk_size": 16}, {"projection_chunk_size": 256}])
def test_settings_are_kept_in_the_small_model(settings: dict[str, Any]) -> None:
    assert check_equality(HopeConfig(momentum=True, **settings), "decode") < 1e-9
    assert check_equality(HopeConfig(gate_hidden_ratio=0.5), "decode") < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_report_has_a_row_for_each_size_and_model(kind: Kind) -> None:
    said: list[str] = []
    saved: list[int] = []
    models = ("self_modifying_titans:momentum=true:chunk_size=8", "plain_attention")
    report = benchmark_models(
        ModelBenchmark(kind=kind, models=models, **SMALL),
        notice=said.append,
        save=lambda report: saved.append(len(report["rows"])),
    )
    assert json.loads(json.dumps(report)) == report
    assert (report["benchmark"], report["complete"], saved) == (kind, True, [3, 6, 9, 12, 12])
    assert [(row["batch"], row["tokens"], row["model"]) for row in report["rows"]] == [
        (batch, tokens, model) for batch in (1, 2) for tokens in (8, 20) for model in ("transformer", *models)
    ]
    for row in report["rows"]:
        assert set(row) >= TIMING | {"tokens_per_second", "microseconds_per_token", "parameters", "equality"}
        read = row["batch"] * (1 if kind == "decode" else row["tokens"])
        assert row["milliseconds"] * row["tokens_per_second"] == pytest.approx(1000 * read)
        assert row["microseconds_per_token"] * read == pytest.approx(1000 * row["milliseconds"])
        assert row["equality"] < 1e-9
        assert len(row["seconds"]) == 2
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["over_floor"] == pytest.approx(row["milliseconds"] / row["floor_milliseconds"])
        if row["model"] == "transformer":
            assert row["ratio_min"] == row["ratio_max"] == 1
        if kind == "decode":
            grows = "attention" in row["model"] or row["model"] == "transformer"
            assert row["state_made_by"] == ("random numbers" if grows else "reading")
            if grows:
                assert row["state_megabytes"] >= 4 * 2 * row["batch"] * row["tokens"] * 16 / 1e6
    assert report["settings"]["lengths"] == [8, 20]
    assert report["environment"]["threads"] == 1
    assert {"commit", "versions", "device"} <= set(report["environment"])
    assert sum("turn" in text for text in said) == 8
    assert "left" in said[-1]


def test_ratios_are_those_of_each_turn() -> None:
    work = Work(step=lambda: None, tokens=1, needs=Needs(linear_flops=1e9, mixer_flops=1e8, bytes=0))
    row = timing_row(work, [4.0, 9.0, 10.0, 8.0, 6.0], [2.0, 3.0, 1.0, 2.0, 1.0], MACHINE)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (4, 2, 10)
    assert row["milliseconds"] == 1000 * statistics.median([4, 9, 10, 8, 6])
    assert (row["floor_milliseconds"], row["floor_set_by"], row["over_floor"]) == (2000, "operations", 4)
    assert row["gflops_per_second"] == pytest.approx(1.1 / 8)


def test_the_floor_is_the_larger_of_computing_and_moving() -> None:
    assert MACHINE.floor(Needs(linear_flops=1e9, mixer_flops=2e8, bytes=1e9)) == (10.0, "bytes")
    assert MACHINE.floor(Needs(linear_flops=1e9, mixer_flops=2e8, bytes=4e6)) == (3.0, "operations")
    # What fits into the caches moves at their speed.
    assert MACHINE.floor(Needs(linear_flops=0, mixer_flops=0, bytes=1e8)) == (0.1, "bytes")
    assert MACHINE.floor(Needs(linear_flops=0, mixer_flops=0, bytes=1e3)) == (1e-6, "bytes")


def test_the_machine_is_measured() -> None:
    machine = measure_machine(torch.device("cpu"), seconds=0.001)
    assert machine.product_flops > 0
    assert machine.batched_flops > 0
    assert min(machine.copy_bytes.values()) > 0
    assert json.loads(json.dumps(machine.to_dict())) == machine.to_dict()


def test_what_a_step_needs() -> None:
    config = HopeConfig.transformer(dim=16, depth=1, heads=2)
    model = HopeLM(config)
    weights, crossing = model.num_parameters(), (16 + 48) + (16 + 16) + (16 + 64) + (64 + 16) + (16 + 256)
    train, prefill = (make_work(kind, model, 2, 10).needs for kind in ("train", "prefill"))
    assert train.linear_flops + train.mixer_flops == pytest.approx(3 * 20 * model.flops_per_token(10))
    assert train.bytes == 4 * (10 * weights + 3 * 20 * crossing)
    assert prefill.linear_flops == 20 * model.linear_flops()
    assert prefill.bytes == 4 * (weights + 20 * crossing)
    decode = make_work("decode", model, 2, 10)
    assert decode.needs.mixer_flops == 2 * 4 * 16 * 11
    position = 2 * 8 * 2  # read and changed
    assert decode.needs.bytes == 4 * weights + 4 * 2 * 2 * 10 * 16 + position


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_context_is_like_one_that_was_read(mixer: str) -> None:
    torch.manual_seed(1)
    model = HopeLM(HopeConfig(mixer=mixer, dim=16, depth=2, heads=2, chunk_size=8)).double()  # type: ignore[arg-type]
    context = context_of(model, 3, 21, room=2)
    with torch.no_grad():
        _, read = model(torch.randint(256, (3, 21)))
        assert {name: (x.dtype, x.ndim, len(x)) for name, x in context.state.items()} == {
            name: (x.dtype, x.ndim, len(x)) for name, x in read.items()
        }
        assert all(torch.equal(x, read[name]) for name, x in context.state.items() if name.endswith("position"))
        token = torch.randint(256, (3,))
        expected, _ = model(token[:, None], context.state)
        logits, state = model.decode_step(token, context.state)
    torch.testing.assert_close(logits, expected[:, 0])
    assert bool(growing_tensors(model)) == (mixer in ("attention", "plain_attention"))
    if context.growing:
        assert context.cache_megabytes == pytest.approx(2 * 2 * 3 * 21 * 16 * 8 / 1e6)
        assert {int(x[0]) for name, x in context.rewound(state).items() if name.endswith("position")} == {21}
        # There was room: decoding did not enlarge the cache.
        assert all(state[name].shape == context.state[name].shape for name in context.growing)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    settings = ModelBenchmark(models=("delta_net",), **{**SMALL, "dim": 64, "memory": True})
    found = peak_memory(settings, "transformer", 8, 512)
    # Logits alone, and their gradient, are 2 x 4.2 MB.
    assert found["growth_megabytes"] is not None
    assert found["peak_megabytes"] is not None
    assert 8 < found["growth_megabytes"] < found["peak_megabytes"]


def test_memory_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"transformer": 10.0, "delta_net": 25.0, "linear_attention": None}
    monkeypatch.setattr(
        run_module, "peak_memory", lambda settings, name, *size: {"growth_megabytes": measured[name]}
    )  # None: the process was killed
    small = {**SMALL, "batches": (1,), "lengths": (8,), "memory": True}
    rows = benchmark_models(ModelBenchmark(models=("delta_net", "linear_attention"), **small))["rows"]
    assert [row["memory_ratio"] for row in rows] == [1.0, 2.5, None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_has_its_memory_measured(kind: Kind) -> None:
    settings = ModelBenchmark(kind=kind, models=("delta_net",), **SMALL)
    assert memory_module.measure_here(settings, "delta_net", 1, 8)["peak_megabytes"] > 0  # type: ignore[operator]


# What is wrong gets no speed.


def depends_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeltaNet.strengths

    def strengths(self: DeltaNet, logits: Tensor | None, like: Tensor) -> Any:
        log_retain, erase, write = honest(self, logits, like)
        return log_retain, erase, write * (1.0 if like.shape[-1] == 1 else 1.001)

    monkeypatch.setattr(DeltaNet, "strengths", strengths)


def blocks_the_gradient_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeltaNet.strengths

    def strengths(self: DeltaNet, logits: Tensor | None, like: Tensor) -> Any:
        log_retain, erase, write = honest(self, logits, like)
        return log_retain, erase, write if like.shape[-1] == 1 else write.detach()

    monkeypatch.setattr(DeltaNet, "strengths", strengths)


def reads_otherwise_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeltaNet.forward

    def forward(self: DeltaNet, x: Tensor, *arguments: Any, **named: Any) -> Any:
        y, state = honest(self, x, *arguments, **named)
        if not torch.is_grad_enabled():
            state = {**state, "memory": state["memory"] * 1.001}
        return y, state

    monkeypatch.setattr(DeltaNet, "forward", forward)


def decodes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PlainAttention.decode_step

    def decode_step(self: PlainAttention, x: Tensor, state: Any) -> Any:
        y, state = honest(self, x, state)
        return y * 1.001, state

    monkeypatch.setattr(PlainAttention, "decode_step", decode_step)


@pytest.mark.parametrize(
    ("spoil", "mixer", "kinds", "named"),
    [
        (depends_on_the_length, "delta_net", KINDS, "logits|memory"),
        (blocks_the_gradient_in_chunks, "delta_net", KINDS, "gradient of"),
        (reads_otherwise_without_gradients, "delta_net", ("prefill", "decode"), "memory|logits"),
        (decodes_otherwise, "plain_attention", ("decode",), "decode_step"),
    ],
)
def test_a_wrong_model_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], mixer: str, kinds: tuple[Kind, ...], named: str
) -> None:
    spoil(monkeypatch)
    timed: list[object] = []
    monkeypatch.setattr(run_module, "_point", lambda *arguments: timed.append(arguments) or [])
    for kind in KINDS:
        settings = ModelBenchmark(kind=kind, models=(mixer,), **SMALL)
        if kind in kinds:
            with pytest.raises(NotEqual, match=rf"({named}).*No speed"):
                benchmark_models(settings)
            assert not timed
        else:
            benchmark_models(settings)
            assert timed
            timed.clear()


def test_the_gate_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_equality(HopeConfig(mixer="linear_attention"))
    assert torch.equal(torch.rand(3), expected)


# Settings and pictures.


def test_models_are_named_with_their_settings() -> None:
    text = "titans, self_modifying_titans:momentum=true:cms_periods=[1,4,16]:write_bound=none:inner_rule=delta"
    benchmark = ModelBenchmark(models=split_models(text), **SMALL)
    assert list(benchmark.configs) == ["transformer", *text.split(", ")]
    config = list(benchmark.configs.values())[2]
    assert config == HopeConfig(
        dim=16, depth=1, heads=2, momentum=True, cms_periods=(1, 4, 16), write_bound=None, inner_rule="delta"
    )
    assert benchmark.configs["transformer"] == HopeConfig.transformer(dim=16, depth=1, heads=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ("hope",)}, "self_modifying_titans.*got 'hope'"),
        ({"models": ("titans", "titans:chunk_size=64")}, "different"),
        ({"models": ()}, "one or more"),
        ({"models": ("titans:chunk_sise=8",)}, "'chunk_sise'.*'chunk_size'"),
        ({"models": ("titans:chunk_size",)}, "mixer:setting=value"),
        ({"models": ("titans:dim=8",)}, "--dim"),
        ({"models": ("self_modifying_titans:momentum=yes",)}, "momentum.*'yes'"),
        ({"models": ("self_modifying_titans:inner_rule=sgd",)}, "'dgd'.*'sgd'"),
        ({"alternations": 0}, "alternations.*got 0"),
        ({"lengths": (1,)}, "lengths"),
        ({"batches": (2, 2)}, "batch"),
        ({"batches": ()}, "batch.*none"),
        ({"turn_tokens": 0}, "turn_tokens"),
        ({"dim": 30, "heads": 4}, "dim"),
        ({"device": "tpu"}, "'tpu'"),
        ({"kind": "chat"}, "train, prefill, decode.*'chat'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelBenchmark(**settings)


def test_progress_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    said: list[str] = []
    progress = Progress(100.0, said.append)
    progress.say("first")
    progress.advance(20.0)
    progress.say("second")
    assert said == ["first", "second; about 2:00 left"]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    report = benchmark_models(replace(ModelBenchmark(models=("delta_net",), **SMALL), lengths=(8,)))
    plot_benchmark(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
