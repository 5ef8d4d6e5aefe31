"""Tasks by description, in plain JSON types: what a job in another process can be given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nestlearn.evaluation.tasks.associative_recall import AssociativeRecall
from nestlearn.evaluation.tasks.babilong import BABILong, find_stories
from nestlearn.evaluation.tasks.compression import Compression
from nestlearn.evaluation.tasks.formal_languages import FormalLanguage
from nestlearn.evaluation.tasks.haystacks import Haystack, Noise, Side, Texts, find_data_root
from nestlearn.evaluation.tasks.mad import FuzzyRecall, InContextRecall, Memorization, NoisyRecall, SelectiveCopying
from nestlearn.evaluation.tasks.needles import NEEDLE_TEXTS, Needles, read_key_words
from nestlearn.evaluation.tasks.task import Task
from nestlearn.evaluation.tasks.words import WordVocabulary
from nestlearn.training.data import read_documents


def build_task(description: Mapping[str, Any]) -> Task:
    """The task that a description names.

    Args:
        description: "task", a key of `TASKS`, and its settings. Where a task reads text, "side" is "train" or "test",
            "words" the size of its vocabulary, and "haystack" one of "noise", "novels" and a path, which both sides
            read. BABILong has a side "validation" too: every tenth of the training stories, which "train" then lacks.

    Raises:
        ValueError: if there is no such task, or its settings are wrong.
        FileNotFoundError: if data that it needs are not there.
    """
    settings = dict(description)
    name = settings.pop("task", None)
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {name!r}")
    try:
        return TASKS[name](**settings)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _needles(*, kind: str, side: Side, words: int, haystack: str = "", **settings: Any) -> Task:
    vocabulary = _vocabulary(words)
    given: dict[str, Any] = {"encoder": vocabulary, "key_words": read_key_words(vocabulary)}
    if haystack or kind != "single_1":
        given["haystack"] = _haystack(haystack or "novels", side)
    return Needles.preset(kind, **given, **settings)


def _babilong(
    *,
    question: str,
    side: Literal["train", "validation", "test"],
    words: int,
    haystack: str = "novels",
    **settings: Any,
) -> Task:
    filler = _haystack(haystack, "test" if side == "test" else "train")
    training = find_stories(question, side="train")
    if side == "test":
        known = set(training)
        stories = [story for story in find_stories(question, side="test") if story not in known]
    else:
        stories = [story for place, story in enumerate(training) if (place % 10 == 0) == (side == "validation")]
        if side == "validation":
            known = {story for place, story in enumerate(training) if place % 10}
            stories = [story for story in stories if story not in known]
    return BABILong(encoder=_vocabulary(words), stories=stories, haystack=filler, **settings)


def _haystack(name: str, side: Side) -> Haystack:
    return _read_haystack(name, side, find_data_root() if name == "novels" else None)


@functools.cache
def _read_haystack(name: str, side: Side, data_root: Path | None) -> Haystack:
    if name == "noise":
        return Noise()
    return Texts.novels(side, data_root) if name == "novels" else Texts.read(name)


def _vocabulary(words: int) -> WordVocabulary:
    """The most frequent words of the novels, and all of the tasks'."""
    return _count_words(words, find_data_root())


@functools.cache
def _count_words(words: int, data_root: Path) -> WordVocabulary:
    stories = [
        " ".join([*story.facts, story.question, story.answer])
        for question in ("qa1", "qa2", "qa3", "qa4", "qa5")
        for story in find_stories(question, side="train", data_root=data_root)[:500]
    ]
    also = (*NEEDLE_TEXTS, *stories)
    novels = read_documents(data_root / "eltec_eng" / "train.jsonl.gz")
    return WordVocabulary.count(novels, size=words, also=also)


TASKS: dict[str, Callable[..., Task]] = {
    "associative_recall": AssociativeRecall,
    "formal_language": FormalLanguage,
    "in_context_recall": InContextRecall,
    "noisy_recall": NoisyRecall,
    "fuzzy_recall": FuzzyRecall,
    "selective_copying": SelectiveCopying,
    "memorization": Memorization,
    "compression": Compression,
    "needles": _needles,
    "babilong": _babilong,
}
