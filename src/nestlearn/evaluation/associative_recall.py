"""MQAR, multi-query associative recall (Arora et al., 2312.04927): read pairs, then say the value of every key asked.

    python -m nestlearn.evaluation.associative_recall --out results/mqar

compares mixers, and the choices that docs/decisions.md left to recall (decisions 2, 3, 11 and 18).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from nestlearn.evaluation.jobs import Job, Record, provenance, run_jobs
from nestlearn.evaluation.report import write_report
from nestlearn.evaluation.tasks import IGNORED
from nestlearn.evaluation.tasks.associative_recall import AssociativeRecall
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.config import PAPER
from nestlearn.optim import LevelOptimizer

VARIANTS: dict[str, dict[str, Any]] = {
    "hope": {},
    "hope, read previous": {"read": "previous"},
    "hope, read chunk": {"read": "chunk"},
    "hope, retain to zero": {"retain_to": "zero"},
    "hope, residual memory": {"residual_memory": True},
    "hope, gd": {"inner_rule": "gd"},
    "hope, delta": {"inner_rule": "delta"},
    "hope, momentum": {"momentum": True},
    "hope, negative eigenvalues": {"negative_eigenvalues": True},
    "hope, adaptive q": {"adaptive_query": True},
    "hope, write scales 0.5": {"write_scale": 0.5, "projection_write_scale": 0.5},
    "hope, write scales 0.25": {"write_scale": 0.25, "projection_write_scale": 0.25},
    "hope, write scales 1": {"write_scale": 1.0, "projection_write_scale": 1.0},
    "hope, write bound 1": {"write_bound": 1.0},
    "hope, gate 0.1": {"initial_gate": 0.1},
    "hope, gate 0.3": {"initial_gate": 0.3},
    "hope, gate 0.9": {"initial_gate": 0.9},
    "hope, chunk 64": {"chunk_size": 64},
    "hope, chunk 4": {"chunk_size": 4},
    "hope, literal paper": PAPER,
    "titans": {"mixer": "titans"},
    "gated_delta_net": {"mixer": "gated_delta_net"},
    "delta_net": {"mixer": "delta_net"},
    "linear_attention": {"mixer": "linear_attention"},
    "attention": {"mixer": "attention"},
    "transformer": {"mixer": "plain_attention"},
}


def train_recall(job: Job) -> Record:
    """Trains one model on MQAR; the record holds its accuracy on fixed fresh sequences over the steps."""
    settings = {"dim": 64, "depth": 2, "heads": 2, "cms_periods": (1,), "cms_expansion": 2.0, "chunk_size": 16}
    task = AssociativeRecall(pairs=job["pairs"], length=job["length"], symbols=job["symbols"])
    torch.manual_seed(job["seed"])
    config = HopeConfig(**{**settings, "vocab_size": task.vocab_size, **job["settings"]})
    model = HopeLM(config)
    optimizer = LevelOptimizer.for_model(model, lr=job["lr"], weight_decay=0.1)
    data = torch.Generator().manual_seed(1000 + job["seed"])
    test_tokens, test_targets, _ = task.sample(512, torch.Generator().manual_seed(1))
    curve = []
    for step in range(1, job["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * min(1.0, step / 50)
        tokens, targets, _ = task.sample(job["batch_size"], data)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % job["every"] == 0:
            with torch.no_grad():
                right = model(test_tokens)[0].argmax(-1) == test_targets
            accuracy = right.sum().item() / (test_targets != IGNORED).sum().item()
            curve.append({"step": step, "loss": round(loss.item(), 4), "accuracy": round(accuracy, 4)})
            if accuracy >= 0.99:
                break
    reached = next((point["step"] for point in curve if point["accuracy"] >= 0.95), None)
    return {"steps_to_95": reached, "curve": curve, "parameters": model.num_parameters(), "config": config.to_dict()}


def table(records: Sequence[Record]) -> str:
    """Markdown: steps to 95% for each seed at each variant's best learning rate."""
    names = list(dict.fromkeys(record["job"]["variant"] for record in records))
    lines = [
        "| model | parameters | lr | steps to 95%, each seed | mean | accuracy at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        best = None
        for lr in sorted({r["job"]["lr"] for r in records if r["job"]["variant"] == name}):
            runs = [r for r in records if r["job"]["variant"] == name and r["job"]["lr"] == lr]
            counted = [r["steps_to_95"] or r["job"]["steps"] + r["job"]["every"] for r in runs]
            final = statistics.mean(r["curve"][-1]["accuracy"] for r in runs)
            key = (statistics.mean(counted), -final)
            if best is None or key < best[0]:
                best = (key, lr, runs, counted, final)
        assert best is not None
        _, lr, runs, counted, final = best
        steps = ", ".join(str(r["steps_to_95"] or f"> {r['job']['steps']}") for r in runs)
        mean = f"{statistics.mean(counted):.0f}" if all(r["steps_to_95"] for r in runs) else "-"
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {lr:g} | {steps} | {mean} | {final:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mqar"), help="path of the results, without suffix")
    parser.add_argument(
        "--runs", type=Path, default=None, help="folder of the records; by default runs/<name of --out>"
    )
    parser.add_argument("--variants", default=";".join(VARIANTS), help="which, separated by ';'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=lambda s: [float(x) for x in s.split(",")], default=[1e-3, 3e-3])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--symbols", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    variants = arguments.variants.split(";")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {unknown}; known, separated by ';': {'; '.join(VARIANTS)}")
    jobs = [
        {
            "name": f"{name.replace(', ', '-').replace(' ', '_')}-lr{lr:g}-seed{seed}",
            "variant": name,
            "settings": VARIANTS[name],
            "lr": lr,
            "seed": seed,
            **{key: getattr(arguments, key) for key in ("pairs", "length", "symbols", "steps", "every", "batch_size")},
        }
        for seed in range(arguments.seeds)
        for name in variants
        for lr in arguments.lrs
    ]
    runs = arguments.runs or Path("runs") / f"{arguments.out.name}-{provenance()['commit']}"
    records = run_jobs(train_recall, jobs, runs, processes=arguments.jobs)
    text = (
        f"{arguments.pairs} pairs, length {arguments.length}, {arguments.symbols} keys and values; 2 layers, width 64, "
        f"chunk 16 unless said; batch {arguments.batch_size}, AdamW, for each model the best learning "
        f"rate of {', '.join(f'{lr:g}' for lr in arguments.lrs)}, evaluated every {arguments.every} steps, "
        f"at most {arguments.steps}; one CPU thread a run.\n\n{table(records)}"
    )
    print(write_report(arguments.out, "Multi-query associative recall", text, {"runs": records}))


if __name__ == "__main__":
    main()
