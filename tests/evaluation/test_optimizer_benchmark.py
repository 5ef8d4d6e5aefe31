"""The benchmark of optimizers: what it reports, and that it gives no speed for one that is wrong."""

import json
from typing import Any

import pytest
import torch

from nestlearn import HopeConfig
from nestlearn.evaluation.benchmarks import NotEqual
from nestlearn.evaluation.benchmarks import optimizers as module
from nestlearn.evaluation.benchmarks import run as run_module
from nestlearn.evaluation.benchmarks.machine import Machine
from nestlearn.evaluation.benchmarks.optimizers import (
    BASELINE,
    OPTIMIZERS,
    TRAININGS,
    OptimizerBenchmark,
    benchmark_optimizers,
    check_delta_gradient_descent,
    check_optimizer,
)
from nestlearn.optim import LevelOptimizer, delta_gradient_descent

SMALL: dict[str, Any] = {"depth": 1, "heads": 1, "dims": (8, 16), "alternations": 2, "turn_steps": 4, "threads": 1}
SMALL |= {"training_batch": 1, "training_tokens": 8, "training_steps": 1}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(product_flops=1e9, batched_flops=1e9, copy_bytes={1: 1e9})
    monkeypatch.setattr(run_module, "measure_machine", lambda device: machine)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_a_saved_state(name: str) -> None:
    check_optimizer(name, HopeConfig(cms_periods=(1, 4)))


def test_report_has_a_row_for_each_width_and_optimizer() -> None:
    said: list[str] = []
    report = benchmark_optimizers(OptimizerBenchmark(**SMALL), notice=said.append)
    assert json.loads(json.dumps(report)) == report
    assert [(row["dim"], row["optimizer"]) for row in report["rows"]] == [
        (dim, name) for dim in (8, 16) for name in (*OPTIMIZERS, *TRAININGS)
    ]
    for row in report["rows"]:
        if row.get("training"):
            assert row["state_floats"] == 0  # what was gathered is gone with the step
            continue
        assert row["nanoseconds"] * row["parameters"] == pytest.approx(1e6 * row["milliseconds"])
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["floor_milliseconds"] == pytest.approx(1000 * 28 * row["parameters"] / 1e9)
        # Two moments a parameter, with M3 four a matrix; levels also hold gradients that wait for their step.
        moments = 8 * row["parameters"] / 1e6
        assert moments <= row["state_megabytes"] < moments * (1.1 if "adamw" in row["optimizer"] else 2.0)
        assert row["state_floats"] == (4 if row["optimizer"] == "m3" else 2)
    by_name = {row["optimizer"]: row for row in report["rows"]}
    assert by_name["m3"]["bare_ratio_min"] <= by_name["m3"]["bare_ratio"] <= by_name["m3"]["bare_ratio_max"]
    assert by_name["sgd"]["ratio"] == 1.0
    assert by_name["level"]["state_megabytes"] > by_name[BASELINE]["state_megabytes"]
    assert sum("turn" in text for text in said) == 8


def test_an_optimizer_that_forgets_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: LevelOptimizer, state: Any) -> None:
        state = {**state, "levels": {**state["levels"], "means": {}, "counts": {}}}
        honest(self, state)

    honest = LevelOptimizer.load_state_dict
    monkeypatch.setattr(LevelOptimizer, "load_state_dict", forgetful)
    monkeypatch.setattr(module, "_point", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(NotEqual, match=r"level.*No speed"):
        benchmark_optimizers(OptimizerBenchmark(**SMALL))


def test_a_delta_gradient_descent_that_is_wrong_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_delta_gradient_descent()
    honest = delta_gradient_descent.delta_step
    monkeypatch.setattr(
        delta_gradient_descent, "delta_step", lambda w, g, gram, **own: honest(w, g, 1.01 * gram, **own)
    )
    monkeypatch.setattr(module, "_point", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(NotEqual, match=r"dgd.*No speed"):
        benchmark_optimizers(OptimizerBenchmark(**SMALL))


def test_an_optimizer_that_diverges_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "wild", lambda model: torch.optim.SGD(model.parameters(), lr=float("inf")))
    with pytest.raises(NotEqual, match=r"wild.*not finite"):
        check_optimizer("wild", HopeConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizers": ("sgd",)}, "adamw_fused, level.*'sgd'"),
        ({"optimizers": ("level", "level")}, "different"),
        ({"dims": ()}, "dims.*none"),
        ({"turn_steps": 0}, "turn_steps"),
        ({"training_tokens": 1}, "training_tokens"),
        ({"model": "hope"}, "'hope'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerBenchmark(**settings)
