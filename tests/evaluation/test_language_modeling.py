"""The comparison of language models: equal sizes, pairs, honest tables, runs that go on."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import nestlearn.evaluation.language_modeling as language_modeling
from nestlearn.evaluation.jobs import Job, Record
from nestlearn.evaluation.language_modeling import (
    MODELS,
    choose_rates,
    comparison_table,
    main,
    make_job,
    model_config,
    parse_rates,
    parse_settings,
    train_one,
)
from nestlearn.evaluation.matching import count_parameters, match_parameters
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.config import DataConfig, TrainingConfig

TINY = {"dim": 16, "depth": 1, "heads": 2, "chunk_size": 8}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_equal_size_to_half_a_unit_of_width(name: str) -> None:
    sizes = {"dim": 48, "depth": 2, "heads": 3}
    target = count_parameters(model_config("hope", **sizes))
    config = model_config(name, target=target, **sizes)
    levels = len(config.cms_periods)
    assert abs(HopeLM(config).num_parameters() - target) <= 48 * 2 * levels
    changed = {key for key, value in config.to_dict().items() if value != model_config(name, **sizes).to_dict()[key]}
    assert changed <= {"cms_expansion"}


def test_matching_hits_every_reachable_size_and_refuses_the_others() -> None:
    config = HopeConfig(**TINY)
    for expansion in (1 / 16, 1.0, 37 / 16, 10.0):
        wanted = HopeConfig(**TINY, cms_expansion=expansion)
        assert match_parameters(config, count_parameters(wanted)) == wanted
    with pytest.raises(ValueError, match=r"of width 16 and depth 1 has at least [\d,]+ parameters, got a target of 50"):
        match_parameters(config, 50)
    with pytest.raises(ValueError, match=r"models: expected some of hope, .*; got 'mamba'"):
        model_config("mamba")


def test_rates_and_settings_are_read() -> None:
    assert parse_rates("2e-3", ["a", "b"]) == {"a": 2e-3, "b": 2e-3}
    assert parse_rates("a=1e-3,4e-3", ["a", "b"]) == {"a": 1e-3, "b": 4e-3}
    with pytest.raises(ValueError, match="'c' is not among the models a, b"):
        parse_rates("c=1e-3", ["a", "b"])
    with pytest.raises(ValueError, match="no learning rate for b"):
        parse_rates("a=1e-3", ["a", "b"])
    settings = parse_settings(["chunk_size=16", "a:read=previous", "a:cms_periods=[1, 2]"], ["a", "b"])
    assert settings == {
        "a": {"chunk_size": 16, "read": "previous", "cms_periods": [1, 2]},
        "b": {"chunk_size": 16},
    }
    with pytest.raises(ValueError, match="expected key=value or model:key=value, got 'chunk_size'"):
        parse_settings(["chunk_size"], ["a"])
    with pytest.raises(ValueError, match="'c' is not among the models a"):
        parse_settings(["c:chunk_size=1"], ["a"])


def record(model: str, seed: int, bits: float, *, lr: float = 1e-3, diverged: str | None = None) -> Record:
    curve = [{"step": 1, "tokens": 50, "loss": 3.0, "bits_per_byte": 4.0}]
    return {
        "job": {"model": model, "seed": seed, "lr": lr},
        "parameters": 12345,
        "train": [{"step": 2, "tokens": 100, "loss": bits / 2, "seconds": 2.0}],
        "held_out": [*curve, {"step": 2, "tokens": 100, "loss": 2.0, "bits_per_byte": bits}],
        "diverged": diverged,
    }


def test_the_table_pairs_seeds() -> None:
    records = [record("hope", 0, 2.0), record("hope", 1, 3.0), record("titans", 1, 3.1), record("titans", 0, 2.3)]
    lines = comparison_table(records, "hope").splitlines()
    hope, titans = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    # Means 2.5 and 2.7; the seeds differ by 1 among themselves, yet the pairs by 0.3 and 0.1: 0.2 +- 0.1.
    assert hope == ["hope", "12,345", "0.001", "2", "2.5000 ± 0.5000", "–", "1.250 ± 0.250", "100", "50"]
    assert titans[4:6] == ["2.7000 ± 0.4000", "+0.2000 ± 0.1000"]
    single = comparison_table(records[:1], "hope").splitlines()[2]
    assert "| 2.0000 " in single
    assert "±" not in single


def test_a_run_that_diverged_has_no_mean_and_is_never_chosen() -> None:
    bad = record("titans", 0, 1.0, lr=1e-2, diverged="step 3: the loss is nan")
    lines = comparison_table([record("hope", 0, 2.0), bad, record("titans", 1, 2.0)], "hope").splitlines()
    assert "diverged in 1" in lines[3]
    assert choose_rates([bad, record("titans", 0, 5.0, lr=1e-3), record("titans", 0, 4.0, lr=2e-3)]) == {"titans": 2e-3}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [{"text": f"{number} squared is {number * number}. " * 20} for number in range(30)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_job_trains_once_and_goes_on_where_it_was(text: Path, tmp_path: Path) -> None:
    data = DataConfig(text=str(text))
    training = {"batch_size": 2, "sequence_length": 32, "log_every": 1, "eval_every": 2, "eval_tokens": 256,
                "checkpoint_every": 2, "threads": 1, "device": "cpu", "warmup": 1}  # fmt: skip
    job = make_job("hope", HopeConfig(**TINY), data, TrainingConfig(steps=4, **training), tmp_path)
    other = make_job("hope", HopeConfig(**TINY), data, TrainingConfig(steps=4, seed=1, **training), tmp_path)
    assert job["name"] != other["name"]
    assert job == json.loads(json.dumps(job))  # a job can be sent to another process
    whole = train_one(job)
    assert [row["step"] for row in whole["train"]] == [1, 2, 3, 4]
    assert [row["step"] for row in whole["held_out"]] == [2, 4]
    assert whole["diverged"] is None
    assert whole["parameters"] == HopeLM(HopeConfig(**TINY)).num_parameters()
    assert train_one(job) == whole
    # Cut back to its second step, the run goes on to the same numbers.
    folder = Path(job["folder"])
    log = (folder / "log.jsonl").read_text(encoding="utf-8")
    again = train_one({**job, "folder": str(tmp_path / "again")})
    assert [row["loss"] for row in again["train"]] == [row["loss"] for row in whole["train"]]
    assert (folder / "log.jsonl").read_text(encoding="utf-8") == log


def test_the_command_writes_tables_and_curves(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(work: Callable[[Job], Record], jobs: Iterable[Job], folder: Path, *, processes: int) -> Any:
        return [{"job": dict(job), **work(job)} for job in jobs]

    monkeypatch.setattr(language_modeling, "run_jobs", in_this_process)
    options = {
        "--text": text,
        "--models": "hope,transformer",
        "--seeds": "0,1",
        "--steps": 3,
        "--batch-size": 2,
        "--sequence-length": 32,
        "--dim": 16,
        "--depth": 1,
        "--heads": 2,
        "--set": "chunk_size=8",
        "--tune": "1e-3,1e-2",
        "--tune-steps": 1,
        "--eval-tokens": 256,
        "--out": tmp_path / "results" / "tiny",
        "--runs": tmp_path / "runs",
    }
    monkeypatch.setattr(sys, "argv", ["x", *(str(part) for pair in options.items() for part in pair)])
    main()
    page = (tmp_path / "results" / "tiny.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| transformer |" in page
    assert "the best of 0.001, 0.01 for each model" in page
    results = json.loads((tmp_path / "results" / "tiny.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 4
    assert len(results["tuning"]) == 4
    counts = {run["parameters"] for run in results["runs"]}
    assert max(counts) - min(counts) <= 2 * 16
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 10_000
