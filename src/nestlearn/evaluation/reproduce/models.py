"""The models of the tables, all with as many parameters as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nestlearn.evaluation.language_modeling import MODELS, model_config
from nestlearn.evaluation.matching import count_parameters
from nestlearn.memory.mlp import MLPMemory
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.lstm import LSTMLM

NAMES = (*MODELS, "lstm")


def table_models(
    names: tuple[str, ...],
    size: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    vocab_size: int,
) -> dict[str, dict[str, Any]]:
    """Settings for `build_for_task` by name. The parameter count of "hope" is everyone's.

    Args:
        names: of the models, as in `language_modeling.MODELS`, or "lstm".
        size: dim, depth, heads and other settings of all.
        settings: of single models.
        vocab_size: of the task.

    Raises:
        ValueError: if there is no such model.
    """
    unknown = [name for name in names if name != "lstm" and name.partition("/")[0] not in MODELS]
    if unknown:
        raise ValueError(f"models: expected some of {', '.join(NAMES)}; got {', '.join(unknown)}")
    size = {name: tuple(value) if isinstance(value, list) else value for name, value in size.items()}
    reference = model_config("hope", vocab_size=vocab_size, **{**size, **settings.get("hope", {})})
    target = count_parameters(reference)
    found = {}
    for name in names:
        if name == "lstm":
            found[name] = _lstm(vocab_size, size["depth"], target)
            continue
        own = {**size, **settings.get(name, {})}
        goal = None if name == "hope" else target
        config = model_config(name, target=goal, vocab_size=vocab_size, **own).to_dict()
        found[name] = {key: value for key, value in config.items() if key != "vocab_size"}
    return found


def state_floats(settings: Mapping[str, Any]) -> int | None:
    """Numbers that a model carries from token to token, snapshots of memories apart; None if they grow with the tokens.

    Args:
        settings: as from `table_models`.
    """
    if settings.get("lstm"):
        return 2 * int(settings["dim"]) * int(settings["depth"])
    config = HopeConfig(**{**settings, "vocab_size": 2})
    if config.mixer in ("attention", "plain_attention"):
        return None
    with torch.device("meta"):
        model = HopeLM(config)
        state = model.init_state(1)
    count = sum(
        tensor.numel() for name, tensor in state.items() if tensor.is_floating_point() and "snapshot" not in name
    )
    for module in model.modules():
        if isinstance(module, MLPMemory):  # narrow memories stand in tensors as wide as the others'
            padding = sum(max(module.hidden) - width for width in module.hidden)
            copies = 2 if config.momentum and config.mixer in ("self_modifying_titans", "tnt") else 1
            heads, key = module.inner.shape[0], module.inner.shape[-1]
            count -= copies * 2 * heads * key * padding
    return count


def _lstm(vocab_size: int, depth: int, target: int) -> dict[str, Any]:
    """The largest LSTM that is no larger."""

    def parameters(dim: int) -> int:
        with torch.device("meta"):
            return LSTMLM(vocab_size, dim, depth).num_parameters()

    dim = 1
    while parameters(dim + 1) <= target:
        dim += 1
    return {"lstm": True, "dim": dim, "depth": depth}
