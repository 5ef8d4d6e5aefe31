"""The configuration of a model, and its presets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nestlearn.layers.chunked_memory import (
    Backend,
    Read,
    RetainTo,
    check_bound,
    check_choice,
    check_gates,
    check_scales,
    gate_hidden,
)
from nestlearn.layers.self_modifying_titans import Projection, check_empty, check_static
from nestlearn.layers.tnt import check_shards
from nestlearn.memory.continuum import LevelKind, Variant, check_periods
from nestlearn.memory.mlp import InnerRule

Mixer = Literal[
    "self_modifying_titans",
    "tnt",
    "attention",
    "plain_attention",
    "titans",
    "gated_delta_net",
    "delta_net",
    "linear_attention",
]

# The paper names sizes but prints neither width nor depth: these are chosen to give the size.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 128, "depth": 4, "heads": 2},
    "small": {"dim": 320, "depth": 6, "heads": 5},
    "340M": {"vocab_size": 32000, "dim": 1024, "depth": 20, "heads": 16},
    "760M": {"vocab_size": 32000, "dim": 1536, "depth": 21, "heads": 16},
    "1.3B": {"vocab_size": 32000, "dim": 2048, "depth": 19, "heads": 16},
}

# The literal reading of Eq. 86-91 (decision 17).
PAPER: dict[str, Any] = {
    "inner_rule": "dgd",
    "momentum": True,
    "read": "chunk",
    "retain_to": "zero",
    "residual_memory": True,
    "write_scale": 1.0,
    "projection_write_scale": 1.0,
    "write_bound": None,
    "gate_hidden_ratio": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class HopeConfig:
    """What a `HopeLM` is made of. The defaults are those that our evidence supports (docs/decisions.md).

    Attributes:
        vocab_size: number of tokens; 256 for bytes.
        dim: D, model width; a multiple of heads.
        depth: number of blocks, each a mixer and a continuum memory system.
        heads: H. Head widths of 64 are fastest.
        mixer: the sequence layer; "self_modifying_titans" makes the model Hope, "tnt" Hope that trains in parallel over
            a sequence, "attention" Hope-Attention, "plain_attention" with one CMS level a plain Transformer.
        cms_periods: update period of each CMS level, from the fastest; in training counted in optimizer steps.
        cms_expansion: hidden width of each CMS level over D.
        cms_variant: "sequential", "independent" or "nested" (Eq. 72-74).
        cms_level: "mlp", or "gated" for levels as Llama's MLPs.
        tie_embeddings: whether the output layer shares the embedding's weights.
        rotary_base: of the rotary positions of attention; pair i of a head turns by rotary_base ** (-2 i / width).
        conv_width: taps of the short convolutions.
        chunk_size: tokens between snapshots of the main memory.
        projection_chunk_size: the same for the projections' memories; None for chunk_size.
        global_chunk_size, local_chunk_sizes, shard_length, global_stride, project_queries: of the mixer "tnt", in place
            of the two above; see `nestlearn.layers.TNT`.
        inner_rule, momentum, read, retain_to, retention, negative_eigenvalues, adaptive_query, static_projections,
        residual_memory, empty_memory, write_scale, projection_write_scale, write_bound, memory_hidden,
        gate_hidden_ratio, initial_gate, slowest_gate, detach_every, backend: see
            `nestlearn.layers.SelfModifyingTitans`; TNT takes them all, Titans read, retain_to, write_bound,
            memory_hidden, initial_gate, detach_every and backend.

    Raises:
        ValueError: saying what was expected, what came, and how to mend it.
    """

    vocab_size: int = 256
    dim: int = 256
    depth: int = 4
    heads: int = 4
    mixer: Mixer = "self_modifying_titans"
    cms_periods: tuple[int, ...] = (1, 4)
    cms_expansion: float = 2.0
    cms_variant: Variant = "sequential"
    cms_level: LevelKind = "mlp"
    tie_embeddings: bool = True
    rotary_base: float = 10000.0
    conv_width: int = 4
    chunk_size: int = 64
    projection_chunk_size: int | None = None
    global_chunk_size: int = 2048
    local_chunk_sizes: tuple[int, ...] = (16,)
    shard_length: int = 2048
    global_stride: int = 16
    project_queries: bool = False
    inner_rule: InnerRule = "dgd"
    momentum: bool = False
    read: Read = "token"
    retain_to: RetainTo = "initial"
    retention: bool = True
    negative_eigenvalues: bool = False
    adaptive_query: bool = False
    static_projections: tuple[Projection, ...] = ()
    residual_memory: bool = False
    empty_memory: bool = False
    write_scale: float | None = None
    projection_write_scale: float | None = None
    write_bound: float | None = 4.0
    memory_hidden: int | None = None
    gate_hidden_ratio: float = 0.25
    initial_gate: float = 0.5
    slowest_gate: float | None = None
    detach_every: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.cms_periods, int):
            raise ValueError(f"cms_periods: expected one period a level, for example ({self.cms_periods},)")
        if isinstance(self.local_chunk_sizes, int):
            raise ValueError(f"local_chunk_sizes: expected one size a memory, for example ({self.local_chunk_sizes},)")
        check_static(self.static_projections, self.retain_to)
        for name in ("cms_periods", "local_chunk_sizes", "static_projections"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("vocab_size", "dim", "depth", "heads", "conv_width", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if self.dim % self.heads:
            raise ValueError(
                f"dim must be a multiple of heads, got dim {self.dim} and heads {self.heads}; "
                f"the nearest dim that fits is {max(1, round(self.dim / self.heads)) * self.heads}"
            )
        if self.mixer in ("attention", "plain_attention") and (self.dim // self.heads) % 2:
            raise ValueError(
                f"rotary positions need an even head width, got dim {self.dim} / heads {self.heads} = "
                f"{self.dim // self.heads}; choose heads so that dim / heads is even"
            )
        for name in ("projection_chunk_size", "memory_hidden", "detach_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: expected a whole number of at least 1, or None; got {value!r}")
        for name, choices in (
            ("mixer", Mixer),
            ("cms_variant", Variant),
            ("cms_level", LevelKind),
            ("inner_rule", InnerRule),
            ("read", Read),
            ("retain_to", RetainTo),
            ("backend", Backend),
        ):
            check_choice(name, getattr(self, name), choices)
        if self.mixer not in ("self_modifying_titans", "tnt"):
            for name, missing in (
                ("static_projections", "memories of projections"),
                ("empty_memory", "memory that may start empty"),
                ("slowest_gate", "heads that may write slowly"),
            ):
                if getattr(self, name):
                    raise ValueError(f"{name}: {self.mixer} has no {missing}; choose self_modifying_titans or tnt")
        check_empty(self.empty_memory, self.residual_memory)
        if not 1 < self.rotary_base < float("inf"):
            raise ValueError(f"rotary_base: expected a number above 1, got {self.rotary_base}")
        check_periods(self.cms_periods)
        if not round(self.dim * self.cms_expansion) >= 1:
            raise ValueError(f"cms_expansion: expected a positive number, got {self.cms_expansion}")
        projection = self.chunk_size if self.projection_chunk_size is None else self.projection_chunk_size
        small, large = sorted((self.chunk_size, projection))
        if small < 1 or large % small:
            raise ValueError(
                f"chunk_size and projection_chunk_size: one must divide the other, got {self.chunk_size} and "
                f"{projection}; for example {self.chunk_size} and {max(1, self.chunk_size // 4)}"
            )
        check_shards(self.global_chunk_size, self.local_chunk_sizes, self.shard_length, self.global_stride)
        gate_hidden(self.memory_hidden or self.dim // self.heads, self.gate_hidden_ratio)
        check_gates(self.heads, self.initial_gate, self.slowest_gate)
        check_scales(self.write_scale, self.projection_write_scale)
        check_bound(self.write_bound)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HopeConfig:
        """A size by name: "tiny" (about 1M parameters), "small" (10M), "340M", "760M", "1.3B".

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}; got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def paper(cls, **overrides: Any) -> HopeConfig:
        """The literal reading of Eq. 86-91, for comparison: retention to zero, reads of the snapshot, residual main
        memory, errors written whole and without bound, momentum as in its Table 6."""
        return cls(**{**PAPER, **overrides})

    @classmethod
    def transformer(cls, **overrides: Any) -> HopeConfig:
        """A plain Transformer: rotary positions, softmax attention, one MLP of width 4 D; no convolution, no gate."""
        plain: dict[str, Any] = {"mixer": "plain_attention", "cms_periods": (1,), "cms_expansion": 4.0}
        return cls(**{**plain, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        lists = {name: list(getattr(self, name)) for name in ("cms_periods", "local_chunk_sizes", "static_projections")}
        return {**asdict(self), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HopeConfig:
        """From `to_dict`.

        Raises:
            ValueError: on an unknown name, with the closest known one.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
                raise ValueError(f"HopeConfig has no setting {name!r}{hint}")
        return cls(**values)
