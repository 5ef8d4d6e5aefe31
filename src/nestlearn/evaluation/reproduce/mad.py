"""Table 4: MAD, five tasks that each need one skill."""

from __future__ import annotations

from typing import Any

from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

COLUMNS = ("compression", "in-context recall", "fuzzy recall", "selective copying", "memorization")


def plan(scale: Scale) -> Plan:
    """ "small" has MAD's difficulties but for selective copying, half as long with half as much to copy, and for
    memorization, of eight times as many facts; "paper" is MAD's baseline, 200 passes over each training set."""
    runs = {"steps": 1000, "batch_size": 32, "warmup": 50, "weight_decay": 0.1, "every": 100, "settled": 1}
    runs |= {"test_sequences": 512, "test_batch": 64}
    size = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0, "chunk_size": 16}
    if scale == "smoke":
        small = {"steps": 4, "every": 2, "test_sequences": 8, "test_batch": 8, "batch_size": 4}
        columns = {name: _column(name, examples=16, every_token=False, **SMOKE[name]) for name in COLUMNS}
        return Plan(columns=columns, size={**size, "dim": 16}, rates=(3e-3,), runs={**runs, **small}, seeds=1)
    if scale == "small":
        columns = {
            name: _column(name, examples=12800, every_token=False, settings=STEPS.get(name), **SMALL[name])
            for name in COLUMNS
        }
        return Plan(columns=columns, size=size, rates=(1e-3, 3e-3), runs=runs, seeds=2)
    runs |= {"steps": 20000, "batch_size": 128, "test_sequences": 1280}
    columns = {name: _column(name, examples=12800) for name in COLUMNS if name != "memorization"}
    columns["memorization"] = _column("memorization", examples=256, settings={"steps": 400})
    return Plan(
        columns=columns,
        size={**size, "dim": 128, "heads": 8, "chunk_size": 64},
        rates=(1e-4, 5e-4, 1e-3),
        runs=runs,
        seeds=3,
    )


SMOKE: dict[str, dict[str, Any]] = {
    "compression": {"length": 8},
    "in-context recall": {"length": 16},
    "fuzzy recall": {"length": 48},
    "selective copying": {"length": 16, "copied": 4},
    "memorization": {"vocab_size": 32, "length": 8},
}
SMALL: dict[str, dict[str, Any]] = {
    "compression": {},
    "in-context recall": {},
    "fuzzy recall": {},
    "selective copying": {"length": 128, "copied": 8},
    "memorization": {"vocab_size": 2048},
}
STEPS: dict[str, dict[str, Any]] = {
    "compression": {"steps": 1200, "batch_size": 64},
    "in-context recall": {"steps": 400},
    "memorization": {"steps": 400, "batch_size": 128},
}
_TASKS = {
    "compression": "compression",
    "in-context recall": "in_context_recall",
    "fuzzy recall": "fuzzy_recall",
    "selective copying": "selective_copying",
    "memorization": "memorization",
}


def _column(
    name: str, *, examples: int, every_token: bool = True, settings: dict[str, Any] | None = None, **difficulty: Any
) -> Column:
    """Trained and tested as MAD does: keys of one to three tokens in the training of fuzzy recall, of three in its
    test; the two recall tasks are trained on every next token, unless not `every_token`, and tested on answers."""
    test = {"task": _TASKS[name], **difficulty}
    training = dict(test)
    if name in ("in-context recall", "fuzzy recall"):
        training["every_token"] = every_token
    if name == "fuzzy recall":
        training["key_sizes"] = [1, 3]
    return Column(training=training, tests={"test": test}, validation=test, examples=examples, settings=settings or {})


def _paper(**rows: str) -> dict[str, dict[str, str]]:
    return {model: dict(zip(COLUMNS, text.split(), strict=True)) for model, text in rows.items()}


TABLE = Table(
    title="MAD (Table 4)",
    models=("hope", "titans", "gated_delta_net", "transformer"),
    score="accuracy",
    average=True,
    plan=plan,
    paper=_paper(
        hope="51.2 100 52.1 99.7 85.2",
        titans="49.8 100 50.0 99.4 83.4",
        transformer="49.4 100 47.9 96.2 83.7",
    ),
    note=(
        "Training sets are fixed: 12,800 sequences of each task, 256 of memorization at the scale paper. At the scales "
        "below, 8 of 128 tokens are to be copied, 1,023 facts to be memorized, and recall is trained on the answers "
        "alone, where MAD trains on every next token."
    ),
)
