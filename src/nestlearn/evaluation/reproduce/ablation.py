"""Table 6: what each part of Hope is worth, and what our own choices are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.language_modeling import final_bits
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce.novels import NovelsPlan, NovelsTable, plan
from nestlearn.io import atomic_path

# Hope as the paper has it counts momentum among its parts; our default does without, so there it is a line that adds.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "hope": {},
    "hope/without DGD": {"inner_rule": "gd"},
    "hope/with momentum": {"momentum": True},
    "hope/without retention": {"retention": False},
    "hope/without CMS": {"cms_periods": (1,)},
    "hope/static k": {"static_projections": ("key",)},
    "hope/static v": {"static_projections": ("value",)},
    "hope/adaptive q": {"adaptive_query": True},
    "hope/static k, v and gates": {"static_projections": ("key", "value", "rate", "retention")},
    "hope/reads M_t-1": {"read": "previous"},
    "hope/reads the snapshot": {"read": "chunk"},
    "hope/retention to zero": {"retain_to": "zero"},
    "hope/negative eigenvalues": {"negative_eigenvalues": True},
    "hope/residual main memory": {"residual_memory": True},
    "hope/gate starts at 0.9": {"initial_gate": 0.9},
}

# Perplexity (mean of WikiText and LAMBADA) and accuracy as printed; what "without" is in our lines "with" turns round.
PAPER: dict[str, tuple[float, float]] = {
    "hope": (12.24, 58.1),
    "hope/without DGD": (13.41, 56.5),
    "hope/with momentum": (13.58, 56.9),
    "hope/without retention": (13.71, 57.2),
    "hope/without CMS": (13.04, 57.3),
    "hope/static k": (13.77, 56.9),
    "hope/static v": (13.90, 55.1),
    "hope/adaptive q": (12.19, 57.4),
}
TURNED_ROUND = ("hope/with momentum", "hope/adaptive q")


def costs(records: Sequence[Record]) -> dict[str, list[float]]:
    """Held-out bits per byte above those of "hope" with the same seed, by model; none for runs that diverged."""
    bits = {(r["job"]["model"], r["job"]["seed"]): final_bits(r) for r in records}
    found: dict[str, list[float]] = {}
    for (model, seed), own in bits.items():
        base = bits.get(("hope", seed), math.inf)
        if model != "hope" and math.isfinite(own) and math.isfinite(base):
            found.setdefault(model, []).append(own - base)
    return found


def paper_cost(model: str) -> float | None:
    """Bits per token above the paper's Hope, as a cost of our line."""
    if model == "hope" or model not in PAPER:
        return None
    cost = math.log2(PAPER[model][0] / PAPER["hope"][0])
    return -cost if model in TURNED_ROUND else cost


def page(records: Sequence[Record], _: Mapping[str, Any], plan: NovelsPlan) -> str:
    rows: list[list[Any]] = []
    differences = costs(records)
    for model in dict.fromkeys(record["job"]["model"] for record in records):
        own = [record for record in records if record["job"]["model"] == model]
        whole = [final_bits(record) for record in own if not record["diverged"]]
        printed, cost = PAPER.get(model), paper_cost(model)
        lost = len(own) - len(whole)
        score = with_error(whole) + (f" ({lost} diverged)" if lost else "") if whole else f"diverged in {lost}"
        rows.append(
            [
                model.removeprefix("hope/"),
                f"{own[0]['parameters']:,}",
                len(own),
                score,
                with_error(differences[model], signed=True) if model in differences else None,
                None if printed is None else f"{printed[0]:.2f} / {printed[1]:.1f}",
                None if cost is None else f"{cost:+.3f}",
            ]
        )
    header = ["Hope", "parameters", "seeds", "held-out bits/byte", "cost", "paper: ppl / accuracy", "paper: cost"]
    return (
        "The cost is in bits per byte; that of the paper, whose model has 1.3B parameters and 100B tokens, in bits per "
        "token, the logarithm of the perplexity's growth. Our default has no momentum and a static q, so for these two "
        "the paper's cost of the opposite change is printed with its sign turned.\n\n" + markdown_table(header, rows)
    )


def plot(records: Sequence[Record], _: Mapping[str, Any], path: Path) -> None:
    """Bars of the costs, the paper's as points."""
    from matplotlib.figure import Figure

    differences = costs(records)
    models = list(differences)
    figure = Figure(figsize=(7.5, 0.32 * len(models) + 1.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    found = [mean_and_error(differences[model]) for model in models]
    places = range(len(models))
    axes.barh(places, [mean for mean, _ in found], xerr=[e or 0.0 for _, e in found], color="C0", label="bits per byte")
    printed = [(place, cost) for place, cost in zip(places, map(paper_cost, models), strict=True) if cost is not None]
    axes.plot([cost for _, cost in printed], [place for place, _ in printed], "D", color="C1", markersize=5,
              label="the paper, bits per token")  # fmt: skip
    axes.set_yticks(places, [model.removeprefix("hope/") for model in models])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out loss above Hope's")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


TABLE = NovelsTable(title="Ablation (Table 6)", models=VARIANTS, plan=plan, page=page, plot=plot, one_rate=True)
