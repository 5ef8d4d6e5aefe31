"""`nestlearn demo` at a small size: all that it promises is there, and a second call goes on with the first."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from house import ROOT
from nestlearn import HopeConfig
from nestlearn.cli import demonstration, main
from nestlearn.evaluation.compression import xz_bits_per_byte
from nestlearn.evaluation.matching import count_parameters
from nestlearn.training.config import RunConfig
from nestlearn.training.data import IGNORED, ByteTokenizer, PackedTokens

SIZE = {"dim": 16, "depth": 2, "heads": 2, "chunk_size": 8}
WORDS = ["the", "memory", "writes", "itself", "while", "it", "reads", "and", "forgets", "what", "nobody", "needs"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A demo of a few steps; returns a corpus for it."""
    honest = demonstration.demo_run

    def run(text: str, *, steps: int, seed: int, threads: int) -> RunConfig:
        whole = honest(text, steps=steps, seed=seed, threads=1)
        training = dataclasses.replace(
            whole.training, batch_size=2, sequence_length=32, eval_every=2, checkpoint_every=2, eval_tokens=320
        )
        return dataclasses.replace(whole, model=SIZE, training=training)

    monkeypatch.setattr(demonstration, "demo_run", run)
    monkeypatch.setattr(demonstration, "CONTINUATION", 12)
    monkeypatch.setattr(demonstration, "LOOK", 40)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(80)))
    return folder


def demo(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["nestlearn", "demo", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_demo_shows_what_it_promises(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    command = ["--out", out, "--text", small, "--steps", 4, "--prompt", "the memory"]
    assert demo(monkeypatch, *command) == 0
    said, progress = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    hope, transformer = report["models"]["Hope"], report["models"]["Transformer"]
    for number in (hope["bits_per_byte"], transformer["bits_per_byte"], report["xz"]["bits_per_byte"]):
        assert f"│ {number:13.3f} │" in said
    assert "the memory" + report["continuation"][:5] in said
    for name in ("loss.png", "levels.png", "memories.png", "report.json"):
        assert str(out / name) in said
        assert (out / name).exists()
    assert hope["checkpoint"] in said
    assert Path(hope["checkpoint"]).is_file()
    # What it trains on, and how much.
    assert str(small) in progress
    assert report["training_tokens"] == 4 * 2 * 32
    assert f"{4 * 2 * 32:,} bytes" in progress
    # Equal size, to half a hidden unit of the Transformer's MLPs.
    assert abs(hope["parameters"] - transformer["parameters"]) <= SIZE["dim"] * SIZE["depth"]

    # The same command again trains nothing, and more steps go on. (Pictures take most of the time here.)
    monkeypatch.setattr(demonstration, "has_memories", lambda model: False)
    files = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert demo(monkeypatch, *command) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == files
    assert json.loads((out / "report.json").read_text())["models"] == report["models"]
    assert demo(monkeypatch, *command[:-3], 6) == 0
    steps = [json.loads(line)["step"] for line in (out / "hope" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 6
    capsys.readouterr()
    assert demo(monkeypatch, *command, "--seed", 3) == 2
    said = capsys.readouterr().err
    assert "training.seed" in said
    assert "give another --out" in said


def test_xz_gets_the_very_bytes_that_the_models_get(small: Path) -> None:
    run = demonstration.demo_run(str(small), steps=3, seed=0, threads=1)
    sides = demonstration._read(run)
    found = demonstration.compress_same_text(run, sides)
    training, held_out = (PackedTokens.from_texts(side, ByteTokenizer(), sequence_length=32) for side in sides)
    seen = b"".join(bytes(row) for step in range(3) for row in training.batch(step, 2).tokens.tolist())
    predicted = b""
    for batch in held_out.evaluation_batches(1, 320):
        predicted += bytes(token for token in batch.targets.flatten().tolist() if token != IGNORED)
    assert found == xz_bits_per_byte(seen, predicted)
    assert found.priming_bytes == 3 * 2 * 32
    # A run that reads everything primes xz with everything.
    longer = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=10_000))
    assert demonstration.compress_same_text(longer, sides).priming_bytes == training.documents.num_bytes


def test_demo_does_not_touch_another_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text("[model]\n")
    assert demo(monkeypatch, "--out", tmp_path, "--text", small) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert not (tmp_path / "hope").exists()


def test_the_run_files_are_runs_and_the_demo_is_one_of_them() -> None:
    found = {path.name: RunConfig.load(path) for path in (ROOT / "configs").glob("*.toml")}
    assert found["demo.toml"] == demonstration.demo_run()
    for run in found.values():
        settings = dict(run.model)
        assert count_parameters(HopeConfig.preset(settings.pop("preset"), **settings)) > 100_000
