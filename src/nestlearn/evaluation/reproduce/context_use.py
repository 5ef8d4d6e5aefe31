"""Figure 10: loss against position, in windows much longer than those of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.report import markdown_table, mean_and_error, with_error
from nestlearn.evaluation.reproduce.ablation import VARIANTS
from nestlearn.evaluation.reproduce.novels import NovelsPlan, NovelsTable, plan, while_learning
from nestlearn.io import atomic_path

MODELS: dict[str, Mapping[str, Any]] = {
    "hope": {},
    **{name: VARIANTS[name] for name in ("hope/without DGD", "hope/without CMS", "hope/without retention")},
    "titans": {},
    "gated_delta_net": {},
    "transformer": {"cms_periods": (1,)},
}


def page(records: Sequence[Record], measured: Mapping[str, Any], plan: NovelsPlan) -> str:
    by_model = _by_model(records, measured)
    if not by_model:
        return "No model's loss was finite."
    some = next(iter(by_model.values()))[0]
    length = plan.runs["sequence_length"]
    texts = max(stretch["error"] for runs in by_model.values() for stretches in runs for stretch in stretches)
    given = {r["job"]["model"] for r in records}
    given |= {while_learning(r["job"]["model"]) for r in records if while_learning(r["job"]["name"]) in measured}
    lost = sorted(given - set(by_model))
    left_out = f" Left out, for losses that were not finite: {', '.join(lost)}." if lost else ""
    header = ["model", "seeds", *(f"{stretch['begin']:,}-{stretch['end']:,}" for stretch in some)]
    learning = _learning(records, measured, plan)
    losses = [[name, len(runs), *(with_error(bits, 3) for bits in _over(runs, "bits"))] for name, runs in
              by_model.items()]  # fmt: skip
    gains = [[name, len(runs), *(with_error(gain, signed=True) for gain in _over(runs, "gain")[1:])] for name, runs in
             by_model.items()]  # fmt: skip
    return (
        f"Then the models read windows of {plan.measure['window']:,} bytes of the other novels, "
        f"{plan.measure['window'] // length} times as long as any in training, and the loss is taken by position.\n\n"
        f"## Bits per byte by position\n\n{markdown_table(header, losses)}\n\n"
        f"## What the longer context is worth\n\nBits per byte by which the loss is lower than that of the same model "
        f"on the same bytes with a context that begins anew every {length:,} bytes. Where it goes on growing, the "
        f"model uses what lies further back than all that it was trained on; where it is negative, the context does "
        f"harm. ± is over seeds, which all read the same windows; over windows the standard error of a gain is at most "
        f"{texts:.4f}.{left_out}\n\n"
        f"{markdown_table([*header[:2], *header[3:]], gains)}{learning}\n\n"
        "The paper prints no numbers for its Figure 10."
    )


def plot(records: Sequence[Record], measured: Mapping[str, Any], path: Path) -> None:
    """Loss and worth of the context over the position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    by_model = _by_model(records, measured)
    if not by_model:
        return
    for panel, key, title in zip(
        panels, ("bits", "gain"), ("bits per byte", "bits per byte gained by the longer context"), strict=True
    ):
        for number, (name, runs) in enumerate(by_model.items()):
            found = [mean_and_error(values) for values in _over(runs, key)]
            middle = [(stretch["begin"] + stretch["end"]) / 2 for stretch in runs[0]]
            panel.errorbar(middle, [m for m, _ in found], [e or 0.0 for _, e in found], fmt="o-", markersize=3,
                           color=f"C{number}", label=name)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xlabel("position in bytes")
        panel.set_ylabel(title)
        panel.grid(alpha=0.25)
    # What fails to reach further than its training would squash all others.
    bits = [_mean(values) for runs in by_model.values() for values in _over(runs, "bits")]
    panels[0].set_ylim(min(bits) - 0.05, min(min(bits) + 0.6, max(bits) + 0.05))
    low = min(_mean(values) for name, runs in by_model.items() for values in _over(runs, "gain"))
    panels[1].set_ylim(max(low, -0.05) - 0.01, None)
    panels[0].legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _by_model(records: Sequence[Record], measured: Mapping[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """The stretches of every run, by model; those in which levels learn under a name of their own."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for record in records:
        name, model = record["job"]["name"], record["job"]["model"]
        learnt = measured.get(while_learning(name))
        for label, stretches in (
            (model, measured.get(name)),
            (while_learning(model), learnt["stretches"] if learnt else None),
        ):
            if stretches and all(value is not None for stretch in stretches for value in stretch.values()):
                found.setdefault(label, []).append(stretches)
    return found


def _learning(records: Sequence[Record], measured: Mapping[str, Any], plan: NovelsPlan) -> str:
    """What "levels learn" means, which rules were tried, and which were chosen."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        learnt = measured.get(while_learning(record["job"]["name"]))
        if learnt and learnt["chosen"]:
            found.setdefault(record["job"]["model"], []).append(learnt)
    if not found:
        return ""
    names = [f"{rule['rule']} {rule['lr']:g} every {rule['period']:,}" for rule in plan.learning]
    rows = []
    for model, runs in found.items():
        tried = [[run["tried"][i] for run in runs] for i in range(len(names))]
        cells = [None if None in values else f"{_mean(values):.4f}" for values in tried]
        chosen = [names[plan.learning.index(run["chosen"])] for run in runs]
        rows.append([model, *cells, ", ".join(dict.fromkeys(chosen))])
    return (
        '\n\nWhere "levels learn", all MLP blocks learn from each period of bytes once it is read, in every window '
        "from the trained weights on (Eq. 71, the summed gradient, clipped to norm 1). Their gain is over the same "
        "model at rest with a context that begins anew. Each run takes the rule with the fewest bits per byte on "
        f"windows of the training side's novels:\n\n{markdown_table(['model', *names, 'chosen'], rows)}"
    )


def _over(runs: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[list[float]]:
    """For each stretch the values of all seeds."""
    return [[stretch[key] for stretch in stretches] for stretches in zip(*runs, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return mean_and_error(values)[0]


TABLE = NovelsTable(
    title="Context use (Figure 10)",
    models=MODELS,
    plan=plan,
    page=page,
    plot=plot,
    measure="context use",
    learners=("hope",),
)
