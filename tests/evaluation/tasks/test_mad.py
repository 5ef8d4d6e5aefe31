"""The tasks of MAD: each against a plain reader that goes through the tokens from the left and says what is due."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch

from nestlearn.evaluation.tasks import IGNORED, Examples, Task
from nestlearn.evaluation.tasks.mad import (
    BASELINES,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
    settings,
)
from nestlearn.evaluation.tasks.mad.fuzzy_recall import draw_runs, names_of
from nestlearn.evaluation.tasks.mad.recall import draw_one, first_alike

Row = list[int]
# Those that a reader can answer from the left; compression is said backwards, from one vector.
SMALL: list[Task] = [
    InContextRecall(),
    InContextRecall(vocab_size=5, length=4),
    InContextRecall(vocab_size=64, length=30),
    InContextRecall(every_token=True),
    NoisyRecall(),
    NoisyRecall(vocab_size=9, noise_vocab_size=3, noise_fraction=0.95, length=12),
    FuzzyRecall(),
    FuzzyRecall(key_sizes=(1, 3)),
    FuzzyRecall(key_sizes=(1, 3), every_token=True),
    FuzzyRecall(vocab_size=6, length=9, key_sizes=(1, 2), value_sizes=(2, 2)),
    FuzzyRecall(vocab_size=5, length=64, key_sizes=(1, 1), value_sizes=(1, 1)),
    SelectiveCopying(),
    SelectiveCopying(vocab_size=4, length=9, copied=4),
    SelectiveCopying(length=40, copied=3),
    Memorization(),
    Memorization(vocab_size=6, length=10, map_seed=3),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(examples: Examples) -> Iterable[tuple[Row, Row]]:
    assert examples.lengths is None
    return zip(examples.tokens.tolist(), examples.targets.tolist(), strict=True)


def answer_recall(task: InContextRecall, row: Row) -> Row:
    plain = task.vocab_size - task.noise_vocab_size
    seen: dict[int, int] = {}
    answers = []
    for place in range(0, len(row), 2):
        key, value = row[place : place + 2]
        answers += [seen.get(key, IGNORED), IGNORED]
        if key >= plain:
            assert plain <= value < task.vocab_size, "noise comes in pairs"
        else:
            assert 0 <= key < plain // 2 <= value < plain
            assert seen.setdefault(key, value) == value, "a key's value changed"
    return answers


def answer_fuzzy_recall(task: FuzzyRecall, row: Row) -> Row:
    padding = task.vocab_size - 1
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}
    answers = [IGNORED] * len(row)
    place = 0
    while row[place] == padding:
        place += 1
    assert place <= 2 * (task.key_sizes[1] + task.value_sizes[1])
    while place < len(row):
        key: tuple[int, ...] = ()
        while row[place] < padding // 2:
            key += (row[place],)
            place += 1
        if key in seen:
            answers[place - 1 : place - 1 + len(seen[key])] = seen[key]
        value: tuple[int, ...] = ()
        while place < len(row) and row[place] >= padding // 2:
            value += (row[place],)
            place += 1
        assert padding not in value, "padding after the first pair"
        assert seen.setdefault(key, value) == value, "a key's value changed"
        for run, (fewest, most) in ((key, task.key_sizes), (value, task.value_sizes)):
            assert fewest <= len(run) <= most
            assert len(set(run)) == len(run), "a token comes twice in a run"
    return answers


def answer_copying(task: SelectiveCopying, row: Row) -> Row:
    to_say: Row = []
    answers: Row = []
    said = None
    for token in row:
        if said is not None:
            assert token == task.vocab_size - 2
            answers.append(to_say[said])
            said += 1
        else:
            answers.append(IGNORED)
            if token == task.vocab_size - 1:
                said = 0
            elif token < task.vocab_size - 2:
                to_say.append(token)
    assert said == len(to_say) == task.copied
    return answers


def answer_from_memory(task: Memorization, row: Row) -> Row:
    facts = dict(enumerate(task.values.tolist()))
    answers = []
    for place, token in enumerate(row):
        blank = token == task.vocab_size - 1
        assert blank == bool(place % 2)
        answers.append(facts[row[place - 1]] if blank else IGNORED)
    return answers


def answer_compression(task: Compression, row: Row) -> Row:
    assert [place for place, token in enumerate(row) if token == task.vocab_size - 1] == [len(row) - 1]
    return [*row[:-1], IGNORED]


READERS: dict[type, Callable[..., Row]] = {
    InContextRecall: answer_recall,
    NoisyRecall: answer_recall,
    FuzzyRecall: answer_fuzzy_recall,
    SelectiveCopying: answer_copying,
    Memorization: answer_from_memory,
    Compression: answer_compression,
}


def check(task: Task, count: int, seed: int = 0) -> None:
    examples = task.sample(count, generator(seed))
    assert examples.tokens.shape == examples.targets.shape == (count, task.length)  # type: ignore[attr-defined]
    assert examples.tokens.dtype == examples.targets.dtype == torch.int64
    assert 0 <= int(examples.tokens.min()) <= int(examples.tokens.max()) < task.vocab_size
    for row, targets in rows(examples):
        answers = READERS[type(task)](task, row)
        asked = [answer for answer in answers if answer != IGNORED]
        assert asked, "a sequence in which nothing is asked"
        if getattr(task, "every_token", False):
            assert targets == [*row[1:], IGNORED]
        else:
            assert targets == answers


@pytest.mark.parametrize("task", [*SMALL, Compression(), Compression(vocab_size=2, length=2)], ids=str)
def test_targets_are_what_a_plain_reader_answers(task: Task) -> None:
    check(task, 100)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("compression", 11),
        ("in-context recall", 11),
        ("fuzzy in-context recall", 11),
        ("noisy in-context recall", 14),
        ("selective copying", 13),
        ("memorization", 6),
    ],
)
def test_every_difficulty_of_mad_can_be_drawn(name: str, count: int) -> None:
    found = list(settings(name))
    assert found[0] == BASELINES[name]
    assert len(set(found)) == len(found) == count
    for setting in found:
        check(setting.training, 2)
        check(setting.test, 2)
        changed = [f.name for f in dataclasses.fields(setting) if getattr(setting, f.name) != getattr(found[0], f.name)]
        assert changed in ([], ["examples"], ["training", "test"])


@pytest.mark.parametrize("task", [*SMALL, Compression()], ids=str)
def test_sequences_depend_on_the_generator_alone(task: Task) -> None:
    first = task.sample(8, generator(1))
    before = torch.get_rng_state()
    torch.manual_seed(99)
    again = task.sample(8, generator(1))
    other = task.sample(8, generator(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)
    torch.set_rng_state(before)
    task.sample(1, generator())
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


@pytest.mark.parametrize(
    "task", [InContextRecall(length=12), NoisyRecall(length=12, noise_fraction=0.9), FuzzyRecall()], ids=str
)
def test_the_last_pair_asks(task: Task) -> None:
    assert (task.sample(200, generator()).targets[:, -2] != IGNORED).all()


def test_all_keys_and_values_come_equally_often() -> None:
    tokens = InContextRecall(vocab_size=7, length=40).sample(2000, generator()).tokens
    keys, values = (torch.bincount(tokens[:, side::2].flatten(), minlength=7) / 40_000 for side in (0, 1))
    torch.testing.assert_close(keys, torch.tensor([1 / 3] * 3 + [0.0] * 4), atol=0.01, rtol=0)
    torch.testing.assert_close(values, torch.tensor([0.0] * 3 + [1 / 4] * 4), atol=0.02, rtol=0)


def test_noise_is_as_frequent_as_asked_for() -> None:
    tokens = NoisyRecall(noise_fraction=0.4).sample(1000, generator()).tokens
    noise = (tokens >= 16).float().mean().item()
    assert abs(noise - 0.4 * 62 / 64) < 0.01  # two of the 64 pairs are never noise
    assert set(tokens[tokens >= 16].tolist()) == set(range(16, 32))


def test_runs_are_all_sequences_of_different_tokens_with_equal_chances() -> None:
    runs, sizes = draw_runs((240, 100), (1, 3), 4, generator())
    found = Counter(map(tuple, runs.flatten(0, 1).tolist()))
    assert len(found) == 4 * 3 * 2
    assert all(abs(times - 1000) < 160 for times in found.values())  # five standard deviations
    assert all(abs(times - 8000) < 370 for times in Counter(sizes.flatten().tolist()).values())
    assert set(sizes.unique().tolist()) == {1, 2, 3}


def test_runs_have_one_name_each() -> None:
    runs, sizes = draw_runs((30, 100), (1, 3), 4, generator())
    names = names_of(runs, sizes, 4).flatten().tolist()
    cut = [tuple(run[:size]) for run, size in zip(runs.flatten(0, 1).tolist(), sizes.flatten().tolist(), strict=True)]
    assert len(set(cut)) == len(set(names)) == len(set(zip(cut, names, strict=True))) == 4 + 12 + 24


def test_first_alike_is_what_a_search_finds() -> None:
    names = torch.randint(5, (20, 12), generator=generator())
    expected = [[row.index(name) for name in row] for row in names.tolist()]
    assert first_alike(names).tolist() == expected


def test_one_is_drawn_among_those_allowed_with_equal_chances() -> None:
    allowed = torch.tensor([False, True, True, False, True]).expand(9000, 5)
    counts = torch.bincount(draw_one(allowed, generator()).flatten(), minlength=5)
    assert counts[0] == counts[3] == 0
    assert all(abs(times - 3000) < 230 for times in counts[[1, 2, 4]].tolist())


def test_blanks_fall_before_every_token_equally_often() -> None:
    tokens = SelectiveCopying(length=49, copied=4).sample(1000, generator()).tokens[:, :44]
    assert (tokens[:, -1] < 14).all(), "a blank after the last token"
    places = (tokens < 14).nonzero()[:, 1].reshape(1000, 4)
    gaps = places.diff(dim=1, prepend=torch.full((1000, 1), -1)) - 1
    torch.testing.assert_close(gaps.float().mean(0), torch.full((4,), 10.0), atol=0.5, rtol=0)
    assert gaps.float().std(0).min() > 2


def test_the_map_is_fixed_by_its_seed_and_gives_each_key_a_value_of_its_own() -> None:
    task = Memorization(vocab_size=20, map_seed=1)
    values = task.values
    assert len(values) == 9
    assert set(values.tolist()) <= set(range(9, 19))
    assert len(set(values.tolist())) == 9
    assert torch.equal(values, Memorization(vocab_size=20, length=8, map_seed=1).values)
    assert not torch.equal(values, Memorization(vocab_size=20, map_seed=2).values)
    learnt = {(row[i], targets[i + 1]) for row, targets in rows(task.sample(50, generator(5))) for i in range(0, 32, 2)}
    assert learnt == set(enumerate(values.tolist()))


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        (InContextRecall, {"length": 7}, "length: expected an even number, for pairs; got 7; take 8"),
        (InContextRecall, {"length": 2}, "length: expected a whole number of at least 4, got 2"),
        (InContextRecall, {"vocab_size": True}, "vocab_size: expected a whole number of at least 2, got True"),
        (InContextRecall, {"noise_vocab_size": 15}, "at least 17 with noise_vocab_size 15; got 16"),
        (InContextRecall, {"noise_fraction": 0.1}, "noise_fraction 0.1 needs noise_vocab_size of at least 1, got 0"),
        (NoisyRecall, {"noise_fraction": 1.0}, "noise_fraction: expected a number from 0 to below 1, got 1.0"),
        (NoisyRecall, {"noise_fraction": float("nan")}, "noise_fraction: expected a number from 0 to below 1, got nan"),
        (NoisyRecall, {"noise_vocab_size": -1}, "noise_vocab_size: expected a whole number of at least 0, got -1"),
        (FuzzyRecall, {"vocab_size": 2}, "vocab_size: expected a whole number of at least 3, got 2"),
        (FuzzyRecall, {"key_sizes": (1, 8)}, "key_sizes: .* which can be 7 with vocab_size 16"),
        (FuzzyRecall, {"value_sizes": (3, 1)}, r"value_sizes: expected the fewest tokens, then the most, .* \(3, 1\)"),
        (FuzzyRecall, {"value_sizes": (0, 1)}, "value_sizes: expected a whole number of at least 1, got 0"),
        (FuzzyRecall, {"key_sizes": 3}, r"key_sizes: expected the fewest and the most tokens, for example \(1, 3\)"),
        (FuzzyRecall, {"length": 11}, "length: expected a whole number of at least 12, got 11"),
        (FuzzyRecall, {"vocab_size": 129, "key_sizes": (1, 11)}, "too many possible keys of 11 tokens"),
        (SelectiveCopying, {"copied": 128}, "length: expected at least 257 to read .* or copy at most 127"),
        (SelectiveCopying, {"copied": 0}, "copied: expected a whole number of at least 1, got 0"),
        (SelectiveCopying, {"vocab_size": 2}, "vocab_size: expected a whole number of at least 3, got 2"),
        (Memorization, {"length": 5}, "length: expected an even number, for pairs; got 5; take 6"),
        (Memorization, {"vocab_size": 2}, "vocab_size: expected a whole number of at least 3, got 2"),
        (Memorization, {"map_seed": -1}, "map_seed: expected a whole number of at least 0, got -1"),
        (Compression, {"vocab_size": 1}, "vocab_size: expected a whole number of at least 2, got 1"),
        (Compression, {"length": 1.5}, "length: expected a whole number of at least 2, got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(task: type[Task], wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**wrong)  # type: ignore[call-arg]


def test_lists_of_sizes_are_taken_as_pairs() -> None:
    assert FuzzyRecall(key_sizes=[1, 3]) == FuzzyRecall(key_sizes=(1, 3))  # type: ignore[arg-type]
