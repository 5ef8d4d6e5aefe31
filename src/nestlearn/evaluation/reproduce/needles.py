"""Table 1: needles in a haystack (RULER), in sequences up to sixteen times as long as those of the training."""

from __future__ import annotations

from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

# Kinds, and the length in words that they are trained at: so many keys and values must fit.
KINDS = {"single_1": 128, "single_2": 128, "single_3": 128, "multi_key_1": 256, "multi_query": 256, "multi_value": 256}
LONGER = (1, 2, 4, 8, 16)
# At "small" two blocks of width 64 do not learn to tell four keys apart in ten minutes (docs/log.md).
SINGLE = ("single_1", "single_2", "single_3")


def plan(scale: Scale) -> Plan:
    """Word tokens, values of three digits and single needles; "paper" trains at 4,096 tokens and has all of RULER's."""
    runs = {"steps": 600, "batch_size": 16, "warmup": 50, "weight_decay": 0.1, "every": 50, "settled": 4}
    runs |= {"test_sequences": 100, "test_batch": 10}
    size = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0, "chunk_size": 16}
    if scale == "smoke":
        small = {"steps": 2, "every": 2, "test_sequences": 4, "test_batch": 4, "batch_size": 2}
        columns = {"single_2": _column("single_2", 96, (1, 2, 4), 1, words=1024)}
        return Plan(columns=columns, size={**size, "dim": 16}, rates=(3e-3,), runs={**runs, **small}, seeds=1)
    if scale == "small":
        columns = {kind: _column(kind, KINDS[kind], LONGER, 3, words=1024) for kind in SINGLE}
        return Plan(columns=columns, size=size, rates=(3e-3,), runs=runs, seeds=1)
    columns = {kind: _column(kind, 4096, (1, 2, 4), None, words=16384) for kind in KINDS}
    size |= {"dim": 1024, "depth": 12, "heads": 16, "chunk_size": 64}
    return Plan(columns=columns, size=size, rates=(4e-4,), runs={**runs, "steps": 20000, "batch_size": 64}, seeds=1)


def _column(kind: str, length: int, longer: tuple[int, ...], digits: int | None, *, words: int) -> Column:
    task = {"task": "needles", "kind": kind, "words": words, "digits": digits}
    tests = {f"{length * n:,}": {**task, "side": "test", "length": length * n} for n in longer}
    return Column(training={**task, "side": "train", "length": length}, tests=tests)


def _paper(**rows: str) -> dict[str, dict[str, str]]:
    """At 4,096, 8,192 and 16,384 tokens."""
    return {model: dict(zip(KINDS, text.split(), strict=True)) for model, text in rows.items()}


TABLE = Table(
    title="Needles in a haystack (Table 1)",
    models=("hope", "titans", "gated_delta_net", "delta_net", "hope_attention", "transformer"),
    score="accuracy",
    plan=plan,
    paper=_paper(
        hope="100/100/100 99.2/88.4/78.2 73.2/46.2/24.8 29.4/24.8/14.8 31.7/24.8/14.2 31.4/17.2/11.4",
        titans="100/100/100 99.6/84.6/75.4 74.2/42.8/21.2 26.4/23.6/8.2 22.8/19.8/9.4 24.6/15.1/8.2",
        hope_attention="100/100/100 100/98.4/94.4 76.8/68.8/42.4 80.2/84.8/60.8 60.4/47.8/30.6 35.2/34.4/24.8",
        transformer="88.6/76.4/79.8 100/98.8/94.2 78.0/69.2/40.8 79.4/83.0/61.4 58.9/48.0/29.8 37.5/34.1/21.5",
    ),
    note=(
        "Models learn the task itself, at the first length; they are tested at all of them, in novels that were not "
        "read. An answer is one value, all of its digits; single_1 has RULER's noise for a haystack, the others "
        "novels. The paper's models were trained on 50 billion tokens of text at 4,096 tokens and tested at 4,096 to "
        "16,384."
    ),
)
