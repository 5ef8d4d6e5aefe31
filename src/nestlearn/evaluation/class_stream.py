"""Classes that arrive in groups: a text classifier made of a language model that reads "text -> label" (Figure 6)."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nestlearn.continual.methods import Method
from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.io import missing_file
from nestlearn.training.tokenizers import Tokenizer

FILES = {
    "clinc": ("cil_splits/clinc_train.csv", "cil_splits/clinc_test.csv"),
    "dbpedia": ("cil_splits/dbpedia_train.csv.gz", "cil_splits/dbpedia_test.csv"),
}
ARROW = " -> "


@dataclass(frozen=True, kw_only=True)
class ClassGroup:
    """Classes that are learnt together.

    Attributes:
        labels: their names.
        training: lines "text -> label", shuffled.
        tests: texts with their labels; no text is among those of the training.
    """

    labels: tuple[str, ...]
    training: tuple[str, ...]
    tests: tuple[tuple[str, str], ...]


def read_groups(
    name: str,
    *,
    groups: int,
    training: int,
    tests: int,
    classes: int = 0,
    longest: int = 160,
    seed: int = 0,
    tuning: bool = False,
) -> list[ClassGroup]:
    """A data set's classes in groups of equal size, as far as that goes.

    Args:
        name: "clinc" (150 intents of users' questions) or "dbpedia" (70 kinds of things that articles begin with).
        groups: how many.
        training: texts of each class, at most.
        tests: the same.
        classes: so many of them, drawn by the seed; 0 for all.
        longest: characters of a text; the rest is cut off.
        seed: of the order of classes and of which texts are taken.
        tuning: test on training texts that are not read, so that choices made by them do not know the test.

    Raises:
        ValueError: for an unknown name, or fewer classes than groups.
        FileNotFoundError: if a file is not there.
    """
    if name not in FILES:
        raise ValueError(f"name: expected one of {', '.join(FILES)}, got {name!r}")
    read, asked = (_rows(find_data_root() / file, longest) for file in FILES[name])
    randomly = random.Random(seed)
    labels = sorted({label for _, label in read})
    randomly.shuffle(labels)
    labels = labels[: classes or len(labels)]
    if not 1 <= groups <= len(labels):
        raise ValueError(f"groups: expected 1 to {len(labels)}, as many as there are classes, got {groups}")
    found = []
    for number in range(groups):
        own = labels[len(labels) * number // groups : len(labels) * (number + 1) // groups]
        lines, questions = [], []
        for label in own:
            texts = list(dict.fromkeys(text for text, named in read if named == label))
            randomly.shuffle(texts)
            known = set(texts[:training])
            left = texts[training:] if tuning else [text for text, named in asked if named == label]
            lines += [f"{text}{ARROW}{label}\n" for text in texts[:training]]
            questions += [(text, label) for text in left if text not in known][:tests]
        randomly.shuffle(lines)
        found.append(ClassGroup(labels=tuple(own), training=tuple(lines), tests=tuple(questions)))
    return found


def _rows(path: Path, longest: int) -> list[tuple[str, str]]:
    if not path.exists():
        raise missing_file(path, what="classes")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = csv.DictReader(io.StringIO(data.decode("utf-8")))
    return [(" ".join(row["text"].split())[:longest].strip(), row["label"]) for row in rows]


@dataclass
class Branch:
    """Labels by their tokens: what may come next, and the label that has ended here."""

    next: dict[int, Branch] = field(default_factory=dict)
    label: str | None = None

    @staticmethod
    def of(labels: Sequence[str], tokenizer: Tokenizer) -> Branch:
        """All labels, each ended by a new line."""
        root = Branch()
        for label in labels:
            place = root
            for token in tokenizer.encode(f"{label}\n").tolist():
                place = place.next.setdefault(token, Branch())
            place.label = label
        return root


@torch.no_grad()
def choose_label(method: Method, text: str, labels: Branch, tokenizer: Tokenizer) -> str:
    """The label that a language model writes behind a text when it may write labels only: at every branch the likeliest
    token (greedy)."""
    tokens = tokenizer.encode(text + ARROW).tolist()
    context = copy.deepcopy(method.begin())
    place = labels
    while place.label is None:
        if len(place.next) > 1:
            logits, context = method.logits(torch.tensor([tokens]), context)
            allowed = torch.tensor(list(place.next))
            token = int(allowed[logits[0, -1].cpu()[allowed].argmax()])
            tokens = []
        else:
            token = next(iter(place.next))
        tokens.append(token)
        place = place.next[token]
    return place.label


def accuracy(method: Method, groups: Sequence[ClassGroup], tokenizer: Tokenizer) -> float:
    """How many texts of these groups get their label, chosen among all of their labels; a fraction."""
    labels = Branch.of([label for group in groups for label in group.labels], tokenizer)
    asked = [question for group in groups for question in group.tests]
    right = sum(choose_label(method, text, labels, tokenizer) == label for text, label in asked)
    return right / len(asked)
