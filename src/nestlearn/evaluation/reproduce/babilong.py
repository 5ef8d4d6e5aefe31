"""Figure 9: facts of bAbI hidden in novels (BABILong), in sequences much longer than those of the training."""

from __future__ import annotations

from collections.abc import Mapping

from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

# Tasks, and how many facts their stories may have: as many at every length, so that length alone is what differs.
QUESTIONS = {"qa1": 6, "qa2": 12, "qa3": 30, "qa4": 2, "qa5": 8}
LENGTHS = {"qa1": 64, "qa2": 128, "qa3": 256, "qa4": 64, "qa5": 128}  # in words: what the stories need at least
TOKENS = 4096  # of a step
LONGER = (1, 4, 16, 64)


def plan(scale: Scale) -> Plan:
    """Trained at 64 to 256 words ("small"), or 1,024."""
    runs = {"steps": 800, "batch_size": 32, "warmup": 50, "weight_decay": 0.1, "every": 50, "settled": 4}
    runs |= {"test_sequences": 100, "test_batch": 10}
    size = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0, "chunk_size": 16}
    if scale == "smoke":
        small = {"steps": 2, "every": 2, "test_sequences": 4, "test_batch": 4, "batch_size": 2}
        columns = {"qa1": _column("qa1", 128, (1, 2, 4), words=1024)}
        return Plan(columns=columns, size={**size, "dim": 16}, rates=(3e-3,), runs={**runs, **small}, seeds=1)
    if scale == "small":
        columns = {
            name: _column(name, length, LONGER, words=1024, settings={"batch_size": TOKENS // length})
            for name, length in LENGTHS.items()
        }
        return Plan(columns=columns, size=size, rates=(3e-3,), runs=runs, seeds=1)
    columns = {name: _column(name, 1024, (*LONGER, 256), words=16384) for name in QUESTIONS}
    size |= {"dim": 512, "depth": 8, "heads": 8, "chunk_size": 64}
    return Plan(columns=columns, size=size, rates=(1e-3,), runs={**runs, "steps": 20000}, seeds=3)


def _column(
    question: str, length: int, longer: tuple[int, ...], *, words: int, settings: Mapping[str, int] | None = None
) -> Column:
    task = {"task": "babilong", "question": question, "words": words, "most_facts": QUESTIONS[question]}
    tests = {f"{length * n:,}": {**task, "side": "test", "length": length * n} for n in longer}
    training, validation = ({**task, "side": side, "length": length} for side in ("train", "validation"))
    return Column(training=training, validation=validation, tests=tests, settings=settings or {})


TABLE = Table(
    title="BABILong (Figure 9)",
    models=("hope", "gated_delta_net", "transformer"),
    score="exact",
    plan=plan,
    note="Trained at the first length, tested at all of them with stories that are none of the "
    "training's and novels that were not read. Learning is looked at on a tenth of the training stories, kept apart.",
)
