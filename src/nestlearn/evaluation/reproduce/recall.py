"""MQAR: how many pairs a model of a given state recalls (not in the paper; Arora et al., 2312.04927)."""

from __future__ import annotations

from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

PAIRS = (8, 16, 32, 64)

# One head of this width carries about as many numbers as Hope with four heads.
EQUAL_STATE = {"dim": 84, "heads": 1}


def plan(scale: Scale) -> Plan:
    """One model for each number of pairs, of which a sequence has as many as its length allows."""
    runs = {"steps": 1000, "batch_size": 32, "warmup": 50, "weight_decay": 0.1, "every": 50, "settled": 1}
    runs |= {"test_sequences": 512, "test_batch": 64}
    size = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0, "chunk_size": 16}
    if scale == "smoke":
        small = {"steps": 4, "every": 2, "test_sequences": 8, "test_batch": 8, "batch_size": 4}
        columns = {"2 pairs": _column(2, 8)}
        return Plan(columns=columns, size={**size, "dim": 16}, rates=(3e-3,), runs={**runs, **small}, seeds=1)
    columns = {f"{pairs} pairs": _column(pairs, 4 * pairs) for pairs in PAIRS}
    if scale == "small":
        return Plan(columns=columns, size=size, rates=(3e-3,), runs=runs, seeds=1)
    runs |= {"steps": 20000, "batch_size": 64}
    return Plan(columns=columns, size=size, rates=(1e-3, 3e-3), runs=runs, seeds=3)


def _column(pairs: int, length: int) -> Column:
    task = {"task": "associative_recall", "pairs": pairs, "length": length, "symbols": max(64, pairs)}
    return Column(training=task, tests={"test": task})


TABLE = Table(
    title="Multi-query associative recall",
    models=(
        "hope",
        "hope/4 heads",
        "gated_delta_net/equal state",
        "gated_delta_net",
        "delta_net",
        "linear_attention",
        "transformer",
        "hope/reads M_t-1",
        "hope/reads the snapshot",
        "hope/residual main memory",
    ),
    settings={
        "hope/4 heads": {"heads": 4},
        "gated_delta_net/equal state": EQUAL_STATE,
        "hope/reads M_t-1": {"read": "previous"},
        "hope/reads the snapshot": {"read": "chunk"},
        "hope/residual main memory": {"residual_memory": True},
    },
    state=True,
    score="accuracy",
    plan=plan,
    note=(
        "Fresh sequences in every step. The state is what a model carries from token to token, without the snapshots "
        "that chunks of 16 need beside it."
    ),
)
