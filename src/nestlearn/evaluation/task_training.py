"""Training of one model on one synthetic task, from a description in plain JSON types to marks on fresh sequences."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nestlearn.evaluation.jobs import Job, Record
from nestlearn.evaluation.tasks import IGNORED, Answers, Examples, Task, build_task, mark, mark_values
from nestlearn.evaluation.tasks.compression import Compression, Compressor
from nestlearn.evaluation.tasks.needles import Needles
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.lstm import LSTMLM
from nestlearn.optim import LevelOptimizer
from nestlearn.training.checkpoint import checkpoint_path, newest_checkpoint, prune_checkpoints, save_checkpoint
from nestlearn.training.config import TrainingConfig
from nestlearn.training.session import learning_rate

# Streams of random numbers. What is asked while a model trains takes no part in the marks.
_FIXED_SET, _VALIDATION, _TEST, _STEPS = 0, 1, 2, 3
SAVE_SECONDS = 60.0


def train_on_task(job: Job) -> Record:
    """Trains the model of a job, or goes on with it, and marks it on each of the job's tests.

    Everything that a step needs is a function of the seed and the step, so a run that goes on from its checkpoint
    computes bitwise what it would have computed.

    Args:
        job: with these keys.
            model: settings of `HopeConfig` without the vocabulary, or {"lstm": true, "dim", "depth"}.
            training: description of the task that is trained on, for `build_task`.
            validation: description of what is looked at while it trains.
            tests: descriptions by name.
            steps, batch_size, lr, warmup, weight_decay, seed.
            examples: sequences of a fixed training set, or 0 for fresh ones in every step.
            every: steps between looks at the task on fresh sequences.
            settled: a run ends after so many looks in a row at which all is right.
            test_sequences: of each test.
            test_batch: sequences at once there.
            folder: of the checkpoint.

    Returns:
        "curve": step, loss and the marks of each look; "tests": marks by name; "steps": taken until all was right or
        the end; "parameters"; "diverged": whether the loss was no number.
    """
    task = build_task(job["training"])
    model = build_for_task(job["model"], task, seed=job["seed"])
    optimizer = LevelOptimizer.for_model(model, lr=job["lr"], weight_decay=job["weight_decay"])
    fixed = _fixed_set(task, job) if job["examples"] else None
    looked_at, tests = build_task(job["validation"]), {name: build_task(test) for name, test in job["tests"].items()}
    validation = looked_at.sample(min(256, job["test_sequences"]), _generator(job["seed"], _VALIDATION))
    folder, step, curve = Path(job["folder"]), 0, []
    found = newest_checkpoint(folder)
    if found is not None:
        found.restore(model, optimizer)
        step, curve = found.step, found.progress["curve"]
    rate = TrainingConfig(steps=job["steps"], lr=job["lr"], warmup=job["warmup"])
    diverged = False
    began = time.monotonic()
    while step < job["steps"] and not _is_settled(curve, job["settled"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, rate)
        loss = _loss(model, _batch(task, fixed, job, step))
        if not math.isfinite(loss.item()):
            diverged = True
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % job["every"] == 0 or step == job["steps"]:
            marks = evaluate_task(model, looked_at, validation, job["test_batch"])
            curve.append({"step": step, "loss": round(loss.item(), 5), **_rounded(marks)})
        if time.monotonic() - began > SAVE_SECONDS:
            _save(folder, model, optimizer, step, curve, job)
            began = time.monotonic()
    marks_of = {}
    for name, test in tests.items():
        examples = test.sample(job["test_sequences"], _generator(job["seed"], _TEST))
        marks_of[name] = _rounded(evaluate_task(model, test, examples, job["test_batch"]))
    return {
        "curve": curve,
        "tests": marks_of,
        "steps": step,
        "parameters": model.num_parameters(),  # type: ignore[operator]
        "diverged": diverged,
    }


def build_for_task(settings: Mapping[str, Any], task: Task, *, seed: int) -> nn.Module:
    """The model of a job, with as large a vocabulary as the task has."""
    torch.manual_seed(seed)
    if settings.get("lstm"):
        if isinstance(task, Compression):
            raise ValueError("models: an LSTM has no form for compression; leave it, or the column, out")
        others = {name: value for name, value in settings.items() if name != "lstm"}
        return LSTMLM(task.vocab_size, **others)
    model = HopeLM(HopeConfig(**{**settings, "vocab_size": task.vocab_size}))
    return Compressor(model) if isinstance(task, Compression) else model


@torch.no_grad()
def evaluate_task(model: nn.Module, task: Task, examples: Examples, batch_size: int) -> Answers:
    """Marks of the model on examples of a task, so many sequences at once."""
    count = mark_values if isinstance(task, Needles) else mark
    total = Answers(0, 0, 0, 0)
    for tokens, targets in zip(
        examples.tokens.split(batch_size), examples.targets.split(batch_size), strict=True
    ):  # padding lies behind all answers, so its length need not be told
        total = total.add(count(model(tokens)[0], targets))
    return total


def _is_settled(curve: list[dict[str, Any]], looks: int) -> bool:
    return len(curve) >= looks and all(point["exact"] == 1.0 for point in curve[-looks:])


def _batch(task: Task, fixed: Examples | None, job: Job, step: int) -> Examples:
    generator = _generator(job["seed"], _STEPS + step)
    if fixed is None:
        return task.sample(job["batch_size"], generator)
    # Each pass reads the fixed set in an order of its own.
    batches = max(1, job["examples"] // job["batch_size"])
    order = torch.randperm(job["examples"], generator=_generator(job["seed"], -1 - step // batches))
    rows = order[step % batches * job["batch_size"] :][: job["batch_size"]]
    return Examples(fixed.tokens[rows], fixed.targets[rows])


def _fixed_set(task: Task, job: Job) -> Examples:
    return task.sample(job["examples"], _generator(job["seed"], _FIXED_SET))


def _generator(seed: int, stream: int) -> torch.Generator:
    """Randomness of one purpose: no two pairs of numbers share it."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + stream)


def _loss(model: nn.Module, examples: Examples) -> torch.Tensor:
    logits = model(examples.tokens)[0]
    return F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=IGNORED)


def _rounded(marks: Answers) -> dict[str, float]:
    return {"accuracy": round(marks.accuracy, 5), "exact": round(marks.exact, 5)}


def _save(folder: Path, model: nn.Module, optimizer: LevelOptimizer, step: int, curve: list[Any], job: Job) -> None:
    path = checkpoint_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        path,
        model=model,
        optimizer=optimizer,
        step=step,
        model_config=dict(job["model"]),
        tokenizer="none",
        progress={"curve": curve},
    )
    prune_checkpoints(folder, 1)
