"""The benchmark of training: what it reports, and that it gives no speed for a model that is wrong."""

import json

import pytest
import torch
from torch import Tensor

from nestlearn import HopeConfig
from nestlearn.evaluation import benchmark
from nestlearn.evaluation.benchmark import MIXERS, NotEqual, TrainingBenchmark, benchmark_training, check_equality
from nestlearn.layers import DeltaNet

SMALL = {"dim": 16, "depth": 1, "heads": 2, "batch": 2, "lengths": (16, 40), "threads": 1}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_reads_a_whole_as_its_tokens(mixer: str) -> None:
    assert 0 < check_equality(HopeConfig(mixer=mixer)) < 1e-9


@pytest.mark.parametrize("settings", [{"projection_chunk_size": 16}, {"projection_chunk_size": 256}, {"read": "chunk"}])
def test_settings_are_kept_in_the_small_model(settings: dict) -> None:
    assert check_equality(HopeConfig(momentum=True, **settings)) < 1e-9
    assert check_equality(HopeConfig.paper()) < 1e-9


def test_report_has_a_row_for_each_model_and_length() -> None:
    said: list[str] = []
    report = benchmark_training(
        TrainingBenchmark(mixers=("delta_net", "plain_attention"), alternations=3, **SMALL), notice=said.append
    )
    assert json.loads(json.dumps(report)) == report
    assert [(row["model"], row["tokens"]) for row in report["rows"]] == [
        (model, tokens) for tokens in (16, 40) for model in ("transformer", "delta_net", "plain_attention")
    ]
    for row in report["rows"]:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["milliseconds"] * row["tokens_per_second"] == pytest.approx(1000 * 2 * row["tokens"])
        assert row["gflops_per_second"] > 0
        assert row["equality"] < 1e-9
        if row["model"] == "transformer":
            assert row["ratio_min"] == row["ratio_max"] == 1
    assert report["settings"]["lengths"] == [16, 40]
    assert report["environment"]["threads"] == 1
    assert {"commit", "versions", "device"} <= set(report["environment"])
    assert sum("turn" in text for text in said) == 6


def test_a_wrong_model_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeltaNet.strengths

    def depends_on_the_length(self: DeltaNet, logits: Tensor | None, like: Tensor):
        log_retain, erase, write = honest(self, logits, like)
        return log_retain, erase, write * (1.0 if like.shape[-1] == 1 else 1.001)

    monkeypatch.setattr(DeltaNet, "strengths", depends_on_the_length)
    timed: list[object] = []
    monkeypatch.setattr(benchmark, "_time", lambda *arguments: timed.append(arguments) or [])
    with pytest.raises(NotEqual, match=r"delta_net.*No speed"):
        benchmark_training(TrainingBenchmark(mixers=("linear_attention", "delta_net"), **SMALL))
    assert not timed
    benchmark_training(TrainingBenchmark(mixers=("linear_attention",), **SMALL))
    assert timed


def test_a_wrong_gradient_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeltaNet.strengths

    def blocks_the_gradient_in_chunks(self: DeltaNet, logits: Tensor | None, like: Tensor):
        log_retain, erase, write = honest(self, logits, like)
        return log_retain, erase, write if like.shape[-1] == 1 else write.detach()

    monkeypatch.setattr(DeltaNet, "strengths", blocks_the_gradient_in_chunks)
    with pytest.raises(NotEqual, match="gradient of"):
        check_equality(HopeConfig(mixer="delta_net"))


def test_check_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_equality(HopeConfig(mixer="linear_attention"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixers": ("hope",)}, "self_modifying_titans.*got 'hope'"),
        ({"mixers": ("titans", "titans")}, "different"),
        ({"mixers": ()}, "one or more"),
        ({"alternations": 0}, "alternations.*got 0"),
        ({"lengths": (1,)}, "lengths"),
        ({"dim": 30}, "dim"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingBenchmark(**settings)
