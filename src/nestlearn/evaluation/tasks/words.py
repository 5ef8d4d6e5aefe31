"""A closed vocabulary of words, for models that are trained from scratch on tasks made of text.

Text is lower-cased, and all apostrophes are the straight one. A token is a word (with its apostrophes), one digit, or
one mark of punctuation; what mixes digits and the letters a to f, such as a uuid, is spelt character by character. So a
number is never one token, and the names and facts of the tasks are the same word wherever they stand in a sentence.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import numpy as np

from nestlearn.io import atomic_write_json, load_json

__all__ = ["PADDING", "UNKNOWN", "Encoder", "WordVocabulary", "split_words"]

PADDING = "<pad>"
UNKNOWN = "<unk>"

# What every vocabulary begins with: padding is token 0 (`Examples`), the rest spells numbers and uuids.
FIXED = (PADDING, UNKNOWN, *"0123456789abcdef", "-")

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d|[^\w\s]|_")
_SPELT = re.compile(r"(?<![^\W_])(?=[a-f-]*\d)[0-9a-f]+(?:-[0-9a-f]+)*(?![^\W_])")
_DIGIT = re.compile(r"\d")


class Encoder(Protocol):
    """What the tasks need of a vocabulary; every `nestlearn.training.tokenizers.Tokenizer` is one as well.

    Text is encoded sentence by sentence, each but the first with a space before it.
    """

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (T,) of an unsigned integer type."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        ...


def split_words(text: str) -> list[str]:
    """Return the tokens of `text` as strings."""
    text = text.lower().replace("’", "'")
    if _DIGIT.search(text):
        text = _SPELT.sub(lambda found: " ".join(found[0]), text)
    return _TOKEN.findall(text)


@dataclass(frozen=True, kw_only=True)
class WordVocabulary:
    """Words and their ids; a word that is not among them is `UNKNOWN`.

    Attributes:
        words: (vocab_size,) the token of each id; begins with `FIXED`, and none comes twice.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        if self.words[: len(FIXED)] != FIXED:
            raise ValueError(
                f"words: expected to begin with {', '.join(FIXED)}; got {self.words[: len(FIXED)]}. "
                "WordVocabulary.count makes a vocabulary out of text."
            )
        twice = [word for word, count in Counter(self.words).items() if count > 1]
        if twice:
            raise ValueError(f"words: expected each once, got {twice[:5]} more than once. Leave out the later ones.")
        broken = [word for word in self.words[len(FIXED) :] if split_words(word) != [word]]
        if broken:
            raise ValueError(
                f"words: expected single lower-case words or marks, got {broken[:5]}. Split them with split_words."
            )

    @classmethod
    def count(
        cls, documents: Iterable[str], *, size: int, also: Iterable[str] = (), characters: int = 100_000
    ) -> WordVocabulary:
        """The most frequent words of documents, those of equal count in alphabetical order.

        Args:
            documents: texts to count in.
            size: ids at most, `FIXED` and the words of `also` included; fewer if the documents have fewer words.
            also: texts all of whose words are in the vocabulary, such as a task's own sentences.
            characters: only so many of each document's first characters are counted: of ELTeC's 57 million 9 million,
                in two seconds. A part of every novel says more about what is frequent than all of a few.

        Raises:
            ValueError: if `size` has no room for what must be in.
        """
        needed = list(dict.fromkeys(chain(FIXED, *(split_words(text) for text in also))))
        if size < len(needed):
            raise ValueError(
                f"size: expected at least {len(needed)}, for {len(FIXED)} fixed tokens and the words of 'also'; "
                f"got {size}. Give a larger size, or fewer texts in 'also'."
            )
        counts: Counter[str] = Counter()
        for text in documents:
            counts.update(split_words(text[:characters]))
        known = set(needed)
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words=tuple((needed + [word for word in frequent if word not in known])[:size]))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: number for number, word in enumerate(self.words)}

    @property
    def unknown(self) -> int:
        """The id of `UNKNOWN`."""
        return FIXED.index(UNKNOWN)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (T,) of the smallest unsigned integer type that holds every id."""
        ids, unknown = self.ids, self.unknown
        numbers = [ids.get(word, unknown) for word in split_words(text)]
        return np.array(numbers, dtype=np.min_scalar_type(self.vocab_size - 1))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of ids, with a space between them.

        Raises:
            ValueError: for an id that is not below `vocab_size`.
        """
        numbers = [int(number) for number in ids]
        wrong = [number for number in numbers if not 0 <= number < self.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]}: expected 0 to {self.vocab_size - 1}. Is it from another vocabulary?"
            )
        return " ".join(self.words[number] for number in numbers)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of `text` that the vocabulary lacks, each once."""
        return list(dict.fromkeys(word for word in split_words(text) if word not in self.ids))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as JSON; atomic, errors as `nestlearn.io.atomic_path`."""
        atomic_write_json(path, {"words": list(self.words)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordVocabulary:
        """Read what `save` wrote.

        Raises: FileNotFoundError, or ValueError that names the file.
        """
        found = load_json(path)
        words = found.get("words") if isinstance(found, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path}: expected an object whose field 'words' lists strings. Is it the right file?")
        try:
            return cls(words=tuple(words))
        except ValueError as error:
            raise ValueError(f"{path} is no word vocabulary: {error}") from None
