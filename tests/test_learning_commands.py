"""`nestlearn stack`, `learn` and `chat` on a model of Hugging Face and on one of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from nestlearn import ContinualLearner, HopeConfig, HopeLM, stack_levels
from nestlearn.cli.app import app
from nestlearn.cli.conversation import Conversation
from nestlearn.continual.memory_file import describe_memory
from nestlearn.training.data import load_tokenizer
from nestlearn.training.progress import TrainingProgress

TEXT = "The cat sat on the mat, and the dog sat on the log. " * 4
LEVELS = ("--periods", "16,48")


def bytes_of_hugging_face() -> Any:
    """A tokenizer whose tokens are bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a Llama and of a Hope."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=256, eos_token_id=None, bos_token_id=None, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llama")
    bytes_of_hugging_face().save_pretrained(folder / "llama")
    hope = HopeLM(HopeConfig(dim=16, depth=2, heads=2, chunk_size=4))
    ContinualLearner(stack_levels(hope, (16, 48), notice=None), load_tokenizer("bytes")).export(folder / "hope")
    return {name: str(folder / name) for name in ("llama", "hope")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(*words: object, **more: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **more)


@pytest.mark.parametrize("name", ["llama", "hope"])
def test_stack_shows_the_levels_and_writes_an_empty_memory(name: str, bases: dict[str, str], tmp_path: Path) -> None:
    memory = tmp_path / "m.safetensors"
    shown = run("stack", bases[name], *LEVELS, "--rank", 4)
    assert shown.exit_code == 0, shown.output
    assert "level 0: every 16 tokens" in shown.output
    assert "MiB of memory in fp32" in shown.output
    found = run("stack", bases[name], *LEVELS, "--rank", 4, "--lr", "0.3,0.1", "--memory", memory, "--json")
    assert [level["period"] for level in json.loads(found.stdout)["levels"]] == [16, 48]
    written = describe_memory(memory)
    assert (written.tokens, written.rank, [rule.lr for rule in written.rules]) == (0, 4, [0.3, 0.1])
    again = run("stack", bases[name], *LEVELS, "--memory", memory)
    assert again.exit_code == 2
    assert "exists already" in " ".join(again.output.split())


@pytest.mark.parametrize("name", ["llama", "hope"])
def test_learn_goes_on_with_its_memory(name: str, bases: dict[str, str], text: Path, tmp_path: Path) -> None:
    memory = tmp_path / "deep" / "m.safetensors"
    given = ("learn", bases[name], "--from", text, "--memory", memory, "--lr", 0.3, "--threads", 1, "--json")
    first = run(*given, *LEVELS, "--passes", 2)
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["tokens"] == 2 * len(TEXT)
    assert told["texts"][1]["loss"] < told["texts"][0]["loss"]
    assert f"token {2 * len(TEXT):,}/{2 * len(TEXT):,}" in first.stderr
    second = run(*given, "--periods", "5,7")  # the memory says what its levels are
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["texts"][0]["loss"] < told["texts"][1]["loss"]
    found = describe_memory(memory)
    assert found.tokens == 3 * len(TEXT)
    assert [level.period for level in found.levels] == [16, 48]
    shown = run(*given[:-1])
    assert f"{4 * len(TEXT)} tokens read" in shown.stdout
    assert "m.safetensors: " in shown.stdout


def test_learn_says_what_is_wrong(bases: dict[str, str], text: Path, tmp_path: Path) -> None:
    memory = tmp_path / "m.safetensors"
    assert run("learn", bases["llama"], "--from", text, "--memory", memory, *LEVELS).exit_code == 0
    whole = memory.read_bytes()
    for words, message in (
        ((bases["hope"], "--from", text, "--memory", memory), "another base model"),
        ((bases["llama"], "--from", tmp_path / "no.txt", "--memory", memory), "no.txt"),
        ((bases["llama"], "--from", text, "--memory", tmp_path / "n", "--periods", "a,b"), "--periods: expected num"),
        ((bases["llama"], "--from", text, "--memory", tmp_path / "n", "--rule", "adam"), "rule: expected one of"),
        ((bases["llama"], "--from", text, "--memory", tmp_path / "n", "--strategy", "x"), "strategy: expected one"),
        ((bases["llama"], "--from", text, "--memory", text), "text.txt"),
        ((bases["llama"], "--from", text, "--memory", memory, "--passes", 0), "--passes: expected at least 1"),
    ):
        refused = run("learn", *words)
        assert refused.exit_code == 2, refused.output
        assert message in " ".join(refused.output.split())
    assert memory.read_bytes() == whole
    assert text.read_text() == TEXT


def test_an_interrupted_learner_saves(
    bases: dict[str, str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: TrainingProgress, step: int, **more: Any) -> None:
        if step == 32:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "update", stop)
    memory = tmp_path / "m.safetensors"
    stopped = run("learn", bases["llama"], "--from", text, "--memory", memory, *LEVELS)
    assert stopped.exit_code == 130
    assert describe_memory(memory).tokens == 32


@pytest.mark.parametrize("name", ["llama", "hope"])
def test_a_conversation_is_learnt_and_kept(name: str, bases: dict[str, str], text: Path, tmp_path: Path) -> None:
    memory = tmp_path / "m.safetensors"
    lines = ["hello there", f"/learn '{text}'", "/levels", "/forget 0", "/undo", "/forget 7", "/learn nothing.txt",
             "/learn", "/dance", "/forget x", "/help", "/save", "and again", "/quit"]  # fmt: skip
    given = ("chat", bases[name], "--memory", memory, *LEVELS, "--max-tokens", 8, "--threads", 1)
    done = run(*given, input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    for part in (
        f"{len(TEXT):,} tokens, loss",
        "level 1: every 48 tokens",
        "levels: expected some of [0, 1], got [7]",
        "nothing.txt",
        "expected a file, for example /learn notes.txt",
        "/dance: no such command",
        "/forget x: invalid literal",
        "take back the last thing",
        "saved to",
    ):
        assert part in done.stdout, part
    read = describe_memory(memory).tokens
    assert read > len(TEXT)
    quiet = run(*given, "--still", input="hello there\n")  # ends with its input
    assert quiet.exit_code == 0, quiet.output
    assert describe_memory(memory).tokens == read


def test_a_conversation_uses_the_template_of_the_model(bases: dict[str, str], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases["llama"]).eval()
    learner = ContinualLearner(stack_levels(base, (16, 48), notice=None), bytes_of_hugging_face())
    talk = Conversation(learner, tmp_path / "m.safetensors", max_tokens=5, learns=True)
    talk.take("How are you?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    said = talk.messages[1]["content"]
    assert talk.learner.tokenizer.decode(talk.prompt()) == f"<user>How are you?</><assistant>{said}</><assistant>"
    assert learner.memory.tokens == len(f"<user>How are you?</><assistant>{said}</>".encode())
    plain = Conversation(
        ContinualLearner(stack_levels(HopeLM(HopeConfig(dim=16, depth=2, heads=2)), (16, 48), notice=None),
                         load_tokenizer("bytes")), tmp_path / "n", max_tokens=5, learns=False)  # fmt: skip
    plain.messages = [{"role": "user", "content": "Hi"}]
    assert bytes(plain.prompt()) == b"user: Hi\nassistant:"


@pytest.mark.parametrize("name", ["llama", "hope"])
def test_stack_trains_a_model_to_be_adapted(name: str, bases: dict[str, str], text: Path, tmp_path: Path) -> None:
    out, memory = tmp_path / "trained", tmp_path / "memory.safetensors"
    training = ("--from", text, "--out", out, "--steps", 8, "--rows", 2, "--length", 48, "--training-lr", 1e-2)
    found = run("stack", bases[name], *LEVELS, *training, "--memory", memory, "--threads", 1)
    assert found.exit_code == 0, found.output
    loss: dict[str, float] = {}
    for model in (bases[name], str(out)):
        made = run("learn", model, *LEVELS, "--from", text, "--memory", tmp_path / f"{len(loss)}.st", "--json")
        loss[model] = json.loads(made.stdout)["texts"][0]["loss"]
    assert loss[str(out)] < loss[bases[name]] - 0.1
    assert run("learn", str(out), "--from", text, "--memory", memory).exit_code == 0  # it is the trained model's own
    assert "another base" in run("learn", bases[name], "--from", text, "--memory", memory).output
    assert "exists already" in run("stack", bases[name], *training).output
    assert "belong together" in run("stack", bases[name], "--out", tmp_path / "other").output
