"""Haystacks: endless filler, by the sentence, in which needles and facts are hidden."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nestlearn.evaluation.tasks.task import IGNORED, Examples
from nestlearn.evaluation.tasks.words import Encoder
from nestlearn.io import missing_file
from nestlearn.training.corpus import read_documents

__all__ = ["Haystack", "Noise", "Side", "Texts", "examples", "fill", "find_data_root", "hide"]

Side = Literal["train", "test"]

# Which file of ELTeC belongs to which side.
NOVELS: dict[str, str] = {"train": "eltec_eng/train.jsonl.gz", "test": "eltec_eng/valid.jsonl.gz"}

# A full stop after these, or after a single capital, ends no sentence; nor does a mark before a small letter.
_TITLES = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Dr", "St", "Messrs", "[A-Z]"))
_SENTENCE_END = re.compile(_TITLES + r"""[.!?]+["'”’)\]]*(?=\s+[^\sa-z]|\s*\Z)""")

# So many sentences in a row that may not be used mean that there are no others.
_PATIENCE = 10_000


class Haystack(ABC):
    """A source of filler."""

    @abstractmethod
    def sentences(self, generator: torch.Generator) -> Iterator[str]:
        """Sentences without end, with single spaces between their words.

        Args:
            generator: the source of all randomness, on the CPU.
        """


class Noise(Haystack):
    """The five sentences that RULER repeats (Hsieh et al. 2024, 2404.06654), over and over; nothing is random."""

    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

    def sentences(self, generator: torch.Generator) -> Iterator[str]:
        return cycle(_split(self.text))


class Texts(Haystack):
    """Sentences of documents, read on from a random place; at a document's end from another place.

    Every character is as likely as any other to be the place.

    Args:
        documents: texts; some of them with two sentences or more.

    Raises:
        ValueError: if no document has two sentences.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = tuple(documents)
        self._ends = list(accumulate(len(text) for text in self.documents))
        if not any(len(list(islice(_SENTENCE_END.finditer(text), 2))) == 2 for text in self.documents):
            raise ValueError(
                f"documents: expected at least one with two sentences, got {len(self.documents)} without. A sentence "
                "ends with a full stop, a question or an exclamation mark. Give prose."
            )

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Texts:
        """The documents of a file or folder; see `nestlearn.training.corpus.read_documents`, errors too."""
        return cls(read_documents(source))

    @classmethod
    def novels(cls, side: Side, data_root: str | os.PathLike[str] | None = None) -> Texts:
        """English novels (ELTeC-eng): 91 to train with, 57 million characters, and 4 others to test with.

        Args:
            side: "train" or "test".
            data_root: folder of data sets; see `find_data_root`.
        """
        check_side(side)
        return cls.read(find_data_root(data_root) / NOVELS[side])

    def sentences(self, generator: torch.Generator) -> Iterator[str]:
        while True:
            place = int(torch.randint(self._ends[-1], (1,), generator=generator))
            number = bisect_right(self._ends, place)
            text = self.documents[number]
            begin = None
            for found in _SENTENCE_END.finditer(text, place - (self._ends[number] - len(text))):
                # What stands before the first end is cut in half.
                if begin is not None:
                    yield " ".join(text[begin : found.end()].split())
                begin = found.end()


def fill(
    haystack: Haystack,
    encoder: Encoder,
    tokens: int,
    generator: torch.Generator,
    *,
    refuse: Callable[[np.ndarray], bool] | None = None,
) -> list[np.ndarray]:
    """Encoded sentences of exactly `tokens` tokens in all.

    The first one is cut at its beginning, so that every boundary between two is the end of a sentence, and so is the
    end.

    Args:
        haystack: where they come from.
        encoder: of the text.
        tokens: how many, at least 0.
        generator: the source of all randomness, on the CPU.
        refuse: is true of an encoded sentence, (T,), that may not be used.

    Raises:
        ValueError: if all sentences are refused.
    """
    source = haystack.sentences(generator)
    pieces: list[np.ndarray] = []
    total = refused = 0
    while total < tokens:
        ids = encoder.encode(" " + next(source))
        if not len(ids) or (refuse is not None and refuse(ids)):
            refused += 1
            if refused == _PATIENCE:
                raise ValueError(f"haystack: all of {refused:,} sentences are empty or refused. Give other texts.")
            continue
        refused = 0
        pieces.append(ids)
        total += len(ids)
    surplus = total - tokens
    first = 0
    while surplus and surplus >= len(pieces[first]):
        surplus -= len(pieces[first])
        first += 1
    return [pieces[first][surplus:], *pieces[first + 1 :]] if pieces else []


def hide(filler: Sequence[np.ndarray], pieces: Sequence[np.ndarray], gaps: Sequence[int]) -> list[np.ndarray]:
    """Puts pieces between sentences, in their order.

    Args:
        filler: n sentences.
        pieces: what is hidden.
        gaps: for each piece the number of sentences before it, 0 to n, never falling.

    Returns:
        the n sentences and the pieces.
    """
    hidden: list[np.ndarray] = []
    begin = 0
    for piece, gap in zip(pieces, gaps, strict=True):
        hidden += [*filler[begin:gap], piece]
        begin = gap
    return [*hidden, *filler[begin:]]


def examples(rows: Sequence[Sequence[tuple[np.ndarray, bool]]], length: int) -> Examples:
    """Sequences whose answers are due one token earlier: the target of a token is the next one, where that is asked.

    With all earlier tokens given, every largest logit right is the same as greedy decoding that is right: one that
    goes wrong has a first wrong token, and up to there both read the same.

    Args:
        rows: of each sequence the parts (ids (n,), whether they are an answer), `length` tokens in all.
        length: T.
    """
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    asked = np.zeros((len(rows), length), dtype=bool)
    for row, parts in enumerate(rows):
        tokens[row] = np.concatenate([ids for ids, _ in parts])
        asked[row] = np.concatenate([np.full(len(ids), answer) for ids, answer in parts])
    targets = np.full_like(tokens, IGNORED)
    targets[:, :-1][asked[:, 1:]] = tokens[:, 1:][asked[:, 1:]]
    return Examples(torch.from_numpy(tokens), torch.from_numpy(targets))


def find_data_root(data_root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of data sets: `data_root`, otherwise the one that the environment variable NESTLEARN_DATA names.

    Raises:
        FileNotFoundError: if it is not there, or none is named.
    """
    named = data_root if data_root is not None else os.environ.get("NESTLEARN_DATA")
    if not named:
        raise FileNotFoundError("no folder of data sets: give data_root, or set NESTLEARN_DATA to the folder's path.")
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise missing_file(folder, what="folder of data sets")
    return folder


def check_side(side: str) -> None:
    """Raise ValueError for what is no side of a data set."""
    if side not in NOVELS:
        raise ValueError(f"side: expected {' or '.join(map(repr, NOVELS))}, got {side!r}")


def _split(text: str) -> list[str]:
    """The sentences of a text, the last one too if no mark ends it."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    pieces = [" ".join(text[a:b].split()) for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece]
