"""Runs under the optimizers of `nestlearn.optim`: they learn, keep to the levels, and resume bit for bit."""

import json
import shutil

import pytest
import torch

from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.checkpoint import checkpoint_path, load_checkpoint
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.loop import train
from nestlearn.training.optimizers import build_optimizer
from nestlearn.training.plots import read_log

SETTINGS = {
    "adamw": {"lr": 0.01},
    "m3": {"lr": 0.01},
    "dgd": {"lr": 0.1, "others_lr": 0.01, "weight_decay": 0.0},
}


def make_run(path, **training):
    documents = ["abcab" * (1 + i % 7) for i in range(100)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    defaults = {"steps": 12, "batch_size": 4, "sequence_length": 12, "warmup": 2, "log_every": 1, "eval_every": 6}
    defaults |= {"eval_tokens": 48, "checkpoint_every": 5, "keep_checkpoints": 0, "device": "cpu"}
    return RunConfig(
        model={"dim": 16, "depth": 1, "heads": 1, "chunk_size": 4, "cms_periods": [1, 3]},
        data=DataConfig(text=str(path)),
        training=TrainingConfig(**{**defaults, **training}),
    )


def weights(folder, step):
    return load_checkpoint(checkpoint_path(folder, step)).weights


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_learns_and_resumes_bitwise(name, tmp_path):
    run = make_run(tmp_path / "text.jsonl", optimizer=name, **SETTINGS[name])
    train(run, tmp_path / "whole")
    rows = [row["loss"] for row in read_log(tmp_path / "whole" / "log.jsonl") if row["event"] == "train"]
    assert rows[-1] < rows[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (10, 12):
        checkpoint_path(tmp_path / "cut", step).unlink()
    train(run, tmp_path / "cut", resume=True)
    whole, cut = (weights(tmp_path / folder, 12) for folder in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_optimizers_differ_and_accumulation_does_not(tmp_path):
    found = {}
    for name in SETTINGS:
        for accumulate in (1, 2):
            run = make_run(tmp_path / "text.jsonl", optimizer=name, accumulate=accumulate, precision="fp64",
                           **SETTINGS[name])  # fmt: skip
            train(run, tmp_path / f"{name}{accumulate}")
            found[name, accumulate] = weights(tmp_path / f"{name}{accumulate}", 12)
    for name in SETTINGS:
        for key, value in found[name, 1].items():
            torch.testing.assert_close(value, found[name, 2][key], rtol=1e-6, atol=1e-8)
    key = "blocks.0.memory_system.levels.0.up.weight"
    assert not torch.allclose(found["m3", 1][key], found["adamw", 1][key])
    assert not torch.allclose(found["dgd", 1][key], found["adamw", 1][key])


def test_what_is_left_to_adamw_has_a_rate_of_its_own():
    model = HopeLM(HopeConfig(vocab_size=16, dim=16, depth=1, heads=2))
    said: list[str] = []
    for name in ("m3", "dgd"):
        config = TrainingConfig(optimizer=name, lr=0.1, others_lr=0.02)
        optimizer = build_optimizer(model, config, said.append)
        ratios = {group["rule"]: group.get("lr_ratio") for group in optimizer.param_groups}
        assert ratios == {name: None, "adamw": pytest.approx(0.2)}
    assert len(said) == 1
    assert "embedding" in said[0]
