"""A later stage of training: another run's weights, other chunks, a schedule of its own, and resumable like any run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.checkpoint import checkpoint_path, load_checkpoint
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.loop import _check_resumable, train
from nestlearn.training.plots import read_log
from nestlearn.training.stages import next_stage, start_from

MODEL = {
    "mixer": "tnt",
    "dim": 8,
    "depth": 1,
    "heads": 1,
    "global_chunk_size": 8,
    "global_stride": 2,
    "local_chunk_sizes": [4, 8],
    "shard_length": 8,
    "cms_periods": [1, 3],
}
TRAINING = {"batch_size": 2, "sequence_length": 20, "log_every": 1, "eval_every": 0, "eval_tokens": 40}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [f"Text {i}: " + "what is read is written, " * (1 + i % 5) for i in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def first(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    torch.use_deterministic_algorithms(True)
    training = TrainingConfig(steps=10, warmup=4, lr=1e-2, seed=5, **TRAINING)
    train(RunConfig(model=MODEL, data=DataConfig(text=str(text)), training=training), folder)
    return folder


def second(first: Path, **model: object) -> RunConfig:
    run = next_stage(first, steps=5)
    return RunConfig(model={**run.model, **model}, data=run.data, training=run.training)


def test_the_next_stage_has_the_settings_of_the_first_and_a_schedule_of_its_own(first: Path) -> None:
    run, before = next_stage(first, steps=5), RunConfig.load(first / "config.toml")
    assert (run.model, run.data) == (before.model, before.data)
    changed = {"steps": 5, "warmup": 2, "seed": 6, "start_from": str(first)}
    assert run.to_dict()["training"] == before.to_dict()["training"] | changed


def test_smaller_chunks_start_from_the_weights_of_the_first_stage(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "second"
    result = train(second(first, local_chunk_sizes=[1, 2]), folder)
    assert result.step == 5
    assert "step-00000010.safetensors (step 10); model settings changed: local_chunk_sizes ([4, 8]" in (
        " ".join(capfd.readouterr().err.split())
    )
    facts = json.loads((folder / "run.json").read_text())["started_from"]
    assert facts["step"] == 10
    assert facts["changed"] == {"local_chunk_sizes": [[4, 8], [1, 2]]}
    assert RunConfig.load(folder / "config.toml").model["local_chunk_sizes"] == [1, 2]
    # The loss of its first step is that of the first stage's weights, read with the smaller chunks.
    source, end = load_checkpoint(checkpoint_path(first, 10)), load_checkpoint(checkpoint_path(folder, 5))
    model = HopeLM(HopeConfig.from_dict(end.model))
    told: list[str] = []
    start_from(first, model, end.model, told.append)
    assert len(told) == 1
    assert all(torch.equal(value, source.weights[name]) for name, value in model.state_dict().items())
    untrained = read_log(first / "log.jsonl")[0]["loss"]
    trained = read_log(folder / "log.jsonl")[0]["loss"]
    assert trained < untrained - 0.1
    assert any(not torch.equal(value, source.weights[name]) for name, value in end.weights.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_stage_goes_on_to_the_same_losses(first: Path, tmp_path: Path, step: int) -> None:
    """From its own checkpoint, or, before there is one, from the first stage again."""
    run = second(first, local_chunk_sizes=[1, 2])
    run = RunConfig.from_dict(run.to_dict() | {"training": run.to_dict()["training"] | {"checkpoint_every": 2}})

    def kill(event: dict) -> None:
        if event["event"] == "train" and event["step"] == step:
            raise Killed

    train(run, tmp_path / "whole")
    with pytest.raises(Killed):
        train(run, tmp_path / "killed", on_event=kill)
    train(RunConfig.load(tmp_path / "killed" / "config.toml"), tmp_path / "killed", resume=True)
    losses = [[r["loss"] for r in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    facts = [json.loads((tmp_path / name / "run.json").read_text())["started_from"] for name in ("whole", "killed")]
    assert facts[0] == facts[1]


def test_other_shapes_are_refused_with_the_settings_that_differ(first: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"start_from: .*step-00000010.* differ, first .*down\.weight \(\(8, 16\) there, \(16, 32\) here\)"
        r".*dim \(8 there, 16 here\).*such as local_chunk_sizes",
    ):
        train(second(first, dim=16), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"local_memories\.1.*absent here\).*\(\[4, 8\] there, \[4\] here"):
        train(second(first, local_chunk_sizes=[4]), tmp_path / "fewer")
    with pytest.raises(ValueError, match="mixer"):
        train(second(first, mixer="delta_net"), tmp_path / "other")
    assert not any((tmp_path / name).exists() for name in ("wide", "fewer", "other"))


def test_a_missing_start_is_told_before_the_text_is_read(first: Path, tmp_path: Path) -> None:
    run = second(first).to_dict()
    run["training"]["start_from"] = str(tmp_path / "none")
    run["data"]["text"] = str(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="none"):
        train(RunConfig.from_dict(run), tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        next_stage(empty, steps=1)


def test_a_checkpoint_from_before_a_setting_can_be_resumed(first: Path) -> None:
    """Settings that a checkpoint does not know had their default."""
    found = load_checkpoint(checkpoint_path(first, 10))
    older = {key: value for key, value in found.run["training"].items() if key != "start_from"}
    before = dataclasses.replace(found, run={**found.run, "training": older})
    corpus, run = found.progress["corpus"], RunConfig.from_dict(found.run)
    _check_resumable(before, run, corpus, notice=pytest.fail)
    later = dataclasses.replace(run, training=dataclasses.replace(run.training, start_from="elsewhere"))
    with pytest.raises(ValueError, match=r"training\.start_from \('' in the checkpoint, 'elsewhere' now\)"):
        _check_resumable(before, later, corpus, notice=pytest.fail)
