"""Table 2: language modelling and zero-shot questions, as small as a person can afford."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.language_modeling import comparison_table, plot_curves
from nestlearn.evaluation.report import markdown_table, with_error
from nestlearn.evaluation.reproduce.novels import NovelsPlan, NovelsTable, plan

MODELS: dict[str, Mapping[str, Any]] = {
    "hope": {},
    "titans": {},
    "gated_delta_net": {},
    "delta_net": {},
    "linear_attention": {},
    "hope_attention": {},
    "transformer": {"cms_periods": (1,)},
}

# 1.3B parameters, 100B tokens: perplexity of WikiText and LAMBADA, accuracy of LAMBADA, PIQA, ARC-e.
PAPER: dict[str, tuple[str, ...]] = {
    "hope": ("14.39", "10.08", "51.0", "73.9", "73.8"),
    "titans": ("15.60", "11.41", "49.1", "73.1", "72.4"),
    "delta_net": ("18.62", "17.10", "41.6", "70.1", "67.6"),
    "transformer": ("17.92", "17.73", "42.6", "71.4", "69.9"),
}


def page(records: Sequence[Record], measured: Mapping[str, Any], plan: NovelsPlan) -> str:
    rows: list[list[Any]] = []
    chance: dict[str, float] = {}
    for model in dict.fromkeys(record["job"]["model"] for record in records):
        names = [record["job"]["name"] for record in records if record["job"]["model"] == model]
        runs = [measured[name] for name in names if name in measured]
        if not runs:
            continue
        chance = {name: 100 * run["chance"] for name, run in runs[0].items() if "chance" in run}
        lambada = [run["lambada"] for run in runs]
        bits = [marks["bits"] for marks in lambada]
        rows.append(
            [
                model,
                len(runs),
                with_error(bits, 2) if None not in bits else "not finite",
                with_error([100 * marks["accuracy"] for marks in lambada], 1),
                *(with_error([100 * run[name]["accuracy"] for run in runs], 1) for name in chance),
                *PAPER.get(model, (None,) * 5),
            ]
        )
    guessing = ", ".join(f"{name} {number:.1f}" for name, number in chance.items())
    header = ["model", "seeds", "LAMBADA, bits of the word", "LAMBADA", *chance,
              *(f"paper: {name}" for name in ("Wiki ppl", "LMB ppl", "LMB", "PIQA", "ARC-e"))]  # fmt: skip
    return (
        f"\n\n{comparison_table(records, 'hope')}\n\n## Zero-shot\n\nAt most the first {plan.measure['questions']:,} "
        f"questions of each set, accuracies in per cent; by guessing: {guessing}. Models as small as these know no "
        f"answers: what compares them is how many bits they need for the last word of a LAMBADA passage.\n\n"
        f"{markdown_table(header, rows)}"
    )


def plot(records: Sequence[Record], _: Mapping[str, Any], path: Path) -> None:
    plot_curves(records, path)


TABLE = NovelsTable(
    title="Language modelling and zero-shot (Table 2)",
    models=MODELS,
    plan=plan,
    page=page,
    plot=plot,
    measure="zero-shot",
)
