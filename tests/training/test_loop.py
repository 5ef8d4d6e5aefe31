"""The training loop: what it computes, what it leaves behind, and that nothing that happens to it is lost."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nestlearn.io
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.data import PackedTokens, load_tokenizer, read_documents, split_documents
from nestlearn.training.loop import TrainingDiverged, build_model, evaluate, learning_rate, train
from nestlearn.training.plots import plot_losses, read_log
from nestlearn.training.record import RunLog

STEPS = 9


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Short documents, so that rows differ in their number of targets."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the", "memory", "of", "a", "model", "is", "what", "it", "has", "been", "changed", "by"]
    documents = [" ".join(words[(i * j) % len(words)] for j in range(1, 2 + (i * i) % 11)) for i in range(200)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def make_run(text, model=None, **training):
    settings = {"dim": 8, "depth": 1, "heads": 1, "chunk_size": 4, "cms_periods": [1, 3], **(model or {})}
    settings.setdefault("mixer", "self_modifying_titans")
    defaults = {"steps": STEPS, "batch_size": 4, "sequence_length": 12, "warmup": 2, "lr": 0.01, "log_every": 2}
    defaults |= {"eval_every": 3, "eval_tokens": 48, "checkpoint_every": 3, "keep_checkpoints": 0}
    return RunConfig(
        model=settings, data=DataConfig(text=str(text)), training=TrainingConfig(**{**defaults, **training})
    )


def losses(folder):
    """The log without what a clock decides."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in read_log(folder / "log.jsonl")]


def weights(folder, step=STEPS):
    return load_checkpoint(checkpoint_path(folder, step)).weights


def assert_same_run(folder, other):
    assert losses(folder) == losses(other)
    one, two = weights(folder), weights(other)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def _whole(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.use_deterministic_algorithms(True)
    train(make_run(text), folder)
    return folder


@pytest.fixture
def whole(_whole, tmp_path):
    """A run that nothing happened to."""
    return shutil.copytree(_whole, tmp_path / "whole")


def test_a_run_leaves_everything_in_its_folder(text, tmp_path):
    events = []
    result = train(make_run(text), tmp_path / "run", on_event=events.append)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {"config.toml", "run.json", "log.jsonl", "loss.png", "checkpoints"}
    assert [p.name for p in list_checkpoints(folder)] == [f"step-0000000{i}.safetensors" for i in (3, 6, 9)]
    rows = read_log(folder / "log.jsonl")
    assert [r["step"] for r in rows if r["event"] == "train"] == [2, 4, 6, 8, 9]
    assert [r["step"] for r in rows if r["event"] == "eval"] == [3, 6, 9]
    assert rows == [e for e in events if e["event"] != "checkpoint"]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [3, 6, 9]
    assert rows[-1]["tokens"] == STEPS * 4 * 12
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"

    resolved = RunConfig.load(folder / "config.toml")
    assert resolved.model == HopeConfig.from_dict(make_run(text).model).to_dict()
    assert resolved.training == make_run(text).training
    facts = json.loads((folder / "run.json").read_text())
    assert facts["parameters"] == result.parameters > 0
    assert facts["sessions"][0]["threads"] == 1
    assert facts["sessions"][0]["versions"]["torch"] == torch.__version__

    assert (result.step, result.interrupted) == (STEPS, False)
    assert result.loss == rows[-2]["loss"]
    assert result.held_out.loss == rows[-1]["loss"]
    assert result.checkpoint == checkpoint_path(folder, STEPS)


def test_the_first_loss_is_the_mean_over_all_valid_targets_of_the_step(text, tmp_path):
    run = make_run(text, steps=1, accumulate=2, log_every=1, eval_every=0)
    train(run, tmp_path / "run")
    documents = split_documents(read_documents(text), held_out_fraction=0.05)
    data = PackedTokens.from_texts(documents.train, load_tokenizer("bytes"), sequence_length=12)
    batch = data.batch(0, 4)
    torch.manual_seed(0)
    model = build_model(run.model, 256)
    logits, _ = model(batch.tokens, document_starts=batch.document_starts)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    counts = (batch.targets != -100).sum(1)
    assert counts.min() < counts.max()
    row = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert row["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_line_of_the_log_is_the_mean_over_its_own_steps(text, tmp_path, whole):
    train(make_run(text, log_every=1, eval_every=0), tmp_path / "run")
    each = [row["loss"] for row in losses(tmp_path / "run") if row["event"] == "train"]
    found = [row["loss"] for row in losses(whole) if row["event"] == "train"]
    expected = [sum(each[i : i + 2]) / len(each[i : i + 2]) for i in range(0, STEPS, 2)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_log_goes_on_without_what_a_lost_session_wrote(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path, step=0) as log:
        for step in (2, 3, 4):
            assert log.write({"event": "train", "step": step, "loss": 1.0})
    with open(path, "a") as file:
        file.write('{"event": "train", "st')  # a line that was being written
    with RunLog(path, step=3) as log:
        assert [row["step"] for row in read_log(path)] == [2, 3]
        assert not log.write({"event": "train", "step": 3, "loss": 2.0})
        assert log.write({"event": "eval", "step": 3, "loss": 2.0})
        assert log.write({"event": "train", "step": 4, "loss": 2.0})
    assert [row["loss"] for row in read_log(path)] == [1.0, 1.0, 2.0, 2.0]


def test_gradient_accumulation_does_not_change_what_is_computed(text, tmp_path):
    for parts in (1, 4):
        train(make_run(text, precision="fp64", accumulate=parts), tmp_path / f"run{parts}")
    one, four = losses(tmp_path / "run1"), losses(tmp_path / "run4")
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in four], rel=1e-11)
    a, b = weights(tmp_path / "run1"), weights(tmp_path / "run4")
    for name in a:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-9)


def test_activation_checkpointing_does_not_change_what_is_computed(text, tmp_path, whole):
    train(make_run(text, activation_checkpointing=True), tmp_path / "run")
    assert [r["loss"] for r in losses(tmp_path / "run")] == pytest.approx([r["loss"] for r in losses(whole)], rel=1e-5)


def test_training_learns(text, tmp_path):
    result = train(make_run(text, steps=40, eval_every=0, checkpoint_every=0, lr=0.02), tmp_path / "run")
    assert result.held_out.loss < 0.75 * math.log(256)


def test_slow_levels_move_at_their_own_period_only(text, whole):
    before, after, later = (weights(whole, step) for step in (3, 6, 9))
    slow = [name for name in before if ".memory_system.levels.1." in name]
    assert slow
    assert all(not torch.equal(before[n], after[n]) and not torch.equal(after[n], later[n]) for n in slow)


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_killed_run_goes_on_to_bitwise_the_same_losses(text, tmp_path, whole, step):
    def kill(event):
        if event["event"] == "train" and event["step"] == step:
            raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        train(make_run(text), folder, on_event=kill)
    assert train(make_run(text), folder, resume=True).step == STEPS
    assert_same_run(folder, whole)
    assert [s["from_step"] for s in json.loads((folder / "run.json").read_text())["sessions"]] == [
        0,
        step - 1 - (step - 1) % 3,
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 5])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(text, tmp_path, whole, capfd, number, step):
    def interrupt(event):
        if event["event"] != "checkpoint" and event["step"] == step - step % 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    folder = tmp_path / "stopped"
    result = train(make_run(text), folder, on_event=interrupt)
    assert result.interrupted
    assert result.step < STEPS
    assert load_checkpoint(result.checkpoint).step == result.step
    said = capfd.readouterr().err
    assert "finishing this step" in said
    assert f"nestlearn train --out {folder} --resume" in said
    assert signal.getsignal(number) is before
    assert not train(make_run(text), folder, resume=True).interrupted
    rows = {p.name for p in list_checkpoints(folder)}
    assert rows >= {p.name for p in list_checkpoints(whole)}
    assert_same_run(folder, whole)


def test_sigkill_in_mid_training_leaves_whole_checkpoints(text, tmp_path):
    run = make_run(text, steps=400, eval_every=0, checkpoint_every=1, keep_checkpoints=2)
    folder = tmp_path / "run"
    script = textwrap.dedent("""
        import sys, json, torch
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        from nestlearn.training.config import RunConfig
        from nestlearn.training.loop import train
        train(RunConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(run.to_dict()), str(folder)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list_checkpoints(folder)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    reached = max(load_checkpoint(path).step for path in list_checkpoints(folder))
    end = dataclasses.replace(run.training, steps=reached + 2)
    result = train(dataclasses.replace(run, training=end), folder, resume=True)
    assert result.step == reached + 2
    steps = [row["step"] for row in read_log(folder / "log.jsonl") if row["event"] == "train"]
    assert steps == sorted(set(steps))


def test_a_damaged_checkpoint_is_passed_over_aloud_and_replaced(text, tmp_path, whole, capfd):
    newest = checkpoint_path(whole, STEPS)
    untouched = losses(whole)
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    result = train(make_run(text), whole, resume=True)
    said = capfd.readouterr().err
    assert "DAMAGED CHECKPOINT" in said
    assert str(newest) in said
    assert result.step == STEPS
    assert losses(whole) == untouched
    assert load_checkpoint(newest).step == STEPS


def test_a_full_disk_names_the_file_and_keeps_the_earlier_checkpoint(text, tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    real, saves = nestlearn.io.save_file, []

    def full_at_the_second(tensors, path, **kwargs):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, **kwargs)

    monkeypatch.setattr(nestlearn.io, "save_file", full_at_the_second)
    with pytest.raises(OSError, match=r"step-00000006\.safetensors") as caught:
        train(make_run(text), folder)
    assert caught.value.errno == errno.ENOSPC
    assert [load_checkpoint(p).step for p in list_checkpoints(folder)] == [3]
    train(make_run(text), folder, resume=True)
    assert_same_run(folder, whole)


class Exploding(HopeLM):
    """Loses its head at the fifth training batch."""

    calls = 0

    def forward(self, tokens, *args, **kwargs):
        logits, state = super().forward(tokens, *args, **kwargs)
        self.calls += self.training
        return (logits * math.nan if self.calls == 5 else logits), state


def test_a_loss_that_is_not_finite_stops_and_overwrites_nothing(text, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"step 5: the loss is nan.*step-00000003.*smaller learning rate"):
        train(make_run(text), folder, build=lambda settings, size: Exploding(HopeConfig.from_dict(settings)))
    assert [load_checkpoint(p).step for p in list_checkpoints(folder)] == [3]
    assert all(math.isfinite(row["loss"]) for row in read_log(folder / "log.jsonl"))


def test_a_run_is_never_overwritten(text, tmp_path, whole):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(make_run(text), whole)


def test_resuming_nothing_starts_at_the_first_step(text, tmp_path, whole, capfd):
    train(make_run(text), tmp_path / "new", resume=True)
    assert "no checkpoint yet" in capfd.readouterr().err
    assert_same_run(tmp_path / "new", whole)


def test_resuming_a_finished_run_does_nothing(text, whole):
    before = losses(whole)
    assert train(make_run(text), whole, resume=True).step == STEPS
    assert losses(whole) == before


def test_resuming_refuses_another_model_other_text_or_other_mathematics(text, tmp_path, whole):
    with pytest.raises(ValueError, match=r"another run.*model\.dim \(8 in the checkpoint, 16 now\)"):
        train(make_run(text, model={"dim": 16}), whole, resume=True)
    with pytest.raises(ValueError, match=r"training\.lr \(0\.01 in the checkpoint, 0\.02 now\)"):
        train(make_run(text, lr=0.02), whole, resume=True)
    other = tmp_path / "text.jsonl"
    other.write_text(text.read_text() + '{"text": "one more document, and a longer one"}\n')
    with pytest.raises(ValueError, match="the text that is read"):
        train(make_run(other), whole, resume=True)


def test_a_run_can_be_made_longer(text, whole, capfd):
    assert train(make_run(text, steps=STEPS + 3), whole, resume=True).step == STEPS + 3
    assert "the run now ends after 12 steps instead of 9" in capfd.readouterr().err


def test_bad_input_says_what_is_wrong(text, tmp_path):
    with pytest.raises(ValueError, match="256 ids, the model has 100"):
        train(make_run(text, model={"vocab_size": 100}), tmp_path / "a")
    with pytest.raises(ValueError, match="fewer than one sequence"):
        train(make_run(text, sequence_length=100_000), tmp_path / "b")
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        train(make_run(text, model={"dept": 1}), tmp_path / "c")
    with pytest.raises(ValueError, match="expected one of default, paper, transformer"):
        train(make_run(text, model={"configuration": "rnn"}), tmp_path / "d")
    with pytest.raises(ValueError, match="'tpu9'"):
        train(make_run(text, device="tpu9"), tmp_path / "e")
    assert not any((tmp_path / name).exists() for name in "abcde")


def test_model_tables_name_sizes_and_configurations():
    torch.manual_seed(0)
    tiny = build_model({"preset": "tiny", "configuration": "transformer", "depth": 1}, 99).config
    assert tiny == HopeConfig.transformer(dim=128, depth=1, heads=2, vocab_size=99)
    assert build_model({"dim": 8, "heads": 1, "configuration": "paper"}, 256).config.write_bound is None


def test_settings_of_none_survive_the_config_file(text, tmp_path):
    run = make_run(text, model={"configuration": "paper"}, steps=1)
    train(run, tmp_path / "run")
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["model"]["write_bound"] == "none"
    again = RunConfig.load(tmp_path / "run" / "config.toml")
    assert again.model["write_bound"] is None
    assert train(again, tmp_path / "run", resume=True).step == 1


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainingConfig(steps=101, warmup=10, lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, TrainingConfig(steps=1, warmup=50, lr=1.0)) == 1.0


def test_evaluate_is_the_mean_over_the_held_out_text_and_leaves_the_mode(text):
    torch.manual_seed(0)
    model = build_model({"dim": 8, "depth": 1, "heads": 1, "configuration": "transformer"}, 256).double()
    data = PackedTokens.from_texts(["ab", "the memory of a model"], load_tokenizer("bytes"), sequence_length=8)
    found = evaluate(model, data, batch_size=2, precision="fp64")
    assert model.training
    batches = list(data.evaluation_batches(99))
    assert len(batches) == 1
    logits, _ = model(batches[0].tokens, document_starts=batches[0].document_starts)
    expected = F.cross_entropy(logits.flatten(0, 1), batches[0].targets.flatten(), ignore_index=-100)
    assert found.targets == found.bytes == 21
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(float(expected.detach()) / math.log(2), rel=1e-12)


def test_clipping_bounds_the_step(text, tmp_path):
    def first_update(clip):
        moved = {}

        def build(settings, size):
            moved["model"] = HopeLM(HopeConfig.from_dict(settings))
            return moved["model"]

        run = make_run(text, steps=1, clip=clip, eval_every=0, model={"cms_periods": [1]})
        train(run, tmp_path / f"clip{clip}", build=build)
        return nn.utils.get_total_norm([p.grad for p in moved["model"].parameters() if p.grad is not None])

    assert first_update(0.01) == pytest.approx(0.01, rel=1e-3)
    assert first_update(0.0) > 0.1


def test_the_plot_takes_baselines_and_a_broken_log_is_named(tmp_path, whole):
    plot_losses(
        whole / "log.jsonl", tmp_path / "loss.svg", label="Hope", baselines={"Transformer": whole / "log.jsonl"}
    )
    drawn = (tmp_path / "loss.svg").read_text()
    assert "Transformer, held-out" in drawn
    assert "Hope, training" in drawn
    broken = tmp_path / "log.jsonl"
    broken.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        read_log(broken)
