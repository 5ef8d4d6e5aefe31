"""ContinualLearner: it learns, forgets what it is told to, and its file is exact or refused."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from nestlearn import ContinualLearner, HopeConfig, HopeLM, stack_levels
from nestlearn.training.checkpoint import load_model
from nestlearn.training.data import load_tokenizer

BYTES = load_tokenizer("bytes")
TEXT = "The cat sat on the mat, and the dog sat on the log. " * 4
NAMES = ("llama", "gpt2", "hope")


def base(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if name == "hope":
        return HopeLM(HopeConfig(dim=16, depth=2, heads=2, chunk_size=4)).eval()
    if name == "llama":
        config: Any = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
                                  num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    else:
        config = GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=128, vocab_size=256, bos_token_id=0,
                            eos_token_id=0)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def learner(name: str = "llama", model: Any = None, **settings: Any) -> ContinualLearner:
    stacked = stack_levels(base(name) if model is None else model, (16, 48), notice=None)
    return ContinualLearner(stacked, tokenizer=BYTES, **{"window": 64, **settings})


def logits(given: ContinualLearner, text: str = TEXT[:30]) -> Tensor:
    tokens = torch.tensor(BYTES.encode(text).tolist())[None]
    with torch.no_grad():
        return given.model(tokens, given.memory.weights)[0]


@pytest.mark.parametrize("rule", ["gd", "momentum", "dgd"])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_easier_the_second_time_and_the_base_is_as_before(name: str, rule: Any) -> None:
    given = learner(name, rule=rule, lr=0.3)
    before = {n: t.clone() for n, t in given.model.base.state_dict().items()}
    frozen = given.loss(TEXT)
    first, second = given.observe(TEXT), given.observe(TEXT)
    assert second.loss < first.loss < frozen
    assert first.tokens == len(TEXT)
    assert first.updates == (len(TEXT) // 16, len(TEXT) // 48)
    assert all(size > 0 for size in first.sizes)
    assert given.updates == (2 * len(TEXT) // 16, 2 * len(TEXT) // 48)
    assert all(torch.equal(t, before[n]) for n, t in given.model.base.state_dict().items())
    assert "level 0: 13 x" in str(first)
    assert f"{2 * len(TEXT)} tokens read" in given.report()
    assert "level 1: every 48 tokens, 8 updates" in given.report()


def test_loss_learns_nothing_and_is_that_of_a_learner_that_stands_still() -> None:
    given, still = learner(lr=0.3), learner(lr=0.0)
    given.observe(TEXT)
    kept = logits(given)
    assert given.loss(TEXT) == given.loss(TEXT)
    assert torch.equal(logits(given), kept)
    assert still.observe(TEXT).loss == pytest.approx(still.loss(TEXT), abs=1e-6)
    assert still.observe(TEXT).sizes == (0.0, 0.0)


def test_undo_and_forget() -> None:
    given, fresh = learner(lr=0.3), learner(lr=0.3)
    with pytest.raises(ValueError, match="nothing was observed or forgotten"):
        given.undo()
    given.observe(TEXT)
    kept, counted = logits(given), given.updates
    given.observe("Something else entirely, to be forgotten again. " * 3)
    assert not torch.equal(logits(given), kept)
    given.undo()
    assert torch.equal(logits(given), kept)
    assert given.updates == counted
    with pytest.raises(ValueError, match="nothing was observed or forgotten"):
        given.undo()
    given.forget(levels=[0])
    fast, slow = (level.weights for level in given.model.levels)
    assert not any(given.memory.weights[n].change.any() for n in fast)
    assert all(given.memory.weights[n].change.any() for n in slow)
    given.undo()
    assert torch.equal(logits(given), kept)
    given.forget()
    assert torch.equal(logits(given), logits(fresh))
    with pytest.raises(ValueError, match=r"levels: expected some of \[0, 1\], got \[2\]"):
        given.forget([2])


@pytest.mark.parametrize("rule", ["gd", "momentum", "dgd"])
def test_a_file_goes_on_exactly_in_mid_period(rule: Any, tmp_path: Path) -> None:
    given, other = learner(rule=rule, lr=0.3, nested=True), learner(lr=0.1, window=32)
    given.observe(TEXT[:71])
    given.save(tmp_path / "m.safetensors")
    other.load(tmp_path / "m.safetensors")
    assert torch.equal(logits(given), logits(other))
    first, second = given.observe(TEXT[71:150]), other.observe(TEXT[71:150])
    assert (first.loss, first.sizes, first.updates) == (second.loss, second.sizes, second.updates)
    for n, weight in given.memory.weights.items():
        for a, b in zip(weight, other.memory.weights[n], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def test_a_learner_goes_on_with_the_levels_that_a_file_names(tmp_path: Path) -> None:
    given = ContinualLearner(stack_levels(base("hope"), (8, 24, 72), rank=3, notice=None), BYTES, lr=[0.3, 0.2, 0.1])
    given.observe(TEXT)
    given.save(tmp_path / "m.safetensors")
    other = ContinualLearner.resume(tmp_path / "m.safetensors", base("hope"), BYTES)
    assert other.model.periods == (8, 24, 72)
    assert other.rules == given.rules
    assert torch.equal(logits(given), logits(other))
    assert given.observe(TEXT).loss == other.observe(TEXT).loss
    with pytest.raises(ValueError, match="another base model"):
        ContinualLearner.resume(tmp_path / "m.safetensors", base("hope", seed=1))
    with pytest.raises(ValueError, match="another base model"):
        ContinualLearner.resume(tmp_path / "m.safetensors", base("llama"))


def test_a_new_process_gives_the_same_logits(tmp_path: Path) -> None:
    given = learner("gpt2", lr=0.3)
    given.observe(TEXT)
    given.save(tmp_path / "m.safetensors")
    save_file({"logits": logits(given)}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_learner import learner, logits, load_file
torch.set_num_threads(1)
given = learner("gpt2")
given.load(sys.argv[1] + "/m.safetensors")
assert torch.equal(logits(given), load_file(sys.argv[1] + "/expected.safetensors")["logits"])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=True)


def test_the_file_holds_counts_and_no_text(tmp_path: Path) -> None:
    given = learner(lr=0.3)
    given.observe("the secret word is xylophone " * 4)
    given.save(tmp_path / "m.safetensors")
    assert b"xylophone" not in (tmp_path / "m.safetensors").read_bytes()
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["tokens"] == "116"
    assert json.loads(metadata["updates"]) == [7, 2]
    assert json.loads(metadata["levels"])["levels"][0]["period"] == 16


def rewritten(path: Path, *, tensors: Any = None, **metadata: str) -> Path:
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    changed = load_file(path)
    if tensors is not None:
        tensors(changed)
    out = path.with_name("changed.safetensors")
    save_file(changed, out, {**kept, **metadata})
    return out


def test_other_files_are_refused_by_name_and_the_learner_is_unharmed(tmp_path: Path) -> None:
    given = learner(lr=0.3)
    given.observe(TEXT)
    path = tmp_path / "m.safetensors"
    given.save(path)
    kept = logits(given)

    def first(tensors: dict[str, Tensor]) -> str:
        return next(iter(tensors))

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors)][0, 0, 0] = math.nan

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[first(tensors)]

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors)] = tensors[first(tensors)].half()

    with safe_open(path, "pt") as file:
        no_period = file.metadata()["levels"].replace('"period": 16', '"period": 0')

    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("no memory at all")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refused: list[tuple[ContinualLearner, Any, str]] = [
        (given, lambda: tmp_path / "cut.safetensors", "cut.safetensors"),
        (given, lambda: tmp_path / "text.safetensors", "text.safetensors"),
        (given, lambda: tmp_path / "foreign.safetensors", "foreign.safetensors: format unknown"),
        (given, lambda: rewritten(path, format="nestlearn-memory-9"), "nestlearn-memory-9.*update nestlearn"),
        (given, lambda: rewritten(path, tensors=spoil), "holds values that are not finite; take an earlier copy"),
        (given, lambda: rewritten(path, tensors=drop), "is missing, too many, or of another shape or type"),
        (given, lambda: rewritten(path, updates="[1]"), "description is damaged"),
        (given, lambda: rewritten(path, rules="[]"), "description is damaged"),
        (given, lambda: rewritten(path, updates="[Infinity, 1]"), "description is damaged"),
        (given, lambda: rewritten(path, updates="[-1, 1]"), "description is damaged"),
        (given, lambda: rewritten(path, rows="0"), "description is damaged"),
        (given, lambda: rewritten(path, rows="2"), "of another shape or type"),
        (given, lambda: rewritten(path, tensors=halve), "of another shape or type"),
        (given, lambda: rewritten(path, levels=no_period), "description is damaged"),
        (given, lambda: rewritten(path, manner="{}"), "description is damaged"),
        (given, lambda: rewritten(path, tokens="many"), "description is damaged"),
        (learner(model=base("llama", seed=1)), lambda: path, "another base model"),
        (learner("gpt2"), lambda: path, "another base model"),
        (ContinualLearner(stack_levels(base("llama"), (16, 32), notice=None)), lambda: path, "other levels"),
        (ContinualLearner(stack_levels(base("llama"), (16, 48), rank=2, notice=None)), lambda: path, "other levels"),
    ]
    for who, make, message in refused:
        with pytest.raises((ValueError, OSError), match=message):
            who.load(make())
    with pytest.raises(FileNotFoundError, match="missing"):
        given.load(tmp_path / "missing.safetensors")
    assert torch.equal(logits(given), kept)
    given.undo()  # still knows its last observation
    weight = next(iter(given.memory.weights.values()))
    weight.change[0, 0, 0] = math.nan
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"not finite; .*m.safetensors was not written"):
        given.save(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", NAMES)
def test_generation_reads_with_what_was_learnt_and_learns_nothing(name: str) -> None:
    given = learner(name, lr=0.5)
    prompt = torch.tensor(BYTES.encode("The cat").tolist())
    greedy: dict[str, Any] = {"temperature": 0.0} if name == "hope" else {"do_sample": False}
    plain = given.generate(prompt, 12, **greedy)
    given.observe(TEXT)
    kept = logits(given)
    made = given.generate(prompt, 12, **greedy)
    tokens = prompt[None]
    for _ in range(made.shape[1]):
        tokens = torch.cat([tokens, given.model(tokens, given.memory.weights)[0][:, -1].argmax(-1)[:, None]], dim=1)
    assert torch.equal(made, tokens[:, len(prompt) :])
    assert not torch.equal(made, plain)
    assert torch.equal(logits(given), kept)
    assert isinstance(given.generate("The cat", 3, **greedy), str)
    if name != "hope":
        beams = given.generate(prompt, 5, do_sample=False, num_beams=3)
        assert beams.shape[0] == 1


def test_rows_learn_on_their_own_and_several_learners_share_a_base() -> None:
    shared = base("llama")
    texts = [TEXT[:100], "An unlike text, with other words in it. " * 3]
    ids = torch.tensor([BYTES.encode(text)[:100].tolist() for text in texts])
    alone = [learner(lr=0.3) for _ in texts]
    together, both = [learner(model=shared, lr=0.3) for _ in texts], learner(lr=0.3)
    for first, last in ((0, 40), (40, 100)):
        both.observe(ids[:, first:last])
        for given, other, row in zip(alone, together, ids, strict=True):
            given.observe(row[first:last])
            other.observe(row[first:last])
    assert both.rows == 2
    for number, (given, other) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(logits(given), logits(other))
        for n, weight in given.memory.weights.items():
            torch.testing.assert_close(weight.change[0], both.memory.weights[n].change[number], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="has read 100 tokens in 2 rows, got 1 rows"):
        both.observe(TEXT)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_is_a_plain_one_that_knows_it(name: str, rank: int | None, tmp_path: Path) -> None:
    given = ContinualLearner(stack_levels(base(name), (16, 48), rank=rank, notice=None), BYTES, lr=0.3)
    given.observe(TEXT)
    given.export(tmp_path / "out")
    tokens = torch.tensor(BYTES.encode(TEXT[:30]).tolist())[None]
    with torch.no_grad():
        if name == "hope":
            plain = load_model(tmp_path / "out")[0](tokens)[0]
        else:
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(plain, logits(given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, given.model(tokens)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"row: expected one of \[0\], got 1"):
        given.export(tmp_path / "out", row=1)


def test_what_cannot_be_read_is_refused() -> None:
    given = learner()
    with pytest.raises(ValueError, match="expected at least one token"):
        given.observe("")
    with pytest.raises(ValueError, match="expected at least one token"):
        given.observe(torch.zeros(3))
    with pytest.raises(ValueError, match="has no tokenizer"):
        ContinualLearner(given.model).observe("text")
    with pytest.raises(ValueError, match="lr: expected a number, or one for each of the 2 levels"):
        ContinualLearner(given.model, lr=[0.1])
    with pytest.raises(ValueError, match="window: expected 2 to 128 tokens"):
        ContinualLearner(given.model, window=129)
    assert (ContinualLearner(given.model).window, learner("hope", window=None).window) == (128, 1024)
    with pytest.raises(ValueError, match="at least two tokens"):
        given.loss("a")
    with pytest.raises(ValueError, match="ids from 0 to 255, the base's vocabulary, got 3 to 256"):
        given.observe([3, 256])
    single = given.observe("a")
    assert math.isnan(single.loss)
    assert given.memory.tokens == 1


def test_an_interrupted_learner_keeps_what_it_learnt_and_can_take_it_back() -> None:
    given, other = learner(lr=0.3), learner(lr=0.3)

    def stop(tokens: int, _: float) -> None:
        if tokens == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given.observe(TEXT, progress=stop)
    other.observe(TEXT[:32])
    assert given.memory.tokens == 32
    assert given.updates == other.updates == (2, 0)
    assert torch.equal(logits(given), logits(other))
    given.undo()
    assert given.memory.tokens == 0


def test_progress_is_told_of_every_segment() -> None:
    given, seen = learner(), []
    given.observe(TEXT[:50], progress=lambda tokens, loss: seen.append((tokens, loss)))
    assert [tokens for tokens, _ in seen] == [16, 32, 48, 50]
    assert all(math.isfinite(loss) for _, loss in seen)


def test_rows_are_kept_where_nothing_learns_and_in_the_file(tmp_path: Path) -> None:
    still, ids = learner(lr=0.0), torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    still.observe(ids)
    still.observe(ids)
    assert (still.rows, still.memory.tokens) == (2, 40)
    given = learner(lr=0.3)
    given.observe(ids)
    given.save(tmp_path / "m.safetensors")
    other = ContinualLearner.resume(tmp_path / "m.safetensors", base("llama"))
    assert (other.rows, other.window) == (2, 64)
    with pytest.raises(ValueError, match="expected 2 rows"):
        given.loss(ids[:1])


def test_generation_in_inference_mode_leaves_a_learner_that_learns() -> None:
    given = ContinualLearner(stack_levels(base("llama"), (16, 48), rank=3, notice=None), BYTES, lr=0.3)
    with torch.inference_mode():
        given.generate("The cat", 3, do_sample=False)
    assert math.isfinite(given.observe(TEXT).loss)


def test_a_learner_that_is_killed_while_it_saves_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    given = learner()
    given.observe(TEXT[:40])
    given.save(path)
    whole = path.read_bytes()
    # Another process goes on with it and dies while it writes: before the file is on the disk, or has its name.
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_learner import TEXT, learner
given = learner()
given.load(sys.argv[1])
given.observe(TEXT)
setattr(os, sys.argv[3], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
given.save(sys.argv[1])
"""
    for moment in ("fsync", "replace"):
        words = [sys.executable, "-c", script, str(path), str(Path(__file__).parent), moment]
        done = subprocess.run(words, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert path.read_bytes() == whole
    again = learner()
    again.load(path)
    assert again.memory.tokens == 40
