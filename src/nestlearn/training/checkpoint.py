"""Checkpoints: one safetensors file each, written whole or not at all.

A file holds the weights (``model.<name>``), the optimizer's state with what slow levels have gathered so far
(``optimizer.<path>``), and in its metadata the step, the model's and the run's configuration and the tokenizer. Random
numbers need no entry: every step of training seeds them from the run's seed and the step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nestlearn.io import atomic_save_safetensors, load_safetensors, load_safetensors_metadata, missing_file

__all__ = [
    "Checkpoint",
    "checkpoint_path",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "newest_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]

_FORMAT = "nestlearn-checkpoint-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")

Notice = Callable[[str], None]
_log: Notice = logging.getLogger(__name__).warning


class Stateful(Protocol):
    """What has a state dict, such as an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint file.

    Args:
        path: The file.
        step: Optimizer steps taken.
        model: Keyword arguments of the model's configuration.
        tokenizer: Its spec for `load_tokenizer`; a relative path lies in the run's folder.
        run: The tables of the `RunConfig`.
        progress: Whatever else the loop needs to go on.
        weights: The model's state dict.
        optimizer: The optimizer's state dict, None where it was not read.
    """

    path: Path
    step: int
    model: dict[str, Any]
    tokenizer: str
    run: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(repr=False)
    optimizer: dict[str, Any] | None = field(repr=False, default=None)

    def restore(self, model: nn.Module, optimizer: Stateful | None = None) -> None:
        """Load the weights into `model`, and the state into `optimizer` where one is given.

        Raises:
            ValueError: If they do not fit; names the file and the first tensors that differ.
        """
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:4]]
            raise ValueError(f"{self.path} holds another model than this one: {' '.join(lines)}") from None
        if optimizer is not None:
            if self.optimizer is None:
                raise ValueError(f"{self.path} was read without the optimizer's state; use load_checkpoint(path)")
            optimizer.load_state_dict(self.optimizer)


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return Path(folder) / "checkpoints" / f"step-{step:08d}.safetensors"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint files of a run's folder, oldest first; whole ones and damaged ones."""
    found = Path(folder) / "checkpoints"
    paths = [path for path in found.iterdir() if _NAME.fullmatch(path.name)] if found.is_dir() else []
    return sorted(paths, key=lambda path: int(path.stem.removeprefix("step-")))


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Stateful | None = None,
    step: int,
    model_config: Mapping[str, Any],
    tokenizer: str,
    run: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, atomically: `path` is the whole new file, or what it was before.

    Args:
        path: The file, from `checkpoint_path`.
        model, optimizer: Their state dicts are saved.
        step, model_config, tokenizer, run, progress: As in `Checkpoint`; plain JSON types.

    Raises:
        OSError: If it cannot be written (a full disk); names the file, and earlier checkpoints are untouched.
        ValueError: If a weight is not finite: such a model is not worth an earlier checkpoint.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name.removeprefix('model.')} holds values that are not finite; {path} was not written")
    metadata = {
        "format": _FORMAT,
        "step": step,
        "model": model_config,
        "tokenizer": tokenizer,
        "run": run or {},
        "progress": progress or {},
        "optimizer": None if optimizer is None else _flatten(optimizer.state_dict(), "optimizer", tensors),
    }
    atomic_save_safetensors(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


def load_checkpoint(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", optimizer: bool = True
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: The file.
        device: Where its tensors go.
        optimizer: Whether to keep the optimizer's state.

    Raises:
        FileNotFoundError: With the names near by.
        ValueError: If the file was cut off, is damaged or is no checkpoint; names it.
    """
    metadata = load_safetensors_metadata(path)
    try:
        values = {key: json.loads(metadata[key]) for key in ("format", "step", "model", "tokenizer", "run", "progress")}
        skeleton = json.loads(metadata["optimizer"])
    except (KeyError, json.JSONDecodeError):
        values = {"format": None}
    if values["format"] != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file but no checkpoint of nestlearn (format {_FORMAT!r}); "
            "checkpoints lie in the folder 'checkpoints' of a run"
        )
    tensors = load_safetensors(path, device=device)
    prefix = "model."
    return Checkpoint(
        path=Path(path),
        step=values["step"],
        model=values["model"],
        tokenizer=values["tokenizer"],
        run=values["run"],
        progress=values["progress"],
        weights={name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)},
        optimizer=_unflatten(skeleton, tensors) if optimizer and skeleton is not None else None,
    )


def newest_checkpoint(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    optimizer: bool = True,
    notice: Notice = _log,
) -> Checkpoint | None:
    """The newest checkpoint of a run's folder that is whole; None if there is none at all.

    A damaged one is passed over with a notice that names it: nothing is lost but time, as training goes on from an
    earlier step to bitwise the same losses, and replaces the damaged file when it gets there.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path, device=device, optimizer=optimizer)
        except ValueError as error:
            notice(f"DAMAGED CHECKPOINT, looking for an earlier one: {error}")
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read; "
            "restore one from a copy, or start again in another folder"
        )
    return None


def find_checkpoint(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Checkpoint:
    """A checkpoint without the optimizer's state.

    Args:
        path: A checkpoint file, or a run's folder, whose newest whole checkpoint is taken.
        device: Where its tensors go.

    Raises:
        FileNotFoundError: If there is no such file, or no checkpoint in the folder.
        ValueError: If it is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return load_checkpoint(path, device=device, optimizer=False)
    found = newest_checkpoint(path, device=device, optimizer=False)
    if found is None and (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds a model of transformers, not a run; expected a run's folder or a checkpoint file. "
            f"`nestlearn serve`, `eval --tasks`, `stack`, `learn` and `chat` take such folders too"
        )
    if found is None:
        raise missing_file(path / "checkpoints" / "step-*.safetensors", what="checkpoint")
    return found


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run's folder; 0 keeps all."""
    paths = list_checkpoints(folder)
    for path in paths[: max(0, len(paths) - keep)] if keep else []:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def load_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """A trained model and its tokenizer.

    Args:
        path: A checkpoint file, or a run's folder, whose newest whole checkpoint is taken.
        device: Where the model goes.

    Returns:
        ``(model, tokenizer)``: a `HopeLM` in evaluation mode and a `Tokenizer`.

    Raises:
        FileNotFoundError: If there is no such file, or no checkpoint in the folder.
        ValueError: If the checkpoint is damaged or does not fit this version's models.
    """
    from nestlearn.models import HopeConfig, HopeLM
    from nestlearn.training.data import load_tokenizer

    checkpoint = find_checkpoint(path, device=device)
    model = HopeLM(HopeConfig.from_dict(checkpoint.model)).to(device)
    checkpoint.restore(model)
    near = checkpoint.path.resolve().parent
    folder = near.parent if near.name == "checkpoints" else near
    return model.eval(), load_tokenizer(checkpoint.tokenizer, folder=folder)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON, its tensors moved to `tensors`; keys keep their type (an optimizer's are integers)."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": [[key, _flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name}: a checkpoint holds tensors and plain values, got {type(value).__name__}")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `_flatten` took apart."""
    (kind, content), *_ = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content
