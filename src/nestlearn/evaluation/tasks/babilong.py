"""BABILong (Kuratov et al. 2024, 2406.10149): the facts of a bAbI story hidden in a novel, and a question at the end.

    ... It was a dark night. Mary went to the garden. He had not slept. ... John took the milk. ...
    Where is Mary? garden

As in booydar/babilong: each question of a story is an example, with the facts before it and without the questions
before it; the novel is read on from a random place; each fact takes a gap between two sentences, each gap as likely,
and facts keep their order. What differs:
    The novels are ELTeC's where the haystack is `Texts.novels`; there they are PG-19's.
    The question and the answer are part of the length, and the first sentence of filler is cut to fit, not the last.
    A sentence of the novel that holds one of bAbI's facts word for word is passed over; short ones (under ten tokens)
    are not.
    The answer follows the question at once; there, in fine-tuning, a token of its own stands between them.
A few questions of bAbI have two right answers (in qa5, "What did Bill give to Mary?" after two gifts; 2 of 1,000).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.haystacks import Haystack, Side, Texts, check_side, examples, fill, find_data_root, hide
from nestlearn.evaluation.tasks.task import Examples, Task
from nestlearn.evaluation.tasks.words import Encoder, WordVocabulary
from nestlearn.io import missing_file
from nestlearn.training.corpus import read_documents

__all__ = ["QUESTIONS", "BABILong", "Story", "find_stories", "read_stories"]

# The tasks that BABILong reports: one, two and three supporting facts, relations of two and of three arguments.
QUESTIONS = ("qa1", "qa2", "qa3", "qa4", "qa5")

_LINE = re.compile(r"(\d+) (.*)")


class Story(NamedTuple):
    """A question and the facts before it, in order; answer is one word."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_stories(path: str | os.PathLike[str]) -> list[Story]:
    """Reads a file of bAbI, also `.gz`: one story for each question.

    A line is "number fact", or "number question<tab>answer<tab>numbers of the facts it needs"; number 1 begins a story.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if a line is not as expected; names the file and the line.
    """
    stories: list[Story] = []
    facts: list[str] = []
    before = 0
    for place, line in enumerate(read_documents(path)[0].splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {place}"
        found = _LINE.fullmatch(line)
        if not found:
            raise ValueError(f"{where}: expected a number, a space and a sentence, got {line[:60]!r}. Is it from bAbI?")
        number, text = int(found[1]), found[2]
        if number not in (1, before + 1):
            raise ValueError(f"{where}: expected number 1 or {before + 1}, got {number}. Is a line missing?")
        before = number
        if number == 1:
            facts = []
        if "\t" not in text:
            if text.rstrip().endswith("?"):
                raise ValueError(f"{where}: expected a tab and the answer after a question, got {text!r}.")
            facts.append(text.strip())
            continue
        question, answer, *_ = (part.strip() for part in text.split("\t"))
        if not question or len(answer.split()) != 1 or not facts:
            expected = "a question, a tab and one word" if facts else "a fact before the first question"
            raise ValueError(f"{where}: expected {expected}, got {text!r}. Copy the file again.")
        stories.append(Story(tuple(facts), question, answer))
    if not stories:
        raise ValueError(f"{path}: expected at least one question, got none. Is it a file of bAbI?")
    return stories


def find_stories(question: str, *, side: Side, data_root: str | os.PathLike[str] | None = None) -> list[Story]:
    """The stories of a task.

    Training stories are those of en-10k (of en where en-10k lacks the task), test stories those of en, so the two are
    never mixed.

    Args:
        question: one of `QUESTIONS`.
        side: "train" or "test".
        data_root: folder of data sets; see `find_data_root`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such task or side.
    """
    if question not in QUESTIONS:
        raise ValueError(f"question: expected one of {', '.join(QUESTIONS)}; got {question!r}")
    check_side(side)
    folder = find_data_root(data_root) / "babi"
    for part in ("en-10k", "en") if side == "train" else ("en",):
        paths = sorted((folder / part).glob(f"{question}_*_{side}.txt*"))
        if paths:
            return read_stories(paths[0])
    raise missing_file(folder / "en" / f"{question}_..._{side}.txt.gz", what="file of bAbI")


@dataclass(frozen=True, kw_only=True)
class BABILong(Task):
    """Questions about facts in a novel; every sequence has exactly `length` tokens, the answer included.

    Stories that do not fit are passed over. So that short and long sequences ask the same, give `most_facts` too.

    Attributes:
        length: T, tokens of the whole sequence. What the story leaves free is filler; that may be nothing.
        encoder: a `WordVocabulary`, or any tokenizer of `nestlearn.training.tokenizers`.
        stories: from `find_stories` or `read_stories`.
        haystack: the filler.
        most_facts: leaves out stories with more; None for no such bound.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    length: int
    encoder: Encoder = field(repr=False)
    stories: Sequence[Story] = field(repr=False)
    haystack: Haystack
    most_facts: int | None = None

    def __post_init__(self) -> None:
        most = 1 if self.most_facts is None else self.most_facts
        for name, value in (("length", self.length), ("most_facts", most)):
            check_whole(name, value, 1)
        object.__setattr__(self, "stories", tuple(self.stories))
        if isinstance(self.encoder, WordVocabulary):
            parts = {part for story in self.stories for part in (*story.facts, story.question, story.answer)}
            words = self.encoder.unknown_words(" ".join(sorted(parts)))
            if words:
                raise ValueError(
                    f"encoder: expected it to know the words of the stories, it lacks {', '.join(words[:5])}. Give "
                    "WordVocabulary.count(also=...) the facts, questions and answers."
                )
        if not self._encoded:
            bound = "" if self.most_facts is None else f" and at most {self.most_facts} facts"
            raise ValueError(
                f"length: expected a story of at most {self.length} tokens{bound}, got none among "
                f"{len(self.stories):,}. Raise length or most_facts."
            )

    @classmethod
    def find(
        cls,
        question: str,
        *,
        side: Side,
        length: int,
        encoder: Encoder,
        haystack: Haystack | None = None,
        most_facts: int | None = None,
        data_root: str | os.PathLike[str] | None = None,
    ) -> BABILong:
        """The task of that name in the folder of data sets.

        Args:
            question, side, data_root: see `find_stories`.
            length, encoder, most_facts: the fields.
            haystack: None for the novels of the same side.
        """
        stories = find_stories(question, side=side, data_root=data_root)
        haystack = Texts.novels(side, data_root) if haystack is None else haystack
        return cls(length=length, encoder=encoder, stories=stories, haystack=haystack, most_facts=most_facts)

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    @property
    def num_stories(self) -> int:
        """Stories that fit."""
        return len(self._encoded)

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        return examples([self._row(generator) for _ in range(count)], self.length)

    def _row(self, generator: torch.Generator) -> list[tuple[np.ndarray, bool]]:
        number = int(torch.randint(len(self._encoded), (1,), generator=generator))
        facts, question, answer = self._encoded[number]
        room = self.length - _num_tokens(facts, question, answer)
        filler = fill(self.haystack, self.encoder, room, generator, refuse=self._holds_fact)
        gaps = torch.randint(len(filler) + 1, (len(facts),), generator=generator).sort().values.tolist()
        return [(piece, False) for piece in (*hide(filler, facts, gaps), question)] + [(answer, True)]

    @cached_property
    def _encoded(self) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
        """Facts, question and answer of the stories that fit."""
        seen: dict[str, np.ndarray] = {}

        def encode(text: str) -> np.ndarray:
            if text not in seen:
                seen[text] = self.encoder.encode(" " + text)
            return seen[text]

        stories = (
            ([encode(fact) for fact in story.facts], encode(story.question), encode(story.answer))
            for story in self.stories
            if self.most_facts is None or len(story.facts) <= self.most_facts
        )
        return [story for story in stories if _num_tokens(*story) <= self.length]

    @cached_property
    def _facts(self) -> dict[int, set[tuple[int, ...]]]:
        """All facts without the full stop, by their tokens' number."""
        facts = {fact for story in self.stories for fact in story.facts}
        found: dict[int, set[tuple[int, ...]]] = {}
        for fact in facts:
            ids = tuple(self.encoder.encode(" " + fact.rstrip(".")).tolist())
            found.setdefault(len(ids), set()).add(ids)
        return found

    def _holds_fact(self, sentence: np.ndarray) -> bool:
        ids = tuple(sentence.tolist())
        return any(
            ids[begin : begin + size] in facts
            for size, facts in self._facts.items()
            for begin in range(len(ids) - size + 1)
        )


def _num_tokens(facts: list[np.ndarray], question: np.ndarray, answer: np.ndarray) -> int:
    return sum(map(len, facts)) + len(question) + len(answer)
