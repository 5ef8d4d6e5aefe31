"""Text becomes words, digits and marks, and a vocabulary is counted, kept and refused as it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.evaluation.tasks import WordVocabulary
from nestlearn.evaluation.tasks.words import FIXED, PADDING, UNKNOWN, split_words

TEXTS = ["The cat sat. The cat ran!", "A dog sat; the dog isn't the cat."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "The special magic numbers for quick-otter is: 407.",
            "the special magic numbers for quick - otter is : 4 0 7 .",
        ),
        ("“Don’t!” said St. Ives’s aunt—", "“ don't ! ” said st . ives's aunt —"),
        ("Café_au lait,\n\n 3rd", "café _ au lait , 3 rd"),
        ("4fb2c1d0-abcd-4e1f-9abc-00deadbeef00.", " ".join("4fb2c1d0-abcd-4e1f-9abc-00deadbeef00.")),
        ("a bad face-to-face fee in x86", "a bad face - to - face fee in x 8 6"),
        ("a4 of b", "a 4 of b"),
        ("  \n", ""),
    ],
)
def test_words_digits_and_marks(text: str, words: str) -> None:
    assert split_words(text) == words.split()


@given(st.text(max_size=60))
def test_no_letter_or_digit_is_lost(text: str) -> None:
    def seen(pieces: str) -> str:
        return "".join(char for char in pieces.lower().replace("’", "'") if not char.isspace())

    words = split_words(text)
    # Combining marks and the like are neither letters nor marks of punctuation for the pattern; letters and digits are.
    lost = Counter(seen(text)) - Counter("".join(words))
    assert not any(char.isalpha() or char.isdecimal() for char in lost)
    assert all(len(word) == 1 or not any(char.isdigit() and char.isdecimal() for char in word) for word in words)


def test_vocabulary_is_the_most_frequent_words() -> None:
    vocabulary = WordVocabulary.count(TEXTS, size=len(FIXED) + 5)
    # the 4, cat 3, "." and dog and sat 2; of equal count in alphabetical order; "a" is fixed already.
    assert vocabulary.words == (*FIXED, "the", "cat", ".", "dog", "sat")
    assert vocabulary.vocab_size == len(FIXED) + 5
    assert WordVocabulary.count(reversed(TEXTS), size=len(FIXED) + 5) == vocabulary


def test_only_the_first_characters_of_each_document_are_counted() -> None:
    vocabulary = WordVocabulary.count(TEXTS, size=100, characters=7)
    assert set(vocabulary.words) - set(FIXED) == {"the", "cat", "dog", "s"}


def test_words_of_also_are_in_before_frequent_ones() -> None:
    vocabulary = WordVocabulary.count(TEXTS, size=len(FIXED) + 3, also=["Zebra zebra", "cat"])
    assert vocabulary.words[len(FIXED) :] == ("zebra", "cat", "the")
    with pytest.raises(ValueError, match=f"size: expected at least {len(FIXED) + 2}"):
        WordVocabulary.count(TEXTS, size=len(FIXED) + 1, also=["zebra cat"])


def test_ids_and_back() -> None:
    vocabulary = WordVocabulary.count(TEXTS, size=100)
    ids = vocabulary.encode("The cat isn't a yak: 42")
    assert ids.dtype == np.uint8
    assert vocabulary.decode(ids.tolist()) == f"the cat isn't a {UNKNOWN} {UNKNOWN} 4 2"
    assert ids.tolist()[4] == vocabulary.unknown == 1
    assert vocabulary.words[0] == PADDING
    # What text spells like a special token is not one.
    assert 0 not in vocabulary.encode(PADDING)
    assert vocabulary.unknown_words("a yak, a yak") == ["yak", ","]
    assert vocabulary.encode("").shape == (0,)
    with pytest.raises(ValueError, match="token id 99: expected 0 to"):
        vocabulary.decode([99])


def test_large_vocabulary_has_wide_ids() -> None:
    many = " ".join(f"{a}{b}{c}z" for a in "ghijklmno" for b in "ghijklmno" for c in "ghijklmno")
    vocabulary = WordVocabulary.count([many], size=5000)
    assert vocabulary.encode("ghgz").dtype == np.uint16
    assert vocabulary.decode(vocabulary.encode(many).tolist()) == many


def test_saved_vocabulary_is_the_same(tmp_path: Path) -> None:
    vocabulary = WordVocabulary.count(["naïve “cats”"], size=100)
    vocabulary.save(tmp_path / "deep" / "words.json")
    assert WordVocabulary.load(tmp_path / "deep" / "words.json") == vocabulary
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["words.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["x"], "field 'words' lists strings"),
        ({"words": [1]}, "field 'words' lists strings"),
        ({"words": ["the"]}, "no word vocabulary: words: expected to begin with"),
        ({"words": [*FIXED, "a"]}, "more than once"),
        ({"words": [*FIXED, "two words"]}, "single lower-case words"),
        ({"words": [*FIXED, "The"]}, "single lower-case words"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        WordVocabulary.load(path)
    assert "words.json" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"words\.json"):
        WordVocabulary.load(tmp_path / "words.json")


def test_common_words_of_the_novels(data_dir: Path) -> None:
    from nestlearn.evaluation.tasks import Texts

    novels = Texts.novels("test", data_dir)
    vocabulary = WordVocabulary.count(novels.documents, size=1000)
    assert vocabulary.vocab_size == 1000
    assert {"the", "and", "said", ",", "."} <= set(vocabulary.words[: len(FIXED) + 60])
    ids = np.concatenate([vocabulary.encode(text[:100_000]) for text in novels.documents])
    assert (ids == vocabulary.unknown).mean() < 0.2
