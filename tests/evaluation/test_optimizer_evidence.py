"""The commands that compare optimizers run at their smallest and say what they found."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from nestlearn.evaluation.optimizers import comparison, orthogonal_tasks, toy
from nestlearn.evaluation.optimizers.candidates import CANDIDATES, MOMENTUM, OTHERS_LR, build
from nestlearn.evaluation.optimizers.small_tasks import TASKS, VisionTransformer, read_digits


def run(module, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    module.main()


def in_this_process(work, jobs, folder, *, processes):
    """As `run_jobs`, which has tests of its own."""
    return [{"job": dict(job), **json.loads(json.dumps(work(job))), "seconds": 0.0} for job in jobs]


@pytest.mark.parametrize("task", ["digits", "novels"])
def test_the_comparison_runs(task, tmp_path, data_dir, monkeypatch) -> None:
    monkeypatch.setattr(comparison, "run_jobs", in_this_process)
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    words = ["--task", task, "--scale", "smoke", "--seeds", 2, "--optimizers", "adamw,dgd", "--jobs", 1]
    words += ["--out", tmp_path / "t", "--runs", tmp_path / "runs"]
    run(comparison, monkeypatch, *words)
    page = (tmp_path / "t.md").read_text()
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "t.json").read_text())
    assert len(report["tuning"]) == sum(len(CANDIDATES[name].rates) for name in ("adamw", "dgd"))
    assert [r["job"]["optimizer"] for r in report["runs"]] == ["adamw", "dgd"] * 2
    for record in report["runs"]:
        assert [point["step"] for point in record["curve"]] == [2, 4]
        assert all(math.isfinite(point["loss"]) for point in record["curve"])
        assert record["job"]["lr"] in CANDIDATES[record["job"]["optimizer"]].rates
    assert "| adamw" in page


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_moves_every_parameter(name: str) -> None:
    if name == "adamuon":
        pytest.importorskip("pytorch_optimizer", reason="AdaMuon comes with the extra `baselines`")
    torch.manual_seed(0)
    model = VisionTransformer(side=8, patch=4, dim=16, depth=1, heads=2, classes=10)
    before = [p.detach().clone() for p in model.parameters()]
    together = build(name, model, CANDIDATES[name].rates[0])
    for _ in range(2):
        together.zero_grad()
        model(torch.randn(5, 8, 8)).logsumexp(-1).square().mean().backward()
        together.step(0.5)
    for (own, parameter), start in zip(model.named_parameters(), before, strict=True):
        if own != "blocks.0.key.bias":  # moves no output, so its gradient is rounding
            assert not torch.equal(parameter, start), own
        assert bool(parameter.isfinite().all())
    rates = {group["lr"] for optimizer in together.optimizers for group in optimizer.param_groups}
    assert 0.5 * CANDIDATES[name].rates[0] in rates
    with pytest.raises(ValueError, match="expected some of adamw, muon"):
        build("lion", model, 1e-3)


@pytest.mark.parametrize("task", ["digits", "novels"])
def test_descent_moves_what_delta_gradient_descent_moves(task, data_dir, monkeypatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    model = TASKS[task]({**comparison.SETTINGS["smoke"][task], "seed": 0}).model
    found = []
    for name in ("sgd", "dgd"):
        linear = set()
        for optimizer in build(name, model, 0.25).optimizers:
            for group in optimizer.param_groups:
                assert group["weight_decay"] == 0.0
                assert group["lr"] == (0.25 if group["lr"] == 0.25 else OTHERS_LR)
                if group["lr"] == 0.25:
                    assert group["momentum"] == MOMENTUM
                    linear |= set(group["params"])
        found.append(linear)
    assert found[0] == found[1] != set()


def test_a_run_that_diverges_is_a_result() -> None:
    curve = [{"step": 10, "loss": 2.0, "seconds": 1.0}, {"step": 20, "loss": 1.0, "seconds": 3.0}]
    good = {"curve": curve, "diverged": None, "job": {"optimizer": "adamw", "lr": 0.1, "seed": 0}, "unit": "nats"}
    bad = {**good, "diverged": 15, "job": {"optimizer": "m3", "lr": 0.1, "seed": 0}}
    assert comparison.best_rates([bad, good]) == {"adamw": 0.1, "m3": 0.1}
    assert "1 diverged" in comparison.table([good, bad], [])
    muon = {**good, "job": {"optimizer": "muon", "lr": 0.1, "seed": 0}, "curve": [curve[0], {**curve[1], "loss": 1.5}]}
    other = {**good, "job": {"optimizer": "adamw", "lr": 0.1, "seed": 1}}  # without a partner
    row = next(line for line in comparison.table([good, other, muon], []).splitlines() if line.startswith("| adamw"))
    assert [cell.strip() for cell in row.split("|")][8] == "15"  # half-way from 2 to 1
    lost = comparison.table([good, {**muon, "diverged": 3}], []).splitlines()
    assert next(line for line in lost if line.startswith("| adamw")).split("|")[8].strip() == "–"
    assert comparison.reached(good, 1.5) == (15.0, 2.0)
    assert comparison.reached(good, 2.5) == (10, 1.0)
    assert comparison.reached(good, 0.5) is None


def test_digits_are_read(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    images, labels = read_digits()
    assert images.shape == (10000, 28, 28)
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir.parent))
    with pytest.raises(FileNotFoundError):
        read_digits()


def test_orthogonal_tasks_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(orthogonal_tasks, "run_jobs", in_this_process)
    words = ["--scale", "smoke", "--seeds", 2, "--optimizers", "sgd;dgd", "--jobs", 1]
    run(orthogonal_tasks, monkeypatch, *words, "--out", tmp_path / "t", "--runs", tmp_path / "runs")
    report = json.loads((tmp_path / "t.json").read_text())
    assert len(report["runs"]) == 2 * 2 * 2
    assert len(report["tuning"]) == 2 * sum(len(orthogonal_tasks.OPTIMIZERS[name][1]) for name in ("sgd", "dgd"))
    assert "## two layers" in (tmp_path / "t.md").read_text()
    assert (tmp_path / "t.png").exists()


@pytest.mark.parametrize("network", orthogonal_tasks.NETWORKS)
@pytest.mark.parametrize("name", orthogonal_tasks.OPTIMIZERS)
def test_every_optimizer_learns_its_tasks(name: str, network: str) -> None:
    job = {"dim": 8, "tasks": 2, "steps": 3, "seed": 0, "network": network, "optimizer": name}
    found = orthogonal_tasks.learn_tasks({**job, "lr": orthogonal_tasks.OPTIMIZERS[name][1][0]})
    assert len(found["end"]) == len(found["learnt"]) == 2
    assert all(math.isfinite(error) for error in found["end"])


def test_a_linear_map_under_plain_descent_forgets_nothing() -> None:
    """Gradients lie in the subspace of the task, so without a memory of older ones nothing else moves."""
    sizes = {"dim": 16, "tasks": 2, "steps": 30, "seed": 0, "network": "linear"}
    descent = orthogonal_tasks.learn_tasks({**sizes, "optimizer": "sgd", "lr": 1.0})
    momentum = orthogonal_tasks.learn_tasks({**sizes, "optimizer": "momentum 0.99", "lr": 0.3})
    assert orthogonal_tasks.forgotten(descent) == pytest.approx(0, abs=1e-6)
    assert abs(orthogonal_tasks.forgotten(momentum)) > 1e-3
    assert orthogonal_tasks.final_error(descent) < 0.9
    assert orthogonal_tasks.learn_tasks({**sizes, "optimizer": "sgd", "lr": 1e4})["end"] is None


def test_the_toy_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(toy, "RATES", (1e-2,))
    small = {
        name: (make, {key: values[:2] for key, values in own.items()}) for name, (make, own) in toy.OPTIMIZERS.items()
    }
    monkeypatch.setattr(toy, "OPTIMIZERS", small)
    monkeypatch.setitem(toy.compare.__kwdefaults__, "names", ("momentum", "delta momentum"))
    run(toy, monkeypatch, "--steps", 20, "--seeds", 1, "--out", tmp_path / "t")
    assert set(json.loads((tmp_path / "t.json").read_text())["optimizers"]) == {"momentum", "delta momentum"}
    assert (tmp_path / "t.png").exists()


def test_steps_in_the_valley_are_counted_from_the_end() -> None:
    path = [(0.0, 0.0, value) for value in (5.0, 1e-5, 2.0, 1e-4, 1e-4)]
    assert toy.steps_needed(path, 4) == 3
    assert toy.steps_needed(path, 5) == math.inf
    assert float(toy.psi(torch.zeros(2))) == 0.0
    r, theta = torch.tensor([0.5, -0.25])
    expected = r**2 + 5 * (r - theta + torch.sin(2 * r)) ** 2
    torch.testing.assert_close(toy.psi(torch.stack([r, theta])), expected)
