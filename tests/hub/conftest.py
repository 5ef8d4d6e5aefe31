"""A run of `nestlearn train`, small enough for every test to have."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with byte tokens."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "story.txt"
    text.write_text("".join(f"{number} cats sat on the mat, and {number} dogs did not.\n\n" for number in range(400)))
    train(
        RunConfig(
            model={"dim": 32, "depth": 2, "heads": 2},
            data=DataConfig(text=str(text), held_out=str(text)),
            training=TrainingConfig(
                steps=8, batch_size=4, sequence_length=64, lr=5e-3, warmup=2, eval_tokens=1024, device="cpu"
            ),
        ),
        folder / "run",
    )
    return folder / "run"


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a folder of transformers."""
    from nestlearn.hub import export

    return export(run, tmp_path_factory.mktemp("exported") / "cats", license="cc-by-4.0")
