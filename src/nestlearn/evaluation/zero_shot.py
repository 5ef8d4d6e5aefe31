"""Zero-shot questions to a language model: the last word of a passage, or one of a few answers (Table 2).

The sets are those of llm-foundry's local data (`data_root`/zeroshot_eval); prompts and scores are those of the
lm-evaluation-harness (Gao et al.): an answer is as likely as its tokens after the prompt, per character where the
score is normalised.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.io import missing_file
from nestlearn.training.tokenizers import Tokenizer

FILES = {
    "lambada": "zeroshot_eval/lambada_openai.jsonl.gz",
    "piqa": "zeroshot_eval/piqa.jsonl.gz",
    "arc_easy": "zeroshot_eval/arc_easy.jsonl.gz",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and what may follow it.

    Attributes:
        prompt: text.
        answers: texts that may follow, their leading space included; a single one is to be found word for word.
        right: which of them does.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int = 0


class Likelihood(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether each of its tokens is the likeliest one."""

    nats: float
    greedy: bool


def read_questions(
    name: str, *, data_root: str | os.PathLike[str] | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of a set, in the order of its file.

    Args:
        name: "lambada", "piqa" or "arc_easy".
        data_root: folder of data sets; by default the one that NESTLEARN_DATA names.
        limit: only the first ones.

    Raises:
        ValueError: for an unknown name, or a line that holds no question; names file and line.
        FileNotFoundError: if the file is not there.
    """
    if name not in FILES:
        raise ValueError(f"name: expected one of {', '.join(FILES)}, got {name!r}")
    path = find_data_root(data_root) / FILES[name]
    if not path.exists():
        raise missing_file(path, what=f"questions of {name}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [_question(line, path, number) for number, line in enumerate(islice(lines, limit), start=1)]


def _question(line: str, path: Path, number: int) -> Question:
    try:
        entry = json.loads(line)
        if "continuation" in entry:
            return Question(prompt=entry["context"].rstrip(), answers=(f" {entry['continuation'].strip()}",))
        prompt = f"{entry['query'].strip()}\nAnswer:"
        answers = tuple(f" {choice.strip()}" for choice in entry["choices"])
        return Question(prompt=prompt, answers=answers, right=range(len(answers)).index(entry["gold"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: expected a question with its answers ({error})") from None


@torch.no_grad()
def likelihoods(
    model: nn.Module, tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], *, batch_size: int = 16
) -> list[Likelihood]:
    """How likely each (prompt, continuation) is; prompts are not shortened.

    Args:
        model: with the interface of `HopeLM`; left in its mode.
        tokenizer: of the model; the two texts are tokenized apart.
        pairs: prompts and continuations, neither of them empty.
        batch_size: pairs at once, of similar lengths.

    Raises:
        ValueError: for an empty text.
    """
    encoded = [[tokenizer.encode(text).tolist() for text in pair] for pair in pairs]
    if not all(all(pair) for pair in encoded):
        raise ValueError("expected prompts and continuations of at least one token each, got an empty one")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    found: list[Likelihood | None] = [None] * len(encoded)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [[*prompt, *continuation] for prompt, continuation in (encoded[i] for i in chosen)]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        logits, _ = model(tokens.to(device), lengths=lengths.to(device))
        for i, ids, scores in zip(chosen, rows, logits, strict=True):
            count = len(encoded[i][1])
            expected = torch.tensor(ids[-count:], device=device)
            told = scores[len(ids) - 1 - count : len(ids) - 1].float()
            nats = F.cross_entropy(told, expected, reduction="sum")
            found[i] = Likelihood(-float(nats), bool((told.argmax(-1) == expected).all()))
    model.train(was_training)
    return found  # type: ignore[return-value]


def ask(
    model: nn.Module, tokenizer: Tokenizer, questions: Sequence[Question], *, batch_size: int = 16
) -> dict[str, float | None]:
    """Marks of a model on questions.

    Args:
        model, tokenizer, batch_size: as in `likelihoods`.
        questions: from `read_questions`.

    Returns:
        "accuracy"; with one answer to a question also "bits", of it, None if they are not finite; with several
        "normalised", the accuracy by likelihood per character, and "chance".
    """
    if not questions:
        raise ValueError("questions: expected at least one, got none")
    pairs = [(question.prompt, answer) for question in questions for answer in question.answers]
    known = iter(likelihoods(model, tokenizer, pairs, batch_size=batch_size))
    scores = [[next(known) for _ in question.answers] for question in questions]
    count = len(questions)
    if all(len(question.answers) == 1 for question in questions):
        nats = -sum(likelihood.nats for (likelihood,) in scores) / count
        right = sum(likelihood.greedy for (likelihood,) in scores)
        return {"accuracy": right / count, "bits": nats / math.log(2) if math.isfinite(nats) else None}
    plain = normalised = chance = 0.0
    for question, row in zip(questions, scores, strict=True):
        whole = [likelihood.nats for likelihood in row]
        each = [total / len(answer.strip()) for total, answer in zip(whole, question.answers, strict=True)]
        plain += whole.index(max(whole)) == question.right
        normalised += each.index(max(each)) == question.right
        chance += 1 / len(row)
    return {"accuracy": plain / count, "normalised": normalised / count, "chance": chance / count}
