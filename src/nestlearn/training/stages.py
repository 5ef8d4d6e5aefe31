"""A later stage of training: a new run that starts from the weights of another one, under settings that may differ.

The second stage of TNT (2511.07343) is one: the same parameters, smaller chunks in the local memories, a short
schedule of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nestlearn.training.checkpoint import find_checkpoint
from nestlearn.training.config import RunConfig

__all__ = ["next_stage", "start_from"]


def next_stage(path: str | os.PathLike[str], *, steps: int) -> RunConfig:
    """The run that goes on from another run's weights for `steps` steps, with that run's settings.

    Its learning rate warms up and decays afresh, the warm-up as long in proportion, and its seed is one more, so that
    the text comes in another order.

    Args:
        path: a run's folder (its newest checkpoint), or a checkpoint file.
        steps: optimizer steps, at least 1.

    Raises:
        FileNotFoundError, ValueError: as `find_checkpoint`.
    """
    found = find_checkpoint(path)
    tables = RunConfig.from_dict(found.run).to_dict()
    training = tables["training"]
    tables["training"] = training | {
        "start_from": str(os.path.abspath(os.path.expanduser(path))),
        "warmup": round(training["warmup"] * steps / training["steps"]),
        "seed": training["seed"] + 1,
        "steps": steps,
    }
    return RunConfig.from_dict(tables)


def start_from(
    path: str | os.PathLike[str], model: nn.Module, settings: Mapping[str, Any], notice: Callable[[str], None]
) -> dict[str, Any]:
    """Loads another run's weights into a model whose parameters have the same names and shapes.

    Args:
        path: a run's folder (its newest checkpoint), or a checkpoint file.
        model: gets the weights.
        settings: the model's, as in `Checkpoint.model`.
        notice: called with a sentence that says from where, and which settings of the model have changed.

    Returns:
        For the record, as plain JSON types: checkpoint, step, and changed (setting: [there, here]).

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or its parameters are others; names them, and the settings that differ.
    """
    found = find_checkpoint(path)
    then = found.model
    changed = {name: [then[name], now] for name, now in settings.items() if name in then and then[name] != now}
    told = ", ".join(f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in changed.items())
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
    differ = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"training.start_from: {found.path} holds other parameters than this model: {len(differ)} differ, first "
            f"{name} ({there.get(name, 'absent')} there, {here.get(name, 'absent')} here). These settings differ: "
            f"{told or 'none'}; a later stage may change those that leave the parameters' shapes alone, such as "
            f"local_chunk_sizes, chunk_size or read"
        )
    model.load_state_dict(found.weights)
    notice(f"starting from the weights of {found.path} (step {found.step:,}); model settings changed: {told or 'none'}")
    return {"checkpoint": str(found.path), "step": found.step, "changed": changed}
