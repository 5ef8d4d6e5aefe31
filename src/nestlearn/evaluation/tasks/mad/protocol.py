"""The settings in which MAD trains and tests, from github.com/athms/mad-lab, configs/tasks and data/instances.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from nestlearn.evaluation.tasks.compression import Compression
from nestlearn.evaluation.tasks.mad.fuzzy_recall import FuzzyRecall
from nestlearn.evaluation.tasks.mad.memorization import Memorization
from nestlearn.evaluation.tasks.mad.recall import InContextRecall, NoisyRecall
from nestlearn.evaluation.tasks.mad.selective_copying import SelectiveCopying
from nestlearn.evaluation.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One task at one difficulty.

    Attributes:
        training: what is trained on.
        test: what accuracy is measured on.
        examples: sequences of the training set, which MAD reads 200 times in batches of 128.
    """

    training: Task
    test: Task
    examples: int = 12800


BASELINES = {
    "compression": Setting(training=Compression(), test=Compression()),
    "in-context recall": Setting(training=InContextRecall(every_token=True), test=InContextRecall()),
    "fuzzy in-context recall": Setting(training=FuzzyRecall(key_sizes=(1, 3), every_token=True), test=FuzzyRecall()),
    "noisy in-context recall": Setting(training=NoisyRecall(every_token=True), test=NoisyRecall()),
    "selective copying": Setting(training=SelectiveCopying(), test=SelectiveCopying()),
    "memorization": Setting(training=Memorization(), test=Memorization(), examples=256),
}

_FEWER = (6400, 3200, 1600, 800)
# One field at a time differs from the baseline.
CHANGES: dict[str, dict[str, tuple[float, ...]]] = {
    "compression": {"vocab_size": (32, 64, 128), "length": (64, 128, 256), "examples": _FEWER},
    "in-context recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024), "examples": _FEWER},
    "fuzzy in-context recall": {"vocab_size": (32, 64, 128), "length": (256, 512, 1024), "examples": _FEWER},
    "noisy in-context recall": {
        "vocab_size": (48, 80, 144),
        "length": (256, 512, 1024),
        "noise_fraction": (0.4, 0.6, 0.8),
        "examples": _FEWER,
    },
    "selective copying": {
        "vocab_size": (32, 64, 128),
        "length": (512, 1024),
        "copied": (32, 64, 96),
        "examples": _FEWER,
    },
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}


def settings(name: str) -> Iterator[Setting]:
    """The baseline of a task, then every change to it. MAD's score is the mean of the accuracies in all of them.

    Args:
        name: a key of `BASELINES`.
    """
    baseline = BASELINES[name]
    yield baseline
    for field, values in CHANGES[name].items():
        for value in values:
            if field == "examples":
                yield dataclasses.replace(baseline, examples=int(value))
            else:
                tasks = {
                    part: dataclasses.replace(getattr(baseline, part), **{field: value})
                    for part in ("training", "test")
                }
                yield dataclasses.replace(baseline, **tasks)
