"""One run, one TOML file: ``[model]``, ``[data]`` and ``[training]``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.io import missing_file

__all__ = ["DataConfig", "RunConfig", "TrainingConfig", "parse_value", "to_toml"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and what of it is held out.

    Args:
        text: Source of the documents, as `nestlearn.training.data.read_documents` takes it: a text file, a folder, a
            ``.jsonl(.gz)``, a ``datasets`` name, or ``"stdlib"`` (the source text of Python's standard library).
        held_out: A source of its own for the held-out side; empty: split `text` by document.
        held_out_fraction: Fraction of the documents to hold out where `held_out` is empty, in (0, 1).
        split_seed: Seed of that split.
        max_bytes: Read about this many UTF-8 bytes of `text` and no more; 0: no limit.
        tokenizer: ``"bytes"``, a ``tokenizer.json``, or a folder or hub name for `transformers`.
    """

    text: str = "stdlib"
    held_out: str = ""
    held_out_fraction: float = 0.05
    split_seed: int = 0
    max_bytes: int = 0
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        _need(0 < self.held_out_fraction < 1, "data.held_out_fraction", "more than 0 and less than 1", self)
        _need(self.max_bytes >= 0, "data.max_bytes", "at least 0 (0: no limit)", self)
        _need(bool(self.text), "data.text", 'a source of text, for example "stdlib" or a path', self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        steps: Optimizer steps.
        batch_size: Sequences per optimizer step, over all processes and micro-batches together: changing `accumulate`
            or the number of processes does not change what is computed.
        sequence_length: Tokens per sequence.
        accumulate: Micro-batches per step and process; more need less memory.
        optimizer: What moves matrices: ``"adamw"``, ``"m3"`` or ``"dgd"`` (see `nestlearn.optim`); AdamW moves the
            rest.
        lr: Learning rate after warm-up.
        others_lr: That of parameters which ``"m3"`` and ``"dgd"`` leave to AdamW; 0: `lr`.
        min_lr_ratio: The cosine ends at ``lr * min_lr_ratio``, in [0, 1].
        warmup: Steps of linear warm-up.
        weight_decay: On matrices only (see `LevelOptimizer.for_model`).
        betas: AdamW's.
        clip: Largest norm of the gradient of one step, before slow levels gather it; 0: no clipping.
        log_every: Steps per line of the log; its loss is the mean over them.
        eval_every: Steps between two evaluations on the held-out side; 0: only at the end.
        eval_tokens: Held-out tokens per evaluation, at most; 0: all.
        checkpoint_every: Steps between two checkpoints; 0: only at the end.
        keep_checkpoints: The newest ones that are kept; 0: all.
        seed: Of the initial weights, the order of the data, and dropout.
        device: ``"auto"`` (CUDA where there is one, otherwise CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        precision: ``"auto"`` (bf16 autocast on CUDA, otherwise fp32), ``"fp32"``, ``"bf16"``, ``"fp64"``.
        activation_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Pass the model through `torch.compile`.
        threads: CPU threads; 0: as torch chose.
        start_from: A run's folder (its newest checkpoint) or a checkpoint file whose weights this run starts from, with
            an optimizer and a schedule of its own; empty: fresh weights. See `nestlearn.training.stages`.
    """

    steps: int = 1000
    batch_size: int = 16
    sequence_length: int = 512
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-3
    others_lr: float = 0.0
    min_lr_ratio: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    log_every: int = 10
    eval_every: int = 200
    eval_tokens: int = 131_072
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int = 0
    start_from: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "accumulate", "log_every"):
            _need(getattr(self, name) >= 1, f"training.{name}", "at least 1", self)
        for name in ("warmup", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints", "threads", "seed"):
            _need(getattr(self, name) >= 0, f"training.{name}", "at least 0", self)
        for name in ("weight_decay", "clip", "others_lr"):
            _need(0 <= getattr(self, name) < math.inf, f"training.{name}", "at least 0 and finite", self)
        _need(0 < self.lr < math.inf, "training.lr", "more than 0 and finite", self)
        _need(self.optimizer in ("adamw", "m3", "dgd"), "training.optimizer", "adamw, m3 or dgd", self)
        if self.optimizer == "dgd" and self.compile:
            raise ValueError(
                "training.compile: expected false with optimizer = 'dgd', which watches the model's layers"
            )
        _need(0 <= self.min_lr_ratio <= 1, "training.min_lr_ratio", "from 0 to 1", self)
        _need(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "training.betas",
            "two numbers in [0, 1)",
            self,
        )
        _need(
            self.precision in ("auto", "fp32", "bf16", "fp64"), "training.precision", "auto, fp32, bf16 or fp64", self
        )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"training.batch_size counts the sequences of a whole step and must be a multiple of "
                f"training.accumulate, got {self.batch_size} and {self.accumulate}; "
                f"try batch_size = {self.accumulate * max(1, self.batch_size // self.accumulate)}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run.

    Args:
        model: Keyword arguments of `HopeConfig`, and optionally ``preset`` (a size: ``"tiny"``, ``"small"``, ...) and
            ``configuration`` (``"paper"`` or ``"transformer"``). The vocabulary size comes from the tokenizer where it
            is not given. TOML has no null: ``"none"`` stands for Python's None here.
        data: What is read.
        training: How it is learnt.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a TOML file.

        Raises:
            FileNotFoundError: With the names near by.
            ValueError: For TOML that does not parse, an unknown section or key (with the closest known one), or a
                value that does not fit; names the file.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise missing_file(path, what="run file")
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> RunConfig:
        """The run that `to_dict` (or a TOML file) describes; errors as `load`, without a file's name."""
        _check_keys(tables, ("model", "data", "training"), "section")
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ValueError(f"[{name}] must be a section of key = value lines, got {table!r}")
        return cls(
            model={key: None if value == "none" else value for key, value in tables.get("model", {}).items()},
            data=_from_table(DataConfig, tables.get("data", {}), "data"),
            training=_from_table(TrainingConfig, tables.get("training", {}), "training"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Three tables of plain types, tuples as lists."""
        tables = {
            "model": dict(self.model),
            "data": dataclasses.asdict(self.data),
            "training": dataclasses.asdict(self.training),
        }
        plain: dict[str, Any] = json.loads(json.dumps(tables))
        return plain


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of plain values as TOML text that `tomllib` reads back to the same values.

    Values may be strings, booleans, numbers, lists of these, and mappings of these (inline tables). None, for which
    TOML has no form, is written as ``"none"``, as `RunConfig` reads it in ``[model]``.
    """
    lines: list[str] = []
    for section, table in tables.items():
        lines += ["", f"[{_key(section)}]"] if lines else [f"[{_key(section)}]"]
        lines += [f"{_key(key)} = {_toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def parse_value(text: str) -> Any:
    """A single value as it was typed: as in TOML, or a plain word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return tomllib.loads(f"value = {json.dumps(text.strip())}")["value"]


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".enia") else text + ".0"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        pairs = [f"{_key(k)} = {_toml_value(v)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(f"TOML has no form for {type(value).__name__}: {value!r}")


def _key(name: str) -> str:
    bare = name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if bare else _toml_value(name)


def _from_table(kind: type[Any], table: Mapping[str, Any], section: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    _check_keys(table, names, f"key in [{section}]")
    return kind(**{name: _fit(value, hints[name], f"{section}.{name}") for name, value in table.items()})


def _check_keys(table: Mapping[str, Any], known: typing.Sequence[str], what: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown {what}: {name!r}; {hint}")


def _fit(value: Any, hint: Any, name: str) -> Any:
    """The value as the field's type: a TOML list is a tuple, an integer is a float where one is wanted."""
    if isinstance(hint, types.GenericAlias):
        inner = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            raise ValueError(f"{name}: expected a list of {len(inner)} values, got {value!r}")
        return tuple(_fit(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(zip(value, inner, strict=True)))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if type(value) is not hint:
        kinds = {int: "an integer", float: "a number", str: "a string in quotes", bool: "true or false"}
        raise ValueError(f"{name}: expected {kinds[hint]}, got {value!r}")
    return value


def _need(holds: bool, name: str, expected: str, config: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name.split('.')[1])!r}")
