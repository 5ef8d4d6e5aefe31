"""Formal languages: the oracle lists every short string of a language and looks up what may follow a prefix."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch

from nestlearn.evaluation.tasks import IGNORED, Examples
from nestlearn.evaluation.tasks.formal_languages import BINS, LANGUAGES, FormalLanguage

END = "$"


def is_balanced(string: str) -> bool:
    """Both kinds of brackets, each looked at alone, cancel out."""
    for pair, other in (("()", "[]"), ("[]", "()")):
        rest = "".join(symbol for symbol in string if symbol not in other)
        while pair in rest:
            rest = rest.replace(pair, "")
        if rest:
            return False
    return True


def is_blocks(string: str, letters: str) -> bool:
    n = len(string) // len(letters)
    return n > 0 and string == "".join(letter * n for letter in letters)


# Alphabet, membership, and the longest strings that the oracle is asked about.
ORACLES: dict[str, tuple[str, Callable[[str], bool], int]] = {
    "parity": ("01", lambda s: s.count("1") % 2 == 0, 8),
    "(aa)*": ("a", lambda s: re.fullmatch("(aa)*", s) is not None, 14),
    "(abab)*": ("ab", lambda s: re.fullmatch("(abab)*", s) is not None, 12),
    "a^n b^n": ("ab", lambda s: is_blocks(s, "ab"), 10),
    "a^n b^n c^n": ("abc", lambda s: is_blocks(s, "abc"), 6),
    "shuffle-2": ("()[]", is_balanced, 6),
}


@cache
def strings_of(language: str, length: int) -> tuple[str, ...]:
    alphabet, is_member, _ = ORACLES[language]
    every = map("".join, itertools.product(alphabet, repeat=length))
    return tuple(string for string in every if is_member(string))


@cache
def what_may_follow(language: str) -> dict[str, set[str]]:
    """For every prefix of a string of the oracle's lengths, by looking at all strings of up to 4 symbols more.

    4 are enough: whatever may follow such a prefix, some string begins with both and is at most that much longer.
    """
    longest = ORACLES[language][2]
    found: dict[str, set[str]] = {}
    for length in range(longest + 5):
        for string in strings_of(language, length):
            for place, symbol in enumerate(string + END):
                found.setdefault(string[:place], set()).add(symbol)
    return found


def has_strings_of(language: str, length: int) -> bool:
    """Whether the language has any; if so, one of these few candidates is one."""
    alphabet, is_member, _ = ORACLES[language]
    blocks = "".join(letter * (length // len(alphabet)) for letter in alphabet)
    candidates = (alphabet[0] * length, alphabet[:2] * (length // 2), blocks)
    return any(len(string) == length and is_member(string) for string in candidates)


def draw(language: str, shortest: int, longest: int, count: int = 300, seed: int = 0) -> Examples:
    task = FormalLanguage(language=language, shortest=shortest, longest=longest)
    return task.sample(count, torch.Generator().manual_seed(seed))


def read(language: str, examples: Examples) -> list[tuple[str, list[set[str]]]]:
    """Each row's string, and the sets that its targets name: before the first symbol, after the first, ..."""
    assert examples.lengths is not None
    alphabet = ORACLES[language][0]
    rows = []
    for tokens, targets, length in zip(*(part.tolist() for part in examples), strict=True):
        assert tokens[0] == 1
        string = "".join(alphabet[token - 2] for token in tokens[1:length])
        assert min(tokens[1:length]) >= 2
        assert set(tokens[length:]) <= {0}
        assert set(targets[length:]) <= {IGNORED}
        rows.append((string, [set(LANGUAGES[language].sets[target]) for target in targets[:length]]))
    return rows


@pytest.mark.parametrize("language", ORACLES)
def test_targets_are_what_may_follow_by_brute_force(language: str) -> None:
    longest = ORACLES[language][2]
    expected = what_may_follow(language)
    asked = set()
    for string, sets in read(language, draw(language, 1, longest)):
        assert string in strings_of(language, len(string))
        assert sets == [expected[string[:place]] for place in range(len(string) + 1)], string
        asked.update(map(frozenset, sets))
    assert asked == set(map(frozenset, LANGUAGES[language].sets)), "a class never occurs"


@pytest.mark.parametrize("language", ORACLES)
def test_long_strings_agree_with_their_targets(language: str) -> None:
    alphabet, is_member, _ = ORACLES[language]
    for string, sets in read(language, draw(language, *BINS[1], count=40)):
        assert is_member(string)
        for place, may_follow in enumerate(sets):
            assert (END in may_follow) == (is_member(string[:place])), (string, place)
            assert may_follow <= {*alphabet, END}
        assert all(symbol in may_follow for symbol, may_follow in zip(string + END, sets, strict=True))


@pytest.mark.parametrize("language", ORACLES)
@pytest.mark.parametrize(("shortest", "longest"), [*BINS, (3, 14)])
def test_every_length_of_the_range_occurs_about_as_often(language: str, shortest: int, longest: int) -> None:
    lengths = draw(language, shortest, longest, count=4000).lengths
    assert lengths is not None
    counts = Counter((lengths - 1).tolist())
    assert set(counts) == {length for length in range(shortest, longest + 1) if has_strings_of(language, length)}
    mean = 4000 / len(counts)
    assert all(abs(times - mean) < 5 * mean**0.5 for times in counts.values())


@pytest.mark.parametrize(("language", "length"), [("shuffle-2", 6), ("shuffle-2", 4), ("parity", 5)])
def test_all_strings_of_a_length_are_equally_likely(language: str, length: int) -> None:
    every = strings_of(language, length)
    mean = 200
    counts = Counter(string for string, _ in read(language, draw(language, length, length, count=mean * len(every))))
    assert set(counts) == set(every)
    # chi squared: its mean is the number of degrees of freedom, its variance twice that
    freedom = len(every) - 1
    statistic = sum((times - mean) ** 2 / mean for times in counts.values())
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("language", ORACLES)
def test_the_seed_decides(language: str) -> None:
    first, again, other = (draw(language, 1, 50, count=30, seed=seed) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("language", ORACLES)
def test_the_vocabulary_holds_tokens_and_targets(language: str) -> None:
    task = FormalLanguage(language=language)
    examples = task.sample(200, torch.Generator().manual_seed(0))
    assert examples.tokens.dtype == examples.targets.dtype == torch.int64
    highest = max(int(examples.tokens.max()), int(examples.targets.max()))
    assert highest == task.vocab_size - 1
    assert (task.shortest, task.longest) == BINS[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "palindromes"}, "language: expected one of 'parity', .*; got 'palindromes'"),
        ({"language": "parity", "shortest": 0}, "shortest: expected a whole number of at least 1, got 0"),
        ({"language": "parity", "longest": 2.5}, "longest: expected a whole number of at least 1, got 2.5"),
        ({"language": "parity", "shortest": True}, "shortest: expected a whole number of at least 1, got True"),
        ({"language": "(abab)*", "shortest": 5, "longest": 7}, r"no string of 5 to 7 symbols; .*a multiple of 4"),
        ({"language": "parity", "shortest": 9, "longest": 8}, r"no string of 9 to 8 symbols"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormalLanguage(**settings)
