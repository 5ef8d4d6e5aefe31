"""One run of a method that goes on learning: through domains, through groups of classes, or through one text twice."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.continual.learner import ContinualLearner
from nestlearn.continual.methods import (
    EWC,
    FineTuning,
    Frozen,
    InContext,
    Levels,
    LoRA,
    Method,
    Replay,
    domain_losses,
    run_stream,
)
from nestlearn.evaluation.class_stream import accuracy, read_groups
from nestlearn.evaluation.domains import read_domain
from nestlearn.evaluation.jobs import Job, Record
from nestlearn.models.stacking import find_mlps, stack_levels
from nestlearn.training.checkpoint import load_model
from nestlearn.training.tokenizers import Tokenizer

OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def make_method(settings: Mapping[str, Any], base: nn.Module, *, window: int, segment: int, seed: int) -> Method:
    """A method by its settings.

    Args:
        settings: "kind" is one of "frozen", "in context", "levels" (periods, lr, and others of `stack_levels` and
            `ContinualLearner`) and "fine-tuning", "ewc", "replay", "lora" (lr, optimizer, and what they need; "mlps"
            trains the MLP blocks alone).
        base: causal language model; it is not changed.
        window: longest context in tokens.
        segment: tokens of a step of fine-tuning.
        seed: of what is random.

    Raises:
        ValueError: for an unknown kind.
    """
    others = {name: value for name, value in settings.items() if name not in ("kind", "lr", "optimizer", "mlps")}
    kind = settings["kind"]
    if kind == "frozen":
        return Frozen(base, window=window)
    if kind == "in context":
        return InContext(base, window=window)
    if kind == "levels":
        periods = others.pop("periods")
        strategy = others.pop("strategy", "whole_depth")
        model = stack_levels(base, periods, strategy=strategy, rank=others.pop("rank", None), notice=None)
        return Levels(ContinualLearner(model, lr=settings["lr"], window=window, **others))
    kinds: dict[str, Any] = {"fine-tuning": FineTuning, "ewc": EWC, "replay": partial(Replay, seed=seed), "lora": LoRA}
    if kind not in kinds:
        raise ValueError(f"kind: expected frozen, in context, levels, {', '.join(kinds)}; got {kind!r}")
    blocks = [weight for weights in find_mlps(base).values() for weight in weights]
    if kind == "lora":
        others["targets"] = tuple(blocks)
    if settings.get("mlps"):
        others["trained"] = {f"{weight}.weight" for weight in blocks}
    rate = settings["lr"]
    optimizer = OPTIMIZERS[settings.get("optimizer", "sgd")]
    method: Method = kinds[kind](
        base, lambda parameters: optimizer(parameters, lr=rate), window=window, segment=segment, **others
    )
    return method


def run_job(job: Job) -> Record:
    """What a method does with what a job says; `what` is "domains", "classes" or "twice"."""
    torch.manual_seed(job["seed"])
    base, tokenizer = load_model(Path(job["folder"]) / job["base"])
    method = make_method(job["method"], base, window=job["window"], segment=job["segment"], seed=job["seed"])
    works = {"domains": _read_domains, "classes": _learn_classes, "twice": _read_twice}
    return works[job["what"]](job, method, tokenizer)


def _read_domains(job: Job, method: Method, tokenizer: Tokenizer) -> Record:
    """Losses (nats per token) on all domains, and on the base model's own last, before and after each."""
    names = list(job["domains"])
    random.Random(job["seed"]).shuffle(names)
    training, tests = [], []
    for name in [*names, job["home"]]:
        domain = read_domain(name, training_bytes=job["training"], test_bytes=job["tests"])
        texts, asked = [_ids(tokenizer, text) for text in domain.training], [_ids(tokenizer, t) for t in domain.tests]
        if job["tuning"]:  # the last part of what would be read, so that a choice does not know the test
            whole = torch.cat(texts)
            texts, asked = [whole[: -job["tests"]]], [whole[-job["tests"] :]]
        training.append(texts)
        tests.append(asked)
    return {"order": names, "losses": list(run_stream(method, training[:-1], tests))}


def _learn_classes(job: Job, method: Method, tokenizer: Tokenizer) -> Record:
    """Accuracy over the classes seen so far, after each group."""
    groups = read_groups(
        job["data"],
        groups=job["groups"],
        classes=job["classes"],
        training=job["training"],
        tests=job["tests"],
        seed=job["seed"],
        tuning=job["tuning"],
    )
    found = []
    for number, group in enumerate(groups, start=1):
        for _ in range(job["passes"]):
            method.observe(_ids(tokenizer, "".join(group.training)))
        method.end_domain()
        found.append(accuracy(method, groups[:number], tokenizer))
    return {"classes": [sum(len(g.labels) for g in groups[: i + 1]) for i in range(len(groups))], "accuracy": found}


def read_pages(job: Job, tokenizer: Tokenizer) -> tuple[Tensor, list[Tensor]]:
    """The pages of all domains, and texts of the base model's own; for tuning others, so that a choice does not know
    the test."""
    most, pages = job["training"], []
    for name in job["domains"]:
        whole = _ids(tokenizer, read_domain(name, training_bytes=2 * most, test_bytes=job["tests"]).training[0])
        middle = min(most, len(whole) // 2)
        pages.append(whole[middle:] if job["tuning"] else whole[:middle])
    home = read_domain(job["home"], training_bytes=job["tests"], test_bytes=job["tests"])
    return torch.cat(pages), [_ids(tokenizer, text) for text in (home.training if job["tuning"] else home.tests)]


def _read_twice(job: Job, method: Method, tokenizer: Tokenizer) -> Record:
    """Losses on the pages before anything was read and in the second reading, and on the base's own texts before it and
    after both. In the second reading each segment is predicted before it is learnt from again."""
    pages, home = read_pages(job, tokenizer)
    before = (domain_losses(method, [[pages]])[0], domain_losses(method, [home])[0])
    method.observe(pages)
    after = domain_losses(method, [[pages]])[0]
    second = after
    if isinstance(method, Levels):
        second = method.learner.observe(pages).loss
    else:
        method.observe(pages)
    return {"tokens": len(pages), "frozen": before[0], "second": second, "known": after,
            "home": [before[1], domain_losses(method, [home])[0]]}  # fmt: skip


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text).tolist())
