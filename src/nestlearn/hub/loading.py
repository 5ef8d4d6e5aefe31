"""A Hope and its tokenizer in the classes of `transformers`, from a run, a checkpoint or an exported folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from nestlearn.hub.configuration import HopeConfig
from nestlearn.hub.modeling import HopeForCausalLM
from nestlearn.hub.tokenization import to_transformers
from nestlearn.io import load_json, missing_file
from nestlearn.models.config import HopeConfig as Architecture
from nestlearn.models.generation import Sampling
from nestlearn.training.checkpoint import Checkpoint, find_checkpoint, load_model
from nestlearn.training.tokenizers import check_vocabulary


def load(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[HopeForCausalLM, Any]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        source: a run's folder (its newest whole checkpoint), a checkpoint file, or a folder from `export`. Code in a
            folder is never run.
        device: where the model goes.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if what is there is damaged or no Hope.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise missing_file(path, what="run folder, checkpoint or exported folder")
    config = path / "config.json"
    if not config.is_file():
        model, tokenizer = from_checkpoint(find_checkpoint(path))
    elif (kind := model_type(config)) != HopeConfig.model_type:
        raise ValueError(f"{path} holds a model of type {kind!r}; expected {HopeConfig.model_type!r}")
    else:
        model = HopeForCausalLM.from_pretrained(path)
        tokenizer = tokenizer_beside(str(path))
    return model.to(device).eval(), tokenizer


def tokenizer_beside(model: str) -> Any:
    """The tokenizer in a model's folder, or on the Hub under its name.

    Raises:
        ValueError: if there is none that loads; says what to do.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except ValueError as error:  # which speaks of packages for formats that are not there either
        raise ValueError(
            f"{model} has no tokenizer that can be loaded; tokenizer.save_pretrained({model!r}) puts one beside the "
            f"model"
        ) from error


def model_type(config: Path) -> Any:
    """What a config.json calls its model; None if it does not say."""
    found = load_json(config)
    return found.get("model_type") if isinstance(found, dict) else None


def from_checkpoint(checkpoint: Checkpoint) -> tuple[HopeForCausalLM, Any]:
    """The same from a checkpoint that was read, with its settings for generation.

    Raises:
        ValueError: if the checkpoint does not fit this version's models, or its vocabulary its tokenizer.
    """
    _, tokenizer = load_model(checkpoint.path)
    architecture = Architecture.from_dict(checkpoint.model)
    check_vocabulary(tokenizer, architecture.vocab_size)
    model = HopeForCausalLM(HopeConfig.from_architecture(architecture)).eval()
    checkpoint.restore(model)
    model.to(next(tensor.dtype for tensor in checkpoint.weights.values() if tensor.is_floating_point()))
    theirs = to_transformers(tokenizer)
    padding = theirs.pad_token_id if theirs.pad_token_id is not None else theirs.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=Sampling().temperature,
        top_k=0,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=padding,
    )
    return model, theirs
