"""The file of what a learner learnt: changes, what waits for the next updates, and counts; never text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.io import atomic_save_safetensors, load_safetensors, load_safetensors_metadata
from nestlearn.memory.adaptation import FastWeight, LearningRule
from nestlearn.memory.continuum import check_periods
from nestlearn.models.in_context import LevelMemory
from nestlearn.models.stacking import StackedLevel, StackedModel

FORMAT = "nestlearn-memory-1"


class Learnt(NamedTuple):
    """The content of a file.

    Attributes:
        memory: of the levels.
        rules: by which they learn.
        updates: how often each level has changed.
        window, nested: how the learner reads.
    """

    memory: LevelMemory
    rules: tuple[LearningRule, ...]
    updates: tuple[int, ...]
    window: int
    nested: bool


def save_memory(
    path: str | os.PathLike[str],
    model: StackedModel,
    memory: LevelMemory,
    rules: Sequence[LearningRule],
    updates: Sequence[int],
    manner: Mapping[str, Any],
) -> None:
    """Writes a memory; the file is whole, or what it was before.

    Args:
        path: of the file.
        model, memory, rules, updates: as in `Learnt`.
        manner: "window" and "nested".

    Raises:
        OSError: if it cannot be written.
        ValueError: if a value is not finite: such a memory is not worth an earlier file.
    """
    tensors = {
        f"{name}.{field}": tensor
        for name, weight in memory.weights.items()
        for field, tensor in zip(FastWeight._fields, weight, strict=True)
        if tensor is not None
    }
    broken = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise ValueError(f"{broken} holds values that are not finite; {os.fspath(path)} was not written")
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint(model.base),
        "base": type(model.base).__name__,
        "levels": json.dumps(_levels(model)),
        "rules": json.dumps([rule.to_dict() for rule in rules]),
        "rows": str(memory.rows),
        "tokens": str(memory.tokens),
        "manner": json.dumps(dict(manner)),
        "updates": json.dumps(list(updates)),
    }
    atomic_save_safetensors(tensors, path, metadata)


class Description(NamedTuple):
    """What a file says of itself."""

    fingerprint: str
    base: str
    levels: tuple[StackedLevel, ...]
    rank: int | None
    rules: tuple[LearningRule, ...]
    updates: tuple[int, ...]
    rows: int
    tokens: int
    window: int
    nested: bool


def describe_memory(path: str | os.PathLike[str]) -> Description:
    """What a file is, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged, of a later version or of another kind.
    """
    where = os.fspath(path)
    metadata = load_safetensors_metadata(path)
    kind = metadata.get("format", "")
    if kind != FORMAT:
        later = kind.startswith("nestlearn-memory-")
        mend = "update nestlearn to read it" if later else "expected a file that ContinualLearner.save wrote"
        raise ValueError(f"{where}: format {kind or 'unknown'}, this version reads {FORMAT}; {mend}")
    try:
        stack = json.loads(metadata["levels"])
        found = Description(
            metadata["fingerprint"],
            metadata["base"],
            tuple(
                StackedLevel(period=level["period"], blocks=tuple(level["blocks"]), weights=tuple(level["weights"]))
                for level in stack["levels"]
            ),
            stack["rank"],
            tuple(LearningRule(**rule) for rule in json.loads(metadata["rules"])),
            tuple(int(count) for count in json.loads(metadata["updates"])),
            int(metadata["rows"]),
            int(metadata["tokens"]),
            int(json.loads(metadata["manner"])["window"]),
            bool(json.loads(metadata["manner"])["nested"]),
        )
        check_periods([level.period for level in found.levels])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: its description is damaged ({error}); take another copy") from None
    counts = (found.tokens, found.rows - 1, found.window - 2, (found.rank or 1) - 1, *found.updates)
    if not len(found.updates) == len(found.rules) == len(found.levels) or min(counts) < 0:
        raise ValueError(f"{where}: its description is damaged (numbers out of range); take another copy")
    return found


def load_memory(path: str | os.PathLike[str], model: StackedModel, *, device: torch.device) -> Learnt:
    """Reads a memory for a model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged, of a later version, of another base model or other levels, or
            holds values that are not finite.
    """
    where = os.fspath(path)
    found = describe_memory(path)
    own = fingerprint(model.base)
    if found.fingerprint != own:
        raise ValueError(
            f"{where}: learnt on another base model ({found.base}, fingerprint {found.fingerprint}) than this "
            f"{type(model.base).__name__} ({own}); load it with the model it was learnt on, in the same precision"
        )
    if (found.levels, found.rank) != (model.levels, model.rank):
        raise ValueError(
            f"{where}: has other levels than this model. It has periods {[level.period for level in found.levels]}, "
            f"rank {found.rank}; the model has {list(model.periods)}, rank {model.rank}; stack the model as it was "
            f"stacked then"
        )
    tensors = load_safetensors(path, device=str(device))
    fresh = model.fresh(found.rows, found.rules)
    expected = {
        f"{name}.{field}": tensor
        for name, weight in fresh.items()
        for field, tensor in zip(FastWeight._fields, weight, strict=True)
        if tensor is not None
    }
    for name in sorted(set(expected) | set(tensors)):
        if name not in tensors or name not in expected or _kind(tensors[name]) != _kind(expected[name]):
            raise ValueError(f"{where}: {name} is missing, too many, or of another shape or type; take another copy")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{where}: {name} holds values that are not finite; take an earlier copy")
    weights = {
        name: FastWeight(*(tensors.get(f"{name}.{field}") for field in FastWeight._fields))  # type: ignore[arg-type]
        for name in fresh
    }
    memory = LevelMemory(weights, found.rows, found.tokens)
    return Learnt(memory, found.rules, found.updates, found.window, found.nested)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def fingerprint(base: nn.Module) -> str:
    """A digest of a model's weights: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _levels(model: StackedModel) -> dict[str, Any]:
    return {
        "rank": model.rank,
        "levels": [
            {"period": level.period, "blocks": list(level.blocks), "weights": list(level.weights)}
            for level in model.levels
        ],
    }
