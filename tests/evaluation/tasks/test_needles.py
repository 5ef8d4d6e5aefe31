"""Needles are found again in the decoded text by regular expressions, which know nothing of how they got there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.evaluation.tasks import (
    IGNORED,
    NEEDLE_TEXTS,
    Answers,
    Needles,
    Noise,
    Texts,
    WordVocabulary,
    mark_values,
    read_key_words,
)
from nestlearn.evaluation.tasks.needles import KINDS, KeyWords
from nestlearn.training.tokenizers import ByteTokenizer

TALES = ["It rained. Nobody came to the hill. Why? The cow slept, as cows do. Then it was night. So they went."] * 2
KEY_WORDS = KeyWords(("quick", "sad", "tall", "low"), ("otter", "hill", "lamp", "sea", "cow"))
NEEDED = [*TALES, *NEEDLE_TEXTS, *(" ".join(words) for words in KEY_WORDS)]
VOCABULARY = WordVocabulary.count(TALES, size=300, also=NEEDED)
NEEDLE = re.compile(r"one of the special magic (number|uuid)s for (\w+ - \w+) is : ([0-9a-f -]+) \.")
WHOLE = re.compile(
    r"(a special magic (?P<one>\w+) is|some special magic (?P<some>\w+)s are) hidden within the following text \. make "
    r"sure to memorize it \. i will quiz you about the (?P<again>\w+) afterwards \.(?P<context> .*)? what (is|are all) "
    r"the special magic (?P<asked>\w+) for (?P<query>.+) mentioned in the provided text \? the special magic "
    r"(?P=asked) for (?P=query) mentioned in the provided text (is|are) (?P<answer>[0-9a-f ,-]+)"
)


def make(kind: str = "single_1", **settings: Any) -> Needles:
    haystack = {} if kind == "single_1" else {"haystack": Texts(TALES)}
    defaults: dict[str, Any] = {"length": 240, "encoder": VOCABULARY, "key_words": KEY_WORDS, **haystack}
    return Needles.preset(kind, **{**defaults, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(row: torch.Tensor) -> re.Match[str]:
    found = WHOLE.fullmatch(VOCABULARY.decode(row.tolist()))
    assert found is not None, VOCABULARY.decode(row.tolist())
    return found


def values_of(found: re.Match[str]) -> list[str]:
    """What has to be answered, from the text alone."""
    needles = NEEDLE.findall(found["context"] or "")
    keys = re.split(r" , (?:and )?", found["query"])
    return [value for asked in keys for _, key, value in needles if key == asked]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_value_of_the_needle(kind: str) -> None:
    digits = 6 if kind == "single_3" else 3
    task = make(kind, digits=digits)
    tokens, targets, lengths = task.sample(30, seeded())
    assert tokens.shape == targets.shape == (30, 240)
    assert lengths is None
    for row, target in zip(tokens, targets, strict=True):
        found = read(row)
        needles = NEEDLE.findall(found["context"])
        wanted = {"single_1": (1, 1), "single_2": (1, 1), "single_3": (1, 1), "multi_key_1": (4, 1),
                  "multi_query": (4, 4), "multi_value": (4, 4)}[kind]  # fmt: skip
        expected = values_of(found)
        assert (len(needles), len(expected)) == wanted
        assert found["answer"] == " , ".join(expected)
        assert {sort for sort, _, _ in needles} == {"uuid" if kind == "single_3" else "number"}
        assert len({value for _, _, value in needles}) == len(needles), "two needles with one value"
        assert len({key for _, key, _ in needles}) == (1 if kind in ("multi_value",) else len(needles))
        plural = "s" if kind in ("multi_query", "multi_value") else ""
        assert found["asked"] == found["again"] == needles[0][0] + plural
        assert all(len(re.sub(r"[ -]", "", value)) == digits for value in expected)
        # Asked is every token of a value, one place before it stands, and no comma.
        shown = [(place, int(target[place])) for place in range(240) if target[place] != IGNORED]
        answer = VOCABULARY.encode(found["answer"]).tolist()
        comma = VOCABULARY.ids[","]
        assert shown == [(239 - len(answer) + i, token) for i, token in enumerate(answer) if token != comma]
        assert VOCABULARY.unknown not in row


@pytest.mark.parametrize("kind", ["single_1", "single_2"])
def test_filler_holds_no_other_needle_and_is_that_of_the_haystack(kind: str) -> None:
    filler = Noise.text * 60 if kind == "single_1" else " ".join(TALES)
    allowed = set(VOCABULARY.encode(filler).tolist())
    for row in make(kind).sample(10, seeded()).tokens:
        rest = NEEDLE.sub("", read(row)["context"], count=1)
        assert "magic" not in rest
        assert set(VOCABULARY.encode(rest).tolist()) <= allowed


def test_needles_stand_between_sentences_at_all_depths() -> None:
    depths = []
    for row in make(length=400).sample(300, seeded()).tokens:
        context = read(row)["context"]
        needle = NEEDLE.search(context)
        assert needle is not None
        before = context[: needle.start()].strip()
        assert before == "" or before.endswith(".")
        depths.append(needle.start() / (len(context) - len(needle[0])))
    quarters = Counter(min(int(4 * depth), 3) for depth in depths)
    assert all(50 <= quarters[quarter] <= 100 for quarter in range(4)), quarters
    assert min(depths) < 0.01
    assert max(depths) > 0.99


def test_the_asked_key_stands_anywhere_among_the_others() -> None:
    for kind in ("multi_key_1", "multi_query"):
        places = Counter()
        for row in make(kind).sample(200, seeded()).tokens:
            found = read(row)
            keys = [key for _, key, _ in NEEDLE.findall(found["context"])]
            places[keys.index(re.split(r" , (?:and )?", found["query"])[0])] += 1
        assert all(30 <= places[place] <= 70 for place in range(4)), places


def test_keys_and_values_are_spread() -> None:
    keys, values = Counter(), Counter()
    for row in make(digits=1).sample(400, seeded()).tokens:
        _, key, value = NEEDLE.findall(read(row)["context"])[0]
        keys[key] += 1
        values[value] += 1
    assert len(keys) == 20
    assert set(values) == set("123456789")  # RULER's numbers begin with 1 to 9
    assert max(values.values()) < 75


def test_uuids_are_of_version_4_and_cut_from_the_left() -> None:
    pattern = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for row in make("single_3").sample(20, seeded()).tokens:
        assert re.fullmatch(pattern, read(row)["answer"].replace(" ", ""))
    for row in make("single_3", digits=10).sample(20, seeded()).tokens:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{2}", read(row)["answer"].replace(" ", ""))
    for row in make("single_3", digits=1).sample(20, seeded()).tokens:
        assert re.fullmatch("[0-9]", read(row)["answer"])


def test_the_seven_digits_of_ruler_are_the_default() -> None:
    for row in make().sample(10, seeded()).tokens:
        assert re.fullmatch("[1-9]( [0-9]){6}", read(row)["answer"])


def test_bytes_give_rulers_text_as_it_is() -> None:
    task = make("multi_value", encoder=ByteTokenizer(), length=1000, values=2, digits=4)
    tokens, targets, _ = task.sample(5, seeded())
    for row, target in zip(tokens, targets, strict=True):
        text = ByteTokenizer().decode(row.tolist())
        found = re.findall(r"One of the special magic numbers for (\w+-\w+) is: (\d{4})\.", text)
        assert [key for key, _ in found] == [found[0][0]] * 2
        values = [value for _, value in found]
        # The space before a value is a byte of the answer.
        asked = "".join(chr(int(byte)) if byte != IGNORED else "_" for byte in target)
        assert asked.strip("_") == f" {values[0]}_ {values[1]}"
        assert text.endswith(
            f"What are all the special magic numbers for {found[0][0]} mentioned in the provided text? The special "
            f"magic numbers for {found[0][0]} mentioned in the provided text are {values[0]}, {values[1]}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_sequences(kind: str) -> None:
    task = make(kind)
    one, same, other = (task.sample(3, seeded(seed)) for seed in (1, 1, 2))
    assert one.tokens.equal(same.tokens)
    assert one.targets.equal(same.targets)
    assert not one.tokens.equal(other.tokens)
    generator = seeded(1)
    assert task.sample(3, generator).tokens.equal(one.tokens)
    assert not task.sample(3, generator).tokens.equal(one.tokens)


def test_a_length_without_room_for_filler_is_the_shortest() -> None:
    with pytest.raises(ValueError, match=r"length: expected at least \d+, .* got 1") as caught:
        make("multi_query", length=1, digits=2)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found is not None
    shortest = int(found[1])
    for row in make("multi_query", length=shortest, digits=2).sample(5, seeded()).tokens:
        assert NEEDLE.sub("", read(row)["context"]).strip() == ""
    with pytest.raises(ValueError, match=f"at least {shortest}"):
        make("multi_query", length=shortest - 1, digits=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length: expected a whole number of at least 1, got 0"),
        ({"keys": 1.5}, "keys: expected a whole number"),
        ({"values": True}, "values: expected a whole number"),
        ({"queries": 2}, "queries: expected at most keys = 1, got 2"),
        ({"value_kind": "words"}, "value_kind: expected one of"),
        ({"digits": 0}, "digits: expected 1 to 18 for numbers, got 0"),
        ({"digits": 33, "value_kind": "uuids"}, "digits: expected 1 to 32 for uuids, got 33"),
        ({"digits": 1, "values": 6}, "digits: expected at least 2 for 6 distinct values"),
        ({"keys": 21}, "key_words: expected words for 21 distinct keys, got 20"),
        ({"key_words": KeyWords(("quick", "swift"), ("otter",))}, "it lacks swift"),
        ({"encoder": WordVocabulary.count(TALES, size=100)}, "it lacks one, of, special, magic"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_unknown_kinds_and_missing_essays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of 'single_1'.*got 'single_4'"):
        Needles.preset("single_4", length=100, encoder=VOCABULARY, key_words=KEY_WORDS)
    with pytest.raises(ValueError, match="needs essays"):
        Needles.preset("single_2", length=100, encoder=VOCABULARY, key_words=KEY_WORDS)


def test_values_are_counted_and_not_their_tokens() -> None:
    no = IGNORED
    targets = torch.tensor(
        [[no, 1, 2, no, 3, 4], [no, no, no, no, no, no], [1, 2, no, 3, no, 4], [1, no, no, no, no, 2]]
    )
    said = torch.tensor([[9, 1, 2, 9, 9, 9], [9, 9, 9, 9, 9, 9], [1, 2, 9, 3, 9, 4], [9, 9, 9, 9, 9, 2]])
    logits = torch.nn.functional.one_hot(said, 10).float()
    # Row 0: 1 of 2 values; row 2: 3 of 3; row 3: 1 of 2, and its last value is not one with row 2's end.
    assert mark_values(logits, targets) == Answers(right=5, asked=7, whole=1, sequences=3)
    assert mark_values(logits[:0], targets[:0]) == Answers(0, 0, 0, 0)


def write_words(folder: Path) -> Path:
    (folder / "wonderwords").mkdir(parents=True)
    (folder / "wonderwords" / "adjectivelist.txt").write_text("quick\nsad\n\nswift\ngreen\n", encoding="utf-8")
    (folder / "wonderwords" / "nounlist.txt").write_text("otter\nhill\nnumber\nTV\nhill\n", encoding="utf-8")
    return folder


def test_key_words_are_those_that_the_vocabulary_knows(tmp_path: Path) -> None:
    folder = write_words(tmp_path / "data")
    # Words of the task's own sentences (green, number) are no keys.
    assert read_key_words(data_root=folder) == (("quick", "sad", "swift"), ("TV", "hill", "otter"))
    vocabulary = WordVocabulary.count(["otter otter hill sad quick quick"], size=100)
    assert read_key_words(vocabulary, data_root=folder) == (("quick", "sad"), ("otter", "hill"))
    assert read_key_words(vocabulary, limit=1, data_root=folder) == (("quick",), ("otter",))
    with pytest.raises(
        ValueError, match=r"adjectivelist\.txt: expected at least one word that a vocabulary of 20 words"
    ):
        read_key_words(WordVocabulary.count(["otter"], size=100), data_root=folder)
    with pytest.raises(FileNotFoundError, match="wonderwords"):
        read_key_words(data_root=tmp_path)


def test_needles_in_novels(data_dir: Path) -> None:
    novels = Texts.novels("test", data_dir)
    vocabulary = WordVocabulary.count(novels.documents, size=1024, also=NEEDLE_TEXTS)
    key_words = read_key_words(vocabulary, data_root=data_dir)
    assert min(map(len, key_words)) > 50
    task = Needles.preset("multi_key_1", length=600, encoder=vocabulary, key_words=key_words, haystack=novels)
    for row in task.sample(10, seeded()).tokens:
        found = WHOLE.fullmatch(vocabulary.decode(row.tolist()))
        assert found is not None
        assert [found["answer"]] == values_of(found)
        assert len(NEEDLE.findall(found["context"])) == 4
