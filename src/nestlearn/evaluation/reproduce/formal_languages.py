"""Table 5: formal languages, in strings as long as those of the training and in longer ones."""

from __future__ import annotations

from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table
from nestlearn.evaluation.tasks.formal_languages import BINS, LANGUAGES

# To count modulo two takes an eigenvalue of -1, to count without bound a head whose writes add up (decision 43); with
# longer chunks a model learns where in its chunk a count ended, which says nothing about longer strings.
HOPE = {"negative_eigenvalues": True}
COUNTING = {**HOPE, "slowest_gate": 3e-4, "empty_memory": True, "chunk_size": 1}


def plan(scale: Scale) -> Plan:
    """Lengths and bins are those of the paper at every scale."""
    columns = {
        language: Column(
            training=_strings(language, *BINS[0]),
            tests={f"bin {number}": _strings(language, *lengths) for number, lengths in enumerate(BINS)},
        )
        for language in LANGUAGES
    }
    # Every run goes to the end of its schedule: 16 looks, 50 steps apart.
    runs = {"steps": 800, "batch_size": 32, "warmup": 30, "weight_decay": 0.0, "every": 50, "settled": 16}
    runs |= {"test_sequences": 512, "test_batch": 64}
    size = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": [1], "cms_expansion": 2.0, "chunk_size": 16}
    if scale == "smoke":
        few = {name: columns[name] for name in ("parity", "a^n b^n")}
        small = {"steps": 4, "every": 2, "test_sequences": 8, "test_batch": 8, "batch_size": 4}
        return Plan(columns=few, size={**size, "dim": 16}, rates=(3e-3,), runs={**runs, **small}, seeds=1)
    if scale == "small":
        single = dict.fromkeys(("transformer", "linear_attention", "delta_net", "lstm"), 1)
        return Plan(columns=columns, size=size, rates=(3e-3,), runs=runs, seeds=3, seeds_of=single)
    size |= {"dim": 128, "heads": 4}
    runs |= {"steps": 20000, "settled": 100}
    return Plan(columns=columns, size=size, rates=(1e-3, 3e-3), runs=runs, seeds=3)


def _strings(language: str, shortest: int, longest: int) -> dict[str, object]:
    return {"task": "formal_language", "language": language, "shortest": shortest, "longest": longest}


def _paper(**rows: str) -> dict[str, dict[str, str]]:
    return {model: dict(zip(LANGUAGES, text.split(), strict=True)) for model, text in rows.items()}


TABLE = Table(
    title="Formal languages (Table 5)",
    models=("hope", "hope/counting", "transformer", "linear_attention", "delta_net", "lstm"),
    settings={"hope": HOPE, "hope/counting": COUNTING},
    score="exact",
    plan=plan,
    paper=_paper(
        hope="100/100 100/100 100/100 100/100 100/100 100/100",
        transformer="46.4/0 0/0 0/0 100/100 100/100 100/100",
        linear_attention="78.1/0 0/0 0/0 100/100 100/100 100/100",
        delta_net="98.2/10.1 0/0 0/0 100/100 100/100 100/100",
        lstm="100/100 100/100 100/100 100/100 100/100 100/100",
    ),
    note=(
        "Trained on strings of 1 to 50 symbols, fresh in every step. Bin 0 has such strings, bin 1 strings of 51 to "
        "100 symbols. A string counts where after every symbol the set of symbols that may come next is right. Bin 1 "
        "has no part in what ends a run or chooses a learning rate. Hope alone has options of its own here: "
        "negative eigenvalues, and in a second row also heads that write slowly, whose memories start empty, in chunks "
        "of one token."
    ),
)
