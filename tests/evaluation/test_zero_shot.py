"""Questions to a language model: likelihoods one by one, what marks are, and what is no question."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestlearn.evaluation.zero_shot import FILES, Question, ask, likelihoods, read_questions
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")


def small_model(mixer: Any = "self_modifying_titans") -> HopeLM:
    torch.manual_seed(0)
    return HopeLM(HopeConfig(dim=16, depth=1, heads=2, chunk_size=4, mixer=mixer)).double()


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "plain_attention"])
def test_likelihoods_are_those_of_each_pair_alone(mixer: str) -> None:
    model = small_model(mixer).train()
    pairs = [
        ("The cat", " sat"),
        ("A", " b"),
        ("What is it?\nAnswer:", " a long answer, longer than others"),
        ("é", "ü"),
    ]
    found = likelihoods(model, BYTES, pairs, batch_size=3)
    assert model.training
    model.eval()
    for (prompt, continuation), likelihood in zip(pairs, found, strict=True):
        ids = torch.tensor([*BYTES.encode(prompt + continuation).tolist()])
        with torch.no_grad():
            scores = model(ids[None])[0][0].log_softmax(-1)
        first = len(BYTES.encode(prompt))
        nats = sum(float(scores[place - 1, ids[place]]) for place in range(first, len(ids)))
        assert likelihood.nats == pytest.approx(nats, rel=1e-5)
        greedy = all(int(scores[place - 1].argmax()) == int(ids[place]) for place in range(first, len(ids)))
        assert likelihood.greedy == greedy


class Parrot(torch.nn.Module):
    """Says the last byte of its context again, nine times as likely as all others together."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens: torch.Tensor, *, lengths: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.one_hot(tokens, 256) * math.log(9 * 255), None


def test_marks_of_one_answer_and_of_several() -> None:
    words = [Question(prompt="x ", answers=("    ",)), Question(prompt="x", answers=(" y",))]
    found = ask(Parrot(), BYTES, words)
    assert found["accuracy"] == 0.5
    rare = -math.log2(0.1 / 255)
    assert found["bits"] == pytest.approx((-4 * math.log2(0.9) + 2 * rare) / 2, rel=1e-5)
    # The short answer is likelier as a whole, the long one by character.
    questions = [
        Question(prompt="z", answers=(" q", " qq" + "q" * 20), right=1),
        Question(prompt="z", answers=(" bcd", " a", " e" * 5, " fff"), right=1),
    ]
    found = ask(Parrot(), BYTES, questions)
    assert found == {"accuracy": 0.5, "normalised": 0.5, "chance": (1 / 2 + 1 / 4) / 2}


def test_empty_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token each"):
        likelihoods(Parrot(), BYTES, [("a", "")])


def write(folder: Path, *lines: str) -> Path:
    (folder / "zeroshot_eval").mkdir(exist_ok=True)
    with gzip.open(folder / FILES["piqa"], "wt") as file:
        file.write("\n".join(lines))
    return folder


def test_what_is_no_question_is_refused_by_file_and_line(tmp_path: Path) -> None:
    good = {"query": "Question: why?\n", "choices": ["this", " that "], "gold": 1}
    (question,) = read_questions("piqa", data_root=write(tmp_path, json.dumps(good)))
    assert question == Question(prompt="Question: why?\nAnswer:", answers=(" this", " that"), right=1)
    for bad in ("no json", json.dumps({**good, "gold": 2}), json.dumps({"query": "x"}), "[1]"):
        with pytest.raises(ValueError, match=r"piqa.jsonl.gz, line 2: expected a question"):
            read_questions("piqa", data_root=write(tmp_path, json.dumps(good), bad))
    assert len(read_questions("piqa", data_root=tmp_path, limit=1)) == 1
    with pytest.raises(ValueError, match="name: expected one of lambada, piqa, arc_easy"):
        read_questions("trivia")
    with pytest.raises(FileNotFoundError, match="arc_easy"):
        read_questions("arc_easy", data_root=tmp_path)


def test_the_sets_are_whole(data_dir: Path) -> None:
    counts = {name: len(read_questions(name, data_root=data_dir)) for name in FILES}
    assert counts == {"lambada": 5153, "piqa": 1838, "arc_easy": 2376}
    first = read_questions("lambada", data_root=data_dir, limit=1)[0]
    assert first.answers == (" signs",)
    assert first.prompt.endswith("I don't care about")
