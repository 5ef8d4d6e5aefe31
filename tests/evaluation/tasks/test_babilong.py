"""The facts are found again in the decoded text, and a small simulator of bAbI's world answers from them alone."""

from __future__ import annotations

import dataclasses
import gzip
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.evaluation.tasks import IGNORED, BABILong, Noise, Texts, WordVocabulary, mark
from nestlearn.evaluation.tasks.babilong import QUESTIONS, Story, find_stories, read_stories
from nestlearn.training.tokenizers import ByteTokenizer

WHO = "(mary|john|daniel|sandra|fred|bill|jeff)"
PLACE = "(bathroom|bedroom|garden|hallway|kitchen|office)"
THING = "(apple|football|milk)"
MOVE = re.compile(rf"{WHO} (?:went|went back|journeyed|travelled|moved) to the {PLACE} \.")
TAKE = re.compile(rf"{WHO} (?:got|took|grabbed|picked up) the {THING}(?: there)? \.")
DROP = re.compile(rf"{WHO} (?:dropped|discarded|left|put down) the {THING}(?: there)? \.")
GIVE = re.compile(rf"{WHO} (?:gave|handed|passed) the {THING} to {WHO} \.")
LIES = re.compile(rf"the {PLACE} is (north|south|east|west) of the {PLACE} \.")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def facts_of(text: str) -> list[tuple[str, ...]]:
    """(what happened, who, ...) in the order of the text."""
    found = [
        (event.start(), name, *event.groups())
        for name, pattern in (("move", MOVE), ("take", TAKE), ("drop", DROP), ("give", GIVE), ("lies", LIES))
        for event in pattern.finditer(text)
    ]
    return [fact[1:] for fact in sorted(found)]


def answer(text: str) -> str:
    """What bAbI's world says to the question at the end of `text`, decoded and lower-case, without its answer."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    seen: dict[str, list[str]] = {}
    gifts: list[tuple[str, str, str]] = []
    rooms: dict[tuple[str, str], str] = {}
    for name, *rest in facts_of(text):
        if name == "move":
            where[rest[0]] = rest[1]
        elif name == "take":
            holder[rest[1]] = rest[0]
        elif name == "drop":
            holder.pop(rest[1], None)
        elif name == "give":
            gifts.append((rest[0], rest[1], rest[2]))
            holder[rest[1]] = rest[2]
        else:
            rooms[rest[1], rest[2]] = rest[0]  # what is north of the garden
            rooms[OPPOSITE[rest[1]], rest[0]] = rest[2]
        for thing, person in holder.items():
            if person in where:
                seen.setdefault(thing, []).append(where[person])
    question = re.search(r"wh\w+ [\w ]+ \?$", text)[0]  # type: ignore[index]

    def asks(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, question)

    if m := asks(rf"where is {WHO} \?"):
        return where[m[1]]
    if m := asks(rf"where is the {THING} \?"):
        return seen[m[1]][-1]
    if m := asks(rf"where was the {THING} before the {PLACE} \?"):
        path = seen[m[1]]
        last = len(path) - 1 - path[::-1].index(m[2])
        return next(place for place in path[last::-1] if place != m[2])
    if m := asks(rf"what is (north|south|east|west) of the {PLACE} \?"):
        return rooms[m[1], m[2]]
    if m := asks(rf"what is the {PLACE} (north|south|east|west) of \?"):
        return rooms[OPPOSITE[m[2]], m[1]]
    if m := asks(rf"what did {WHO} give to {WHO} \?"):
        return next(thing for a, thing, b in gifts[::-1] if (a, b) == (m[1], m[2]))
    if m := asks(rf"who did {WHO} give the {THING} to \?"):
        return next(b for a, thing, b in gifts[::-1] if (a, thing) == (m[1], m[2]))
    if m := asks(rf"who gave the {THING}(?: to {WHO})? \?"):
        return next(a for a, thing, b in gifts[::-1] if thing == m[1] and m[2] in (None, b))
    if m := asks(rf"who received the {THING} \?"):
        return next(b for _, thing, b in gifts[::-1] if thing == m[1])
    raise AssertionError(f"no rule for {question!r}")


# Short stories of our own, in the format of bAbI.
STORIES = {
    "qa1": "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary went back to the garden.\n5 Where is Mary? \tgarden\t4\n"
    "1 Daniel travelled to the office.\n2 Sandra journeyed to the kitchen.\n3 Where is Sandra? \tkitchen\t2\n",
    "qa2": "1 Mary got the milk there.\n2 John moved to the bedroom.\n3 Mary travelled to the hallway.\n"
    "4 Where is the milk? \thallway\t1 3\n5 Mary put down the milk.\n6 Mary went to the garden.\n"
    "7 Where is the milk? \thallway\t5 3\n",
    "qa3": "1 Mary got the milk.\n2 Mary moved to the office.\n3 Mary went to the garden.\n4 Mary dropped the milk.\n"
    "5 Where was the milk before the garden? \toffice\t4 3 2\n",
    "qa4": "1 The hallway is east of the bathroom.\n2 The bedroom is west of the bathroom.\n"
    "3 What is the bathroom east of?\tbedroom\t2\n1 The office is north of the garden.\n"
    "2 The kitchen is north of the office.\n3 What is north of the garden?\toffice\t1\n",
    "qa5": "1 Fred picked up the football there.\n2 Fred gave the football to Jeff.\n"
    "3 What did Fred give to Jeff? \tfootball\t2\n4 Jeff handed the football to Bill.\n"
    "5 Who received the football? \tBill\t4\n6 Who gave the football to Jeff? \tFred\t2\n",
}  # fmt: skip
NAMES = {"qa1": "single-supporting-fact", "qa2": "two-supporting-facts", "qa3": "three-supporting-facts",
         "qa4": "two-arg-relations", "qa5": "three-arg-relations"}  # fmt: skip
TALES = [
    "It rained. Nobody came to the hill. Why? The cow slept in the garden. Then it was night. Where is Mary? So they "
    "went home, all of them. Mary went to the market."
]
# Here the novel tells facts of its own, one of them in the middle of a sentence.
TELLING = [TALES[0] + " Mary went to the garden. It rained. And then she said that Mary went to the garden again. Why?"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the real one: training stories above, test stories with the persons renamed."""
    root = tmp_path_factory.mktemp("data")
    for part in ("en", "en-10k"):
        (root / "babi" / part).mkdir(parents=True)
    for question, text in STORIES.items():
        part = "en" if question == "qa3" else "en-10k"
        (root / "babi" / part / f"{question}_{NAMES[question]}_train.txt").write_text(text, encoding="utf-8")
        other = text.replace("Mary", "Sandra").replace("Fred", "Mary")
        other = other.replace("kitchen", "bedroom").replace("garden", "kitchen").replace("hallway", "office")
        path = root / "babi" / "en" / f"{question}_{NAMES[question]}_test.txt.gz"
        path.write_bytes(gzip.compress(other.encode(), mtime=0))
        # en-10k has test files of its own, which are not the ones that are reported.
        (root / "babi" / "en-10k" / f"{question}_{NAMES[question]}_test.txt").write_text("", encoding="utf-8")
    return root


def words_of(stories: list[Story]) -> list[str]:
    return [" ".join((*story.facts, story.question, story.answer)) for story in stories]


def make(stories: list[Story], **settings: Any) -> BABILong:
    encoder = WordVocabulary.count(TALES, size=300, also=[*words_of(stories), *TELLING, Noise.text])
    return BABILong(**{"length": 120, "encoder": encoder, "stories": stories, "haystack": Texts(TALES), **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(task: BABILong, count: int) -> list[str]:
    """Every sequence says what the simulator says; returns the texts, without the answers."""
    tokens, targets, lengths = task.sample(count, seeded())
    assert tokens.shape == targets.shape == (count, task.length)
    assert lengths is None
    assert bool((targets[:, :-2] == IGNORED).all())
    assert bool((targets[:, -1] == IGNORED).all())
    assert targets[:, -2].equal(tokens[:, -1])
    texts = []
    for row in tokens:
        text = task.encoder.decode(row[:-1].tolist())
        assert answer(text) == task.encoder.decode(row[-1:].tolist()), text
        texts.append(text)
    return texts


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("side", ["train", "test"])
def test_the_world_agrees_with_the_target(stand_in: Path, question: str, side: Any) -> None:
    stories = find_stories(question, side=side, data_root=stand_in)
    for length in (60, 150):
        check(make(stories, length=length), 30)


def test_the_facts_are_those_of_the_story_in_order(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)
    assert stories == [
        Story(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom"),
        Story(("Mary moved to the bathroom.", "John went to the hallway.", "Mary went back to the garden."),
              "Where is Mary?", "garden"),
        Story(("Daniel travelled to the office.", "Sandra journeyed to the kitchen."), "Where is Sandra?", "kitchen"),
    ]  # fmt: skip
    expected = {
        (tuple(facts_of(" ".join(text.lower().replace(".", " .") for text in story.facts))), story.answer)
        for story in stories
    }
    task = make(stories, length=100)
    tokens = task.sample(60, seeded()).tokens
    found = {
        (tuple(facts_of(task.encoder.decode(row[:-1].tolist()))), task.encoder.decode(row[-1:].tolist()))
        for row in tokens
    }
    assert found == expected


def test_filler_holds_no_fact_but_may_name_the_persons(stand_in: Path) -> None:
    stories = find_stories("qa1", side="test", data_root=stand_in)
    told = [Story(("Mary went to the garden.", *story.facts), story.question, story.answer) for story in stories]
    texts = check(make(told, length=200, haystack=Texts(TELLING)), 40)
    for text in texts:
        assert len(re.findall("mary went to the garden", text)) == 1
        assert "again" not in text
    assert any("mary went to the market" in text for text in texts)


def test_every_length_from_the_facts_alone_on(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)[:1]
    # 6 + 6 tokens of facts, 4 of the question, 1 of the answer.
    (text,) = set(check(make(stories, length=17), 3))
    assert text == "mary moved to the bathroom . john went to the hallway . where is mary ?"
    for length in range(18, 40):
        for text in check(make(stories, length=length), 5):
            assert len(facts_of(text)) == 2
    with pytest.raises(ValueError, match="length: expected a story of at most 16 tokens, got none among 1"):
        make(stories, length=16)


def test_stories_that_are_too_long_are_passed_over(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)
    assert make(stories, length=17).num_stories == 2
    assert make(stories, length=24).num_stories == 3
    assert make(stories, length=24, most_facts=2).num_stories == 2
    assert all("garden" not in text for text in check(make(stories, length=17), 20))
    assert all(len(facts_of(text)) == 2 for text in check(make(stories, length=60, most_facts=2, haystack=Noise()), 20))
    with pytest.raises(ValueError, match="at most 60 tokens and at most 1 facts, got none among 3"):
        make(stories, length=60, most_facts=1)


def test_facts_are_spread_over_the_filler(stand_in: Path) -> None:
    story = Story(("Mary moved to the bathroom.",), "Where is Mary?", "bathroom")
    depths = [text.index("mary moved") / (len(text) - 42) for text in check(make([story], length=300), 300)]
    quarters = Counter(min(int(4 * depth), 3) for depth in depths)
    assert all(50 <= quarters[quarter] <= 100 for quarter in range(4)), quarters
    assert min(depths) < 0.02
    assert max(depths) > 0.95


def test_every_story_is_asked_about_as_often(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)
    task = make(stories)
    said = Counter(task.sample(300, seeded()).tokens[:, -1].tolist())
    assert len(said) == 3
    assert min(said.values()) > 70


def test_the_same_seed_gives_the_same_sequences(stand_in: Path) -> None:
    task = make(find_stories("qa2", side="train", data_root=stand_in))
    one, same, other = (task.sample(3, seeded(seed)) for seed in (1, 1, 2))
    assert one.tokens.equal(same.tokens)
    assert not one.tokens.equal(other.tokens)


def test_bytes_give_the_text_as_it_is(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)
    tokens, targets, _ = make(stories, length=300, encoder=ByteTokenizer()).sample(10, seeded())
    for row, target in zip(tokens, targets, strict=True):
        text = ByteTokenizer().decode(row.tolist())
        asked = "".join(chr(int(byte)) for byte in target if byte != IGNORED)
        assert re.search(r"[.?] Where is (Mary|Sandra)\?" + asked + "$", text)
        assert asked in {" bathroom", " garden", " kitchen"}


def test_training_and_test_stories_are_never_mixed(stand_in: Path) -> None:
    for question in QUESTIONS:
        train, test = (find_stories(question, side=side, data_root=stand_in) for side in ("train", "test"))  # type: ignore[arg-type]
        assert train == list(read_text(stand_in, STORIES[question]))
        assert not set(train) & set(test)


def read_text(folder: Path, text: str) -> list[Story]:
    path = folder / "stories.txt"
    path.write_text(text, encoding="utf-8")
    return read_stories(path)


def fact(number: int) -> str:
    return f"{number} Mary moved to the bathroom.\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("Mary moved.\n", 1, "expected a number, a space and a sentence"),
        (fact(2), 1, "expected number 1 or 1, got 2"),
        (fact(1) + "\n" + fact(3), 3, "expected number 1 or 2, got 3"),
        (fact(1) + fact(2) + "3 Where is Mary?\n", 3, "expected a tab and the answer"),
        (fact(1) + "2 Where is Mary? \t\t1\n", 2, "expected a question, a tab and one word"),
        (fact(1) + "2 Where is Mary? \tin the bathroom\t1\n", 2, "expected a question, a tab and one word"),
        (fact(1) + "2  \tbathroom\t1\n", 2, "expected a question, a tab and one word"),
        (fact(1) + "2 Where is Mary?\tbathroom\t1\n1 Where is Mary?\tbathroom\t1\n", 3, "a fact before the first"),
    ],
)
def test_broken_files_are_refused_with_their_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"stories\.txt, line {line}: .*{message}"):
        read_text(tmp_path, text)


def test_files_without_questions_and_missing_ones_are_refused(tmp_path: Path, stand_in: Path) -> None:
    with pytest.raises(ValueError, match=r"stories\.txt: expected at least one question"):
        read_text(tmp_path, fact(1))
    with pytest.raises(FileNotFoundError):
        read_stories(tmp_path / "none.txt")
    (tmp_path / "babi" / "en").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="qa1_"):
        find_stories("qa1", side="test", data_root=tmp_path)
    with pytest.raises(ValueError, match=r"question: expected one of qa1, .*got 'qa6'"):
        find_stories("qa6", side="test", data_root=stand_in)
    with pytest.raises(ValueError, match="side: expected 'train' or 'test'"):
        find_stories("qa1", side="valid", data_root=stand_in)  # type: ignore[arg-type]


def test_bad_settings_are_refused(stand_in: Path) -> None:
    stories = find_stories("qa1", side="train", data_root=stand_in)
    for settings, message in (
        ({"length": 0}, "length: expected a whole number of at least 1, got 0"),
        ({"length": None}, "length: expected a whole number"),
        ({"most_facts": 0}, "most_facts: expected a whole number"),
        ({"encoder": WordVocabulary.count(TALES, size=100)}, "it lacks daniel, travelled, office, john, hallway"),
    ):
        with pytest.raises(ValueError, match=message):
            make(stories, **settings)
    with pytest.raises(ValueError, match="got none among 0"):
        make([])


def test_guessing_is_marked_as_it_should(stand_in: Path) -> None:
    task = make(find_stories("qa1", side="train", data_root=stand_in))
    tokens, targets, _ = task.sample(60, seeded())
    logits = torch.zeros(*tokens.shape, task.vocab_size)
    logits[..., task.encoder.encode("garden").item()] = 1
    answers = mark(logits, targets)
    assert answers.asked == answers.sequences == 60
    assert answers.right == int((tokens[:, -1] == task.encoder.encode("garden").item()).sum())


@pytest.mark.parametrize("question", QUESTIONS)
def test_real_stories_in_real_novels(data_dir: Path, question: str) -> None:
    train, test = (find_stories(question, side=side, data_root=data_dir) for side in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (1000 if question == "qa3" else 10_000, 1000)
    wrong = [
        story
        for story in test
        if answer(re.sub(r"([.?])", r" \1", " ".join((*story.facts, story.question)).lower())) != story.answer.lower()
    ]
    # Two questions of qa5, "What did Bill give to Mary?", have two answers, and bAbI wants the first.
    assert len(wrong) == (2 if question == "qa5" else 0)
    test = [story for story in test if story not in wrong]
    novels = Texts.novels("test", data_dir)
    vocabulary = WordVocabulary.count(novels.documents, size=1024, also=words_of(train + test))
    found = BABILong.find(question, side="test", length=900, encoder=vocabulary, haystack=novels, data_root=data_dir)
    assert found.num_stories >= 0.9 * len(test)
    texts = check(dataclasses.replace(found, stories=test), 20)
    assert np.mean([text.count("<unk>") for text in texts]) > 10
