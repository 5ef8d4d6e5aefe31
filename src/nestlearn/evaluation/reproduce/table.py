"""What a table of synthetic tasks is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Scale = Literal["smoke", "small", "paper"]
Score = Literal["exact", "accuracy"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is wanted of a table.

    Attributes:
        scale: "smoke", "small" or "paper".
        models: names; empty for the table's own.
        columns: names; empty for all.
        seeds: how many; 0 for as many as the scale has.
        processes: how many runs at once, one thread each.
        runs: folder of records and checkpoints.
        out: path of the results, without suffix.
    """

    scale: Scale
    models: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    seeds: int = 0
    processes: int = 1
    runs: Path
    out: Path


@dataclass(frozen=True, kw_only=True)
class Column:
    """One task, learnt by a model of its own.

    Attributes:
        training: what is trained on, for `build_task`.
        tests: what is marked, by name.
        validation: what is looked at while a model trains, which ends runs and chooses learning rates; None for the
            training's task. Its sequences are always others than those of training and tests.
        examples: sequences of a fixed training set, or 0 for fresh ones in every step.
        settings: of the runs in this column, in place of the plan's.
    """

    training: Mapping[str, Any]
    tests: Mapping[str, Mapping[str, Any]]
    validation: Mapping[str, Any] | None = None
    examples: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table at one scale.

    Attributes:
        columns: by name.
        size: of the models: dim, depth, heads, and other settings of `HopeConfig`.
        rates: learning rates; each model takes the best of them in each column, tried with a seed of its own. A single
            one is everybody's, untried.
        runs: steps, batch_size, warmup, weight_decay, every, settled, test_sequences and test_batch of `train_on_task`.
        seeds: how many by default.
        seeds_of: how many, of models that have others than that.
    """

    columns: Mapping[str, Column]
    size: Mapping[str, Any]
    rates: tuple[float, ...]
    runs: Mapping[str, Any]
    seeds: int
    seeds_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or one of its kind.

    Attributes:
        title: heading of the page.
        models: names; all take the number of parameters of "hope".
        settings: of `HopeConfig` by model, on top of the size.
        score: what a number is: the fraction of sequences that are right as a whole, or of answers.
        plan: the table at a scale.
        paper: what the paper prints, by model and column; empty if it has no such table.
        average: whether the mean over the tasks is a column of its own.
        state: whether the numbers that a model carries from token to token are a column.
        note: a sentence on the protocol.
    """

    title: str
    models: tuple[str, ...]
    score: Score
    plan: Callable[[Scale], Plan]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    average: bool = False
    state: bool = False
    note: str = ""
