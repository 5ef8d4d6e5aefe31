"""Two processes compute what one computes, to rounding."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from nestlearn.training.checkpoint import checkpoint_path, load_checkpoint
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.distributed import Processes, data_parallel, join_processes, synchronised, without_data_parallel
from nestlearn.training.loop import train
from nestlearn.training.plots import read_log

SCRIPT = textwrap.dedent("""
    import json, os, sys, torch
    torch.set_num_threads(1)
    from nestlearn.training.config import RunConfig
    from nestlearn.training.loop import train
    runs, folder = json.loads(sys.argv[1]), sys.argv[2]
    written = []
    for name, run, resume in runs:
        result = train(RunConfig.from_dict(run), os.path.join(folder, name), resume=resume, on_event=written.append)
    said = {"rank": os.environ["RANK"], "events": len(written), "held_out": result.held_out.loss}
    with open(os.path.join(folder, "rank" + said["rank"]), "w") as file:
        json.dump(said, file)
""")


def make_run(path, **training):
    # Short documents: the processes have different numbers of valid targets in every step.
    documents = [str(i) + "abcdefghij"[: (i * i) % 10] for i in range(300)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    settings = {"steps": 5, "batch_size": 8, "accumulate": 2, "sequence_length": 9, "warmup": 1, "lr": 0.01}
    settings |= {"log_every": 1, "eval_every": 2, "eval_tokens": 63, "precision": "fp64", "device": "cpu"}
    return RunConfig(
        model={"dim": 8, "depth": 1, "heads": 1, "chunk_size": 4, "cms_periods": [1, 2]},
        data=DataConfig(text=str(path)),
        training=TrainingConfig(**{**settings, "checkpoint_every": 2, "keep_checkpoints": 0, **training}),
    )


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path):
    run = make_run(tmp_path / "text.jsonl")
    # The second call goes on with a finished run: it reads the checkpoint in both processes and changes nothing.
    runs = [("two", run.to_dict(), False), ("two", run.to_dict(), True)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*launcher, str(script), json.dumps(runs), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert [one["events"] > 0 for one in said] == [True, False]  # only the first process writes
    train(run, tmp_path / "one")

    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [(r["event"], r["step"]) for r in one] == [(r["event"], r["step"]) for r in two]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-11)
    assert [r["grad_norm"] for r in two if "grad_norm" in r] == pytest.approx(
        [r["grad_norm"] for r in one if "grad_norm" in r], rel=1e-10
    )
    assert said[0]["held_out"] == pytest.approx(one[-1]["loss"], rel=1e-11)
    a, b = (load_checkpoint(checkpoint_path(tmp_path / name, 5)) for name in ("one", "two"))
    for name in a.weights:
        torch.testing.assert_close(a.weights[name], b.weights[name], rtol=1e-7, atol=1e-9)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["sessions"][0]["processes"] == 2


def test_one_process_needs_no_process_group():
    with join_processes("cpu") as processes:
        assert processes == Processes(rank=0, world_size=1, device=torch.device("cpu"))
        assert processes.is_main
        assert processes.sum(1, 2.5) == [1, 2.5]
        module = nn.Linear(1, 1)
        assert data_parallel(module, processes) is module
        assert without_data_parallel(module) is module
        with synchronised(module, last=False):
            pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device: .*{device}"), join_processes(device):
        pass


def test_a_batch_that_does_not_divide(tmp_path, monkeypatch):
    run = make_run(tmp_path / "text.jsonl", batch_size=6)
    monkeypatch.setattr("nestlearn.training.loop.join_processes", lambda device: _two())
    with pytest.raises(ValueError, match=r"accumulate x processes = 2 x 2, got 6"):
        train(run, tmp_path / "run")


class _two:
    def __enter__(self):
        return Processes(rank=0, world_size=2)

    def __exit__(self, *error):
        return None
