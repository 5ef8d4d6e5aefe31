"""The training loop.

Everything that a step needs besides weights and optimizer state is a function of the step: its batch, its learning
rate, its random numbers. So a run that goes on from a checkpoint computes bitwise what it would have computed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.data import (
    PackedTokens,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    read_documents,
    split_documents,
    tokenize_documents,
)
from nestlearn.training.distributed import Processes, join_processes
from nestlearn.training.held_out import Evaluation, SummedLoss, choose_precision, evaluate
from nestlearn.training.optimizers import build_optimizer
from nestlearn.training.process import prepare_process
from nestlearn.training.progress import TrainingProgress
from nestlearn.training.session import (
    Event,
    Notice,
    Session,
    TrainingDiverged,
    TrainingResult,
    learning_rate,
    resume_command,
)
from nestlearn.training.stages import start_from

__all__ = [
    "Evaluation",
    "RunConfig",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "build_model",
    "evaluate",
    "learning_rate",
    "resume_command",
    "train",
]

BuildModel = Callable[[Mapping[str, Any], int], nn.Module]

# What may differ when a run goes on: it does not change what is computed, or (the last ones) only its rounding or how
# far it goes, which is said.
_MAY_DIFFER = {"log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints"} | {
    "activation_checkpointing",
    "compile",
    "threads",
    "accumulate",
    "device",
    "steps",
}


def train(
    run: RunConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    on_event: Event | None = None,
    build: BuildModel | None = None,
) -> TrainingResult:
    """Train a model as `run` says and leave everything in `folder`.

    The folder then holds ``config.toml`` (with every default written out), ``run.json`` (commit, versions, device,
    parameter count), ``log.jsonl``, ``loss.png`` and ``checkpoints/``. Ctrl-C or SIGTERM finishes the step, saves and
    returns. Under ``torchrun`` all processes call this; only the first one writes. Seeds torch's global generator.

    Args:
        run: The run.
        folder: Its folder; made if it is missing.
        resume: Go on from the newest whole checkpoint in `folder` (from the start if there is none yet). The losses are
            bitwise those of a run that was never stopped, on the same machine with the same number of threads and
            processes. A damaged checkpoint is passed over with a notice.
        on_event: Called with each line of the log, and with ``{"event": "checkpoint", "step", "path"}``.
        build: Makes the model from the ``[model]`` table and the vocabulary size; `build_model` by default.

    Returns:
        The `TrainingResult`, the same in every process.

    Raises:
        FileExistsError: If `folder` holds a run and `resume` is False.
        ValueError: For a configuration that does not fit itself, the data, or the run that is resumed.
        TrainingDiverged: If the loss or its gradient is not finite; nothing was overwritten.
        OSError: If a file cannot be written (a full disk); names it, earlier checkpoints are untouched.
    """
    folder, config = Path(folder), run.training
    prepare_process(config.threads or None)
    with join_processes(config.device) as processes:
        if not resume and (folder / "config.toml").exists():
            raise FileExistsError(f"{folder} already holds a run; go on with it (--resume) or give another folder")
        _check_sizes(config, processes)
        if build is None:
            model_config(run.model, vocab_size=256)  # a mistake shows before a large corpus is read
        if config.start_from and not resume:
            find_checkpoint(config.start_from)
        notice = _say if processes.is_main else _silent
        start = newest_checkpoint(folder, notice=notice) if resume else None
        if resume and start is None:
            notice(f"{folder} holds no checkpoint yet; starting from the first step")
        tokenizer, training_side, held_out_side = _read(run.data, config, notice)
        torch.manual_seed(config.seed)
        model = (build or build_model)(run.model, tokenizer.vocab_size)
        run = dataclasses.replace(run, model=model.config.to_dict())  # type: ignore[operator, union-attr]
        check_vocabulary(tokenizer, run.model["vocab_size"])
        precision = choose_precision(config.precision, processes.device)
        model.to(device=processes.device, dtype=torch.float64 if precision is torch.float64 else None)
        if config.activation_checkpointing:
            model.set_activation_checkpointing(True)  # type: ignore[operator]
        optimizer = build_optimizer(model, config, notice)
        corpus = "-".join(side.documents.fingerprint() for side in (training_side, held_out_side))
        progress: dict[str, Any] = {"corpus": corpus, "seconds": 0.0, "losses": 0.0, "count": 0}
        progress |= {"loss": None, "held_out": None, "evaluated": None}
        if start is not None:
            _check_resumable(start, run, corpus, notice)
            start.restore(model, optimizer)
            progress = start.progress
        elif config.start_from:
            progress["started_from"] = start_from(config.start_from, model, run.model, notice)
        processes.wait()  # nobody writes before everybody has looked
        session = Session(
            run=run,
            folder=folder,
            step=0 if start is None else start.step,
            progress=progress,
            model=model,
            optimizer=optimizer,
            loss=SummedLoss(model, torch.bfloat16 if precision is torch.bfloat16 else None),
            training_side=training_side,
            held_out_side=held_out_side,
            tokenizer=tokenizer,
            processes=processes,
            notice=notice,
            on_event=on_event if on_event is not None else _ignore,
        )
        return session.run_to_end()


def build_model(settings: Mapping[str, Any], vocab_size: int) -> nn.Module:
    """The `HopeLM` of a ``[model]`` table, see `model_config`."""
    return HopeLM(model_config(settings, vocab_size))


def model_config(settings: Mapping[str, Any], vocab_size: int) -> HopeConfig:
    """The configuration of a ``[model]`` table.

    Args:
        settings: Keyword arguments of `HopeConfig`, and optionally ``preset``, a size (``"tiny"``, ``"small"``, ...),
            and ``configuration``, ``"paper"`` or ``"transformer"`` for the named configurations of `HopeConfig`.
        vocab_size: Of the tokenizer; used where `settings` has none.

    Raises:
        ValueError: Naming the table, and what is wrong in it.
    """
    try:
        return _model_config(settings, vocab_size)
    except ValueError as error:
        raise ValueError(f"[model]: {error}") from None


def _model_config(settings: Mapping[str, Any], vocab_size: int) -> HopeConfig:
    chosen = dict(settings)
    preset, configuration = chosen.pop("preset", None), chosen.pop("configuration", "default")
    makers: dict[str, Callable[..., HopeConfig]] = {
        "default": HopeConfig,
        "paper": HopeConfig.paper,
        "transformer": HopeConfig.transformer,
    }
    if configuration not in makers:
        raise ValueError(f"configuration: expected one of {', '.join(makers)}, got {configuration!r}")
    known = {field.name for field in dataclasses.fields(HopeConfig)}
    for name in sorted(set(chosen) - known):
        HopeConfig.from_dict({name: chosen[name]})  # says which name was meant
    size = {} if preset is None else HopeConfig.preset(preset).to_dict()
    default = HopeConfig().to_dict()
    size = {name: value for name, value in size.items() if value != default[name]}
    return makers[configuration](**{**size, "vocab_size": vocab_size, **chosen})


def _read(data: DataConfig, config: TrainingConfig, notice: Notice) -> tuple[Tokenizer, PackedTokens, PackedTokens]:
    """The tokenizer, and the two sides of the corpus."""
    tokenizer = load_tokenizer(data.tokenizer)
    documents = read_documents(data.text, max_bytes=data.max_bytes or None, notice=notice)
    if data.held_out:
        training, held_out = documents, read_documents(data.held_out, notice=notice)
    else:
        training, held_out = split_documents(
            documents, held_out_fraction=data.held_out_fraction, seed=data.split_seed, notice=notice
        )
    sides = [
        PackedTokens(tokenize_documents(texts, tokenizer), sequence_length=config.sequence_length, seed=config.seed)
        for texts in (training, held_out)
    ]
    # Both sides complain of text that is too short; better now than at the first evaluation.
    sides[0].batch(0, 1)
    next(sides[1].evaluation_batches(1, 1))
    return tokenizer, sides[0], sides[1]


def _check_sizes(config: TrainingConfig, processes: Processes) -> None:
    parts = config.accumulate * processes.world_size
    if config.batch_size % parts:
        raise ValueError(
            f"training.batch_size counts the sequences of a whole step and must be a multiple of accumulate x "
            f"processes = {config.accumulate} x {processes.world_size}, got {config.batch_size}"
        )


def _check_resumable(checkpoint: Checkpoint, run: RunConfig, corpus: str, notice: Notice) -> None:
    """Refuse to go on with another model, other data or other mathematics than the checkpoint's."""
    now, then = run.to_dict(), checkpoint.run
    # A setting that is newer than the checkpoint had its default then.
    default = {"model": HopeConfig().to_dict(), "training": dataclasses.asdict(TrainingConfig())}
    differ = []
    for section in ("model", "training"):
        here = now[section]
        there = {**{key: value for key, value in default[section].items() if key in here}, **then.get(section, {})}
        for key in {**there, **here}:
            if here.get(key) != there.get(key) and not (section == "training" and key in _MAY_DIFFER):
                differ.append(f"{section}.{key} ({there.get(key)!r} in the checkpoint, {here.get(key)!r} now)")
    if checkpoint.progress["corpus"] != corpus:  # what was read decides, not where it lies
        differ.append("the text that is read")
    if differ:
        raise ValueError(f"{checkpoint.path} belongs to another run; these must be as they were: {', '.join(differ)}")
    here, there = now["training"], then["training"]
    if here["steps"] != there["steps"]:
        notice(
            f"the run now ends after {here['steps']:,} steps instead of {there['steps']:,}: "
            "from here on the learning rate follows the new schedule"
        )
    for key in ("accumulate", "compile", "device", "threads"):
        if here[key] != there[key]:
            notice(f"training.{key} has changed: the losses will agree to rounding, not bitwise")


def _say(text: str) -> None:
    TrainingProgress(total=1).note(text)


def _silent(text: str) -> None:
    pass


def _ignore(event: dict[str, Any]) -> None:
    pass
