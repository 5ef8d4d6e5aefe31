"""What a benchmark times: the models and their settings, checked before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from nestlearn.models import HopeConfig
from nestlearn.models.config import Mixer
from nestlearn.training.config import parse_value
from nestlearn.training.distributed import choose_device

Kind = Literal["train", "prefill", "decode"]

REFERENCE = "transformer"
MIXERS: tuple[str, ...] = get_args(Mixer)
DEFAULT_MODELS = ("self_modifying_titans", "self_modifying_titans:momentum=true")
SIZES = ("dim", "depth", "heads", "vocab_size", "mixer")


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What all benchmarks share.

    Attributes:
        depth, heads: of all models.
        alternations: how often all candidates are timed one after another; results are medians over them.
        threads: CPU threads.
        device: "cpu" or a CUDA device.
        seed: of weights and tokens.

    Raises:
        ValueError: for a number out of range or a device that is not there.
    """

    depth: int = 4
    heads: int = 4
    alternations: int = 5
    threads: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alternations", "threads"):
            at_least_one(name, getattr(self, name))
        if self.torch_device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")

    @property
    def torch_device(self) -> torch.device:
        return choose_device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark(CommonSettings):
    """Models beside the Transformer of their width and depth, on random bytes in fp32.

    Attributes:
        kind: what is timed. "train": a step of forward, backward, clipping and optimizer. "prefill": a whole prompt
            read to a state, without gradients. "decode": one token more.
        models: the models beside the reference, each "mixer" or "mixer:setting=value:setting=value", with settings
            as in `HopeConfig`.
        lengths: T; for "decode" the tokens that the state has read before.
        batches: B, sequences at a time.
        dim: D, width.
        turn_tokens: tokens that a model decodes in a turn; the default is a whole chunk of the memories.
        memory: whether peak memory is measured too, in processes of their own.

    Raises:
        ValueError: for an unknown mixer or setting, or a number out of range.
    """

    kind: Kind = "train"
    models: tuple[str, ...] = DEFAULT_MODELS
    lengths: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (4,)
    dim: int = 256
    turn_tokens: int = 64
    memory: bool = True
    configs: dict[str, HopeConfig] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        if not self.models:
            raise ValueError(f"mixers: expected one or more names among {', '.join(MIXERS)}; got none")
        at_least_one("turn_tokens", self.turn_tokens)
        several("lengths", self.lengths, least=1 if self.kind == "decode" else 2)
        several("batch", self.batches, least=1)
        size = {"dim": self.dim, "depth": self.depth, "heads": self.heads}
        configs = {REFERENCE: HopeConfig.transformer(**size)}
        for spec in self.models:
            config = model_config(spec, **size)
            if config in list(configs.values())[1:]:
                raise ValueError(f"mixers: expected different models, got {', '.join(self.models)}")
            configs[spec] = config
        object.__setattr__(self, "configs", configs)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["configs"]
        return values


def split_models(text: str) -> tuple[str, ...]:
    """The models in a list separated by commas; a comma in brackets, as in cms_periods=[1,4], separates nothing."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())


def model_config(spec: str, **size: int) -> HopeConfig:
    """The configuration of "mixer:setting=value:...".

    Args:
        spec: see above; values as in TOML, plain words, or none.
        size: dim, depth and heads, the same for all models.

    Raises:
        ValueError: naming what is not known, and what is.
    """
    mixer, *parts = spec.split(":")
    if mixer not in MIXERS:
        raise ValueError(f"mixers: expected names among {', '.join(MIXERS)}; got {mixer!r}")
    settings: dict[str, Any] = {}
    defaults = {item.name: item.default for item in fields(HopeConfig)}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ValueError(f"mixers: expected mixer:setting=value, for example {DEFAULT_MODELS[1]}; got {spec!r}")
        if name in SIZES:
            raise ValueError(f"mixers: all models have one {name}, so {spec!r} cannot have its own; use --{name}")
        settings[name] = None if value == "none" else parse_value(value)
        if isinstance(defaults.get(name), bool) and not isinstance(settings[name], bool):
            raise ValueError(f"mixers: {name} is true or false, got {value!r} in {spec!r}")
    return HopeConfig.from_dict({"mixer": mixer, **size, **settings})


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def several(name: str, values: tuple[int, ...], *, least: int) -> None:
    """Refuses an empty list, a number that is too small, and one that comes twice."""
    if not values or min(values) < least or len(set(values)) < len(values):
        given = ", ".join(map(str, values)) or "none"
        raise ValueError(f"{name}: expected one or more different numbers of at least {least}, got {given}")
