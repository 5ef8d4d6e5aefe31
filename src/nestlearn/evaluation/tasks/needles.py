"""Needles in a haystack: the NIAH tasks of RULER (Hsieh et al. 2024, 2404.06654), as in Table 1 of the paper.

    some filler ... One of the special magic numbers for quick-otter is: 4071332. ... more filler
    What is the special magic number for quick-otter mentioned in the provided text?
    The special magic number for quick-otter mentioned in the provided text is 4071332

Sentences, question and settings are RULER's (NVIDIA/RULER, scripts/data/synthetic: niah.py, constants.py, and
scripts/synthetic.yaml). What differs:
    Keys are distinct, and so are values; there they are drawn with replacement.
    A needle may stand between any two sentences, each gap as likely; there between blocks of five sentences of noise,
    or at one of 40 depths of an essay.
    The essays are novels where the haystack is `Texts.novels`; there they are Paul Graham's.
    The answer lists the values in the order of the question, those of one key in the order of the text, with commas
    that are given and not asked. There the model writes 128 tokens, and a value counts wherever it stands in them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.haystacks import Haystack, Noise, examples, fill, find_data_root, hide
from nestlearn.evaluation.tasks.task import IGNORED, Answers, Examples, Task
from nestlearn.evaluation.tasks.words import Encoder, WordVocabulary, split_words
from nestlearn.training.corpus import read_documents

__all__ = ["KINDS", "NEEDLE_TEXTS", "KeyWords", "Needles", "ValueKind", "mark_values", "read_key_words"]

ValueKind = Literal["numbers", "uuids"]

# The columns of Table 1; single_1 has noise for a haystack, all others have essays.
KINDS: dict[str, dict[str, Any]] = {
    "single_1": {"value_kind": "numbers"},
    "single_2": {"value_kind": "numbers"},
    "single_3": {"value_kind": "uuids"},
    "multi_key_1": {"value_kind": "numbers", "keys": 4},
    "multi_query": {"value_kind": "numbers", "keys": 4, "queries": 4},
    "multi_value": {"value_kind": "numbers", "values": 4},
}

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.",
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.",
    "What are all the special magic {kind}s for {query} mentioned in the provided text? "
    "The special magic {kind}s for {query} mentioned in the provided text are",
)

_PROTOCOL = [
    text.format(kind=kind, key="", value="", query=", and")
    for text in (NEEDLE, *ONE, *SEVERAL)
    for kind in ("number", "uuid")
]

# All words of the protocol, for `WordVocabulary.count(also=...)`.
NEEDLE_TEXTS: tuple[str, ...] = (*_PROTOCOL, Noise.text)

# RULER's own: seven digits from 1000000 on, and the 32 hexadecimal digits of a uuid.
_DIGITS: dict[str, int] = {"numbers": 7, "uuids": 32}


class KeyWords(NamedTuple):
    """What keys are made of: an adjective, a hyphen and a noun."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def read_key_words(
    vocabulary: WordVocabulary | None = None,
    *,
    limit: int | None = None,
    data_root: str | os.PathLike[str] | None = None,
) -> KeyWords:
    """RULER's words for keys: the adjectives and nouns of wonderwords, without those of `NEEDLE_TEXTS`.

    Args:
        vocabulary: leaves out the words that it does not know; None keeps all.
        limit: at most so many of each, the most frequent ones of the vocabulary.
        data_root: folder of data sets; see `find_data_root`.

    Raises:
        FileNotFoundError: if the lists are not there.
        ValueError: if there is no word left.
    """
    folder = find_data_root(data_root) / "wonderwords"
    own = {word for text in NEEDLE_TEXTS for word in split_words(text)}
    lists = []
    for name in ("adjectivelist.txt", "nounlist.txt"):
        words = sorted({word.strip() for word in read_documents(folder / name)[0].splitlines()} - own - {""})
        if vocabulary is not None:
            ids = vocabulary.ids
            words = sorted((word for word in words if word in ids), key=lambda word: ids[word])
        if not words[:limit]:
            known = "" if vocabulary is None else f" that a vocabulary of {vocabulary.vocab_size} words knows"
            raise ValueError(f"{folder / name}: expected at least one word{known}, got none. Raise limit or its size.")
        lists.append(tuple(words[:limit]))
    return KeyWords(*lists)


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Values to be found again by their keys; every sequence has exactly `length` tokens.

    Score with `mark_values`: `Answers.exact` is the fraction of sequences that greedy decoding gets right (RULER's
    score where one value is asked), `Answers.accuracy` the fraction of values (its score where there are several), each
    value read after the right ones before it.

    Attributes:
        length: T, tokens of the whole sequence, question and answer included.
        encoder: a `WordVocabulary`, or any tokenizer of `nestlearn.training.tokenizers`.
        key_words: adjectives and nouns of the keys, from `read_key_words`.
        haystack: the filler.
        keys: keys in the text.
        queries: keys that are asked, at most `keys`.
        values: values of each key.
        value_kind: "numbers" or "uuids".
        digits: digits of a number, or hexadecimal digits of a uuid (fewer than 32 are its first ones); None for 7
            and 32.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    length: int
    encoder: Encoder = field(repr=False)
    key_words: KeyWords = field(repr=False)
    haystack: Haystack = field(default_factory=Noise)
    keys: int = 1
    queries: int = 1
    values: int = 1
    value_kind: ValueKind = "numbers"
    digits: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "keys", "queries", "values"):
            check_whole(name, getattr(self, name), 1)
        if self.queries > self.keys:
            raise ValueError(f"queries: expected at most keys = {self.keys}, got {self.queries}. Raise keys.")
        if self.value_kind not in get_args(ValueKind):
            raise ValueError(f"value_kind: expected one of {get_args(ValueKind)}, got {self.value_kind!r}")
        most = _DIGITS["uuids"] if self.value_kind == "uuids" else 18
        if self.digits is None:
            object.__setattr__(self, "digits", _DIGITS[self.value_kind])
        if not isinstance(self.digits, int) or not 1 <= self.digits <= most:
            raise ValueError(f"digits: expected 1 to {most} for {self.value_kind}, got {self.digits!r}")
        # Twice as many as needed, so that drawing until all are distinct ends soon.
        if self.digits == 1 and self.keys * self.values > 5:
            raise ValueError(f"digits: expected at least 2 for {self.keys * self.values} distinct values, got 1")
        combinations = len(self.key_words.adjectives) * len(self.key_words.nouns)
        if combinations < self.keys:
            raise ValueError(f"key_words: expected words for {self.keys} distinct keys, got {combinations}. Give more.")
        if isinstance(self.encoder, WordVocabulary):
            words = self.encoder.unknown_words(" ".join((*_PROTOCOL, *sum(self.key_words, ()))))
            if words:
                raise ValueError(
                    f"encoder: expected it to know the words of the task, it lacks {', '.join(words[:5])}. Use "
                    "read_key_words(vocabulary), and WordVocabulary.count(also=NEEDLE_TEXTS)."
                )
        # The longest words stand for all: so a length that is too small is told here and not while training.
        key = "-".join(max(words, key=lambda word: len(self.encoder.encode(" " + word))) for words in self.key_words)
        value = self._draw_value(torch.Generator().manual_seed(0))
        self._check_room(self._parts([key] * self.keys, [value] * (self.keys * self.values)))

    @classmethod
    def preset(cls, kind: str, **settings: Any) -> Needles:
        """One of the tasks of Table 1 by name; see `KINDS`.

        Args:
            kind: "single_1", "single_2", "single_3", "multi_key_1", "multi_query" or "multi_value".
            settings: the fields; `haystack` is needed by all but single_1.

        Raises:
            ValueError: if there is no such task.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}; got {kind!r}")
        if kind != "single_1" and "haystack" not in settings:
            raise ValueError(f"kind {kind!r} needs essays for a haystack; give haystack=Texts.novels('train')")
        return cls(**{**KINDS[kind], **settings})

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        return examples([self._row(generator) for _ in range(count)], self.length)

    def _row(self, generator: torch.Generator) -> list[tuple[np.ndarray, bool]]:
        keys: dict[str, None] = {}
        while len(keys) < self.keys:
            adjective, noun = (words[_below(len(words), generator)] for words in self.key_words)
            keys[f"{adjective}-{noun}"] = None
        values: dict[str, None] = {}
        while len(values) < self.keys * self.values:
            values[self._draw_value(generator)] = None
        preamble, needles, question, answer = self._parts(list(keys), list(values))
        room = self._check_room((preamble, needles, question, answer))
        filler = fill(self.haystack, self.encoder, room, generator)
        # Which needle comes first; those of one key keep the order in which they are asked.
        order = torch.randperm(len(needles), generator=generator) // self.values
        left = {key: iter(needles[key * self.values : (key + 1) * self.values]) for key in range(self.keys)}
        pieces = [next(left[int(key)]) for key in order]
        gaps = len(filler) + 1
        if gaps >= len(needles):
            places = torch.randperm(gaps, generator=generator)[: len(needles)]
        else:
            places = torch.randint(gaps, (len(needles),), generator=generator)
        context = hide(filler, pieces, places.sort().values.tolist())
        return [(piece, False) for piece in (preamble, *context, question)] + answer

    def _parts(
        self, keys: list[str], values: list[str]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, list[tuple[np.ndarray, bool]]]:
        """Preamble, needles by key and value, question, and the answer; the first keys are asked."""
        encode = self.encoder.encode
        kind = self.value_kind.removesuffix("s")
        asked = keys[: self.queries]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        preamble, question = ONE if self.queries * self.values == 1 else SEVERAL
        needles = [
            encode(" " + NEEDLE.format(kind=kind, key=keys[number // self.values], value=value))
            for number, value in enumerate(values)
        ]
        answer: list[tuple[np.ndarray, bool]] = []
        for value in values[: self.queries * self.values]:
            answer += [(encode(","), False)] * bool(answer) + [(encode(" " + value), True)]
        return (
            encode(preamble.format(kind=kind)),
            needles,
            encode(" " + question.format(kind=kind, query=query)),
            answer,
        )

    def _check_room(self, parts: tuple[np.ndarray, list[np.ndarray], np.ndarray, list[tuple[np.ndarray, bool]]]) -> int:
        """Tokens left for filler."""
        preamble, needles, question, answer = parts
        needed = sum(len(ids) for ids in (preamble, *needles, question, *(ids for ids, _ in answer)))
        if self.length < needed:
            raise ValueError(
                f"length: expected at least {needed}, for needles and question without filler; got {self.length}"
            )
        return self.length - needed

    def _draw_value(self, generator: torch.Generator) -> str:
        assert self.digits is not None
        if self.value_kind == "numbers":
            low = 10 ** (self.digits - 1)
            return str(low + _below(9 * low, generator))
        while True:
            text = "".join("0123456789abcdef"[_below(16, generator)] for _ in range(32))
            # Version 4: its digit is 4, and the first of the next group is 8, 9, a or b.
            text = text[:12] + "4" + text[13:16] + "89ab"[_below(4, generator)] + text[17:]
            text = text[: self.digits]
            # A few letters alone could be a word.
            if not text.isalpha():
                groups = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
                return "-".join(group for group in groups if group)


def mark_values(logits: Tensor, targets: Tensor) -> Answers:
    """Counts values, where `mark` counts tokens: one answer is a run of places that are asked, right if all are.

    Args:
        logits: (B, T, V).
        targets: (B, T).
    """
    asked = targets != IGNORED
    wrong = asked & (logits.argmax(-1) != targets)
    before = torch.nn.functional.pad(asked[:, :-1], (1, 0))
    run = (asked & ~before).flatten().cumsum(0)
    runs = int(run[-1]) if len(run) else 0
    wrong_runs = len(run[wrong.flatten()].unique())
    some = asked.any(1)
    whole = some & ~wrong.any(1)
    return Answers(right=runs - wrong_runs, asked=runs, whole=int(whole.sum()), sequences=int(some.sum()))


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator))
