"""Synthetic tasks: what a sequence model can remember, track and recall."""

from nestlearn.evaluation.tasks.babilong import BABILong
from nestlearn.evaluation.tasks.build import TASKS, build_task
from nestlearn.evaluation.tasks.haystacks import Noise, Texts
from nestlearn.evaluation.tasks.needles import NEEDLE_TEXTS, Needles, mark_values, read_key_words
from nestlearn.evaluation.tasks.task import IGNORED, Answers, Examples, Task, mark
from nestlearn.evaluation.tasks.words import WordVocabulary

__all__ = [
    "IGNORED",
    "NEEDLE_TEXTS",
    "TASKS",
    "Answers",
    "BABILong",
    "Examples",
    "Needles",
    "Noise",
    "Task",
    "Texts",
    "WordVocabulary",
    "build_task",
    "mark",
    "mark_values",
    "read_key_words",
]
