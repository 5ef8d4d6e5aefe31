"""A run or checkpoint as a folder that `from_pretrained` loads and `push_to_hub` or `hf upload` publishes."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from nestlearn.hub.card import model_card
from nestlearn.hub.configuration import HopeConfig
from nestlearn.hub.loading import from_checkpoint, model_type
from nestlearn.hub.remote_code import AUTO_MAP, remove_remote_code, write_remote_code
from nestlearn.io import atomic_write_text, load_json
from nestlearn.training.checkpoint import find_checkpoint


def export(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    license: str | None = None,
    remote_code: bool = False,
) -> Path:
    """Writes weights, configuration, generation settings, tokenizer and model card.

    Args:
        source: a run's folder, whose newest whole checkpoint is taken, or a checkpoint file.
        folder: where to; made if it is missing. It must be empty, or hold an earlier export.
        name: of the model on its card; the folder's by default.
        license: of the weights, for the card; None if it is not decided.
        remote_code: also write the model's code, so that the folder loads with trust_remote_code=True where nestlearn
            is not installed.

    Returns:
        the folder.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the checkpoint is damaged, or its vocabulary is too small for its tokenizer.
        FileExistsError: if the folder holds something else.
    """
    target = Path(folder).expanduser()
    _check_free(target)
    checkpoint = find_checkpoint(source)
    model, tokenizer = from_checkpoint(checkpoint)
    if remote_code:
        model.config.auto_map = AUTO_MAP
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    remove_remote_code(target)
    if remote_code:
        write_remote_code(target)
    card = model_card(
        checkpoint,
        model.lm,
        name=name or target.resolve().name,
        version=importlib.metadata.version("nestlearn"),
        commit=_commit(checkpoint.path),
        license=license,
        remote_code=remote_code,
    )
    atomic_write_text(target / "README.md", card)
    return target


def _check_free(folder: Path) -> None:
    """Refuses a folder in which an export would mix with something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    config = folder / "config.json"
    if not config.is_file() or model_type(config) != HopeConfig.model_type:
        raise FileExistsError(f"{folder} holds something else than an exported Hope; give an empty or a new folder")


def _commit(path: Path) -> str | None:
    """The commit of the last session of the run that a checkpoint lies in."""
    record = path.resolve().parent.parent / "run.json"
    if not record.is_file():
        return None
    sessions = load_json(record).get("sessions") or [{}]
    commit = sessions[-1].get("commit") or {}
    return str(commit["hash"]) if commit.get("hash") else None
