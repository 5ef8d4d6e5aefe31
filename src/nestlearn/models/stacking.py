"""Level stacking (Sec. 7.3): the MLP blocks of a pretrained decoder as levels that learn from what they read."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from nestlearn.memory.adaptation import FastWeight, LearningRule, read_change
from nestlearn.memory.continuum import GatedLevel, MLPLevel, check_periods
from nestlearn.models.cache_names import cache_in, cache_name
from nestlearn.models.hope import HopeLM

Strategy = Literal["last_quarter", "whole_depth", "interleaved"]
Weights = Mapping[str, FastWeight]

# Parts of names by which modules that mix tokens are known.
_MIXERS = ("attention", "attn", "mixer", "mamba", "conv")


@dataclass(frozen=True, kw_only=True)
class StackedLevel:
    """The MLP blocks that change together.

    Attributes:
        period: tokens between two updates.
        blocks: names of the MLP blocks in the model, in the order of its depth.
        weights: names of their weights.
    """

    period: int
    blocks: tuple[str, ...]
    weights: tuple[str, ...]


class Context(NamedTuple):
    """What a base model remembers of the tokens before, apart from what its levels learnt.

    Attributes:
        tokens: how many tokens it has read.
        state: a cache of Hugging Face, or the state of a `HopeLM`.
    """

    tokens: int
    state: Any


class StackedModel(nn.Module):
    """A decoder whose MLP blocks have levels. It holds no memory: what was learnt comes in and goes out as weights.

    Args:
        base: a `HopeLM`, by itself or as `HopeForCausalLM`, or another causal language model of `transformers`. It is
            not changed, and may be shared.
        levels: from the fastest to the slowest.
        rank: directions of a weight's input that learn, drawn once from the weight's name; None for all of them.
    """

    def __init__(self, base: nn.Module, levels: Sequence[StackedLevel], *, rank: int | None = None) -> None:
        super().__init__()
        self.base = base = unwrapped(base)
        self.levels = tuple(levels)
        self.rank = rank
        found = dict(base.named_modules())
        names = [name for level in self.levels for name in level.weights]
        # Not registered a second time: they are the base's.
        self._linears: dict[str, nn.Module] = {name: found[name] for name in names}
        self._projections: dict[str, Tensor] = {}
        self._cache_name = "" if isinstance(base, HopeLM) else cache_name(base.forward)

    @property
    def periods(self) -> tuple[int, ...]:
        """Tokens between the updates of each level."""
        return tuple(level.period for level in self.levels)

    @property
    def vocab_size(self) -> int:
        """Tokens that the base knows."""
        if isinstance(self.base, HopeLM):
            return self.base.config.vocab_size
        embedding: nn.Embedding = self.base.get_input_embeddings()  # type: ignore[operator]
        return embedding.num_embeddings

    def weight(self, name: str) -> Tensor:
        """The base's own weight, in the layer's own order."""
        weight: Tensor = self._linears[name].weight  # type: ignore[assignment]
        return weight

    def sizes(self, name: str) -> tuple[int, int]:
        """Outputs and learning inputs (O, K) of a weight."""
        outputs, inputs = linear_sizes(self._linears[name])
        return outputs, inputs if self.rank is None else min(self.rank, inputs)

    def fresh(self, batch_size: int, rules: Sequence[LearningRule]) -> dict[str, FastWeight]:
        """Nothing learnt yet, for every weight whose level learns; on the weights' devices.

        Args:
            batch_size: rows, each with changes of its own.
            rules: of the levels.
        """
        weights = {}
        for level, rule in zip(self.levels, rules, strict=True):
            if rule.lr == 0:
                continue
            for name in level.weights:
                weight: Tensor = self._linears[name].weight  # type: ignore[assignment]
                outputs, width = self.sizes(name)
                weights[name] = FastWeight.fresh(
                    batch_size,
                    outputs,
                    width,
                    rule,
                    device=weight.device,
                    dtype=weight.dtype,
                )
        return weights

    def floats_per_row(self, rules: Sequence[LearningRule]) -> int:
        """Numbers that a row's memory holds: changes, gathered gradients and what the rules add."""
        count = 0
        for level, rule in zip(self.levels, rules, strict=True):
            for name in level.weights if rule.lr else ():
                outputs, width = self.sizes(name)
                count += (3 if rule.rule == "momentum" else 2) * outputs * width + (rule.rule == "dgd") * width**2
        return count

    def forward(
        self, tokens: Tensor, weights: Weights | None = None, context: Context | None = None
    ) -> tuple[Tensor, Context]:
        """Logits with what was learnt.

        Args:
            tokens: (B, T) int64.
            weights: as from `fresh`, changed by learning; None, or none that learnt, is the base model bit for bit.
            context: what came before; it may be changed, as caches of Hugging Face are. None for an empty one.

        Returns:
            logits (B, T, vocabulary) and the context after them.
        """
        with self.reading(weights or {}):
            if isinstance(self.base, HopeLM):
                logits, state = self.base(tokens, None if context is None else context.state)
            else:
                before = {} if context is None else {self._cache_name: context.state}
                out = self.base(input_ids=tokens, use_cache=True, **before)
                logits, state = out.logits, cache_in(out)
        return logits, Context((0 if context is None else context.tokens) + tokens.shape[1], state)

    @contextlib.contextmanager
    def reading(self, weights: Weights, seen: Callable[[str, Tensor], None] | None = None) -> Iterator[None]:
        """While it lasts, the base model reads with these weights, however it is called.

        Args:
            weights: what was learnt. The base may be given several rows for each row here, side by side, as beams are.
            seen: told of every weight's inputs (B, T, K).
        """
        hooks = [
            self._linears[name].register_forward_hook(self._hook(name, weight, seen))
            for name, weight in weights.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def merged(self, weights: Weights, row: int) -> dict[str, Tensor]:
        """The base's state dict with what a row has learnt in its weights."""
        whole = dict(self.base.state_dict())
        for name, weight in weights.items():
            change = weight.change[row]
            if self.rank is not None:
                change = change @ self._projection(name, change).mT
            if not isinstance(self._linears[name], nn.Linear):
                change = change.mT
            own = whole[f"{name}.weight"]
            whole[f"{name}.weight"] = (own.to(change.dtype) + change).to(own.dtype)
        return whole

    def _hook(
        self, name: str, weight: FastWeight, seen: Callable[[str, Tensor], None] | None
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        change = weight.change
        projection = self._projection(name, change) if self.rank is not None else None

        def read(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0].to(change.dtype)
            if projection is not None:
                x = x @ projection
            if x.shape[0] % change.shape[0]:
                raise ValueError(
                    f"{name}: expected a multiple of {change.shape[0]} rows, as many as have learnt, got {x.shape[0]}"
                )
            own = change.repeat_interleave(x.shape[0] // change.shape[0], 0)
            if seen is not None:
                seen(name, x)
            return output + read_change(x, own).to(output.dtype)

        return read

    def _projection(self, name: str, like: Tensor) -> Tensor:
        """P (I, K) of a weight: orthonormal columns that depend on its name alone."""
        known = self._projections.get(name)
        if known is None or known.device != like.device or known.dtype != like.dtype:
            _, inputs = linear_sizes(self._linears[name])
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
            with torch.inference_mode(False):  # it is kept, and gradients pass it later
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randn(inputs, like.shape[-1], generator=generator, dtype=torch.float64)
                known = torch.linalg.qr(drawn).Q.to(device=like.device, dtype=like.dtype)
            self._projections[name] = known
        return known


def stack_levels(
    model: nn.Module,
    periods: Sequence[int],
    *,
    strategy: Strategy = "last_quarter",
    rank: int | None = None,
    notice: Callable[[str], None] | None = print,
) -> StackedModel:
    """Puts the MLP blocks of a decoder on levels.

    The paper leaves open which block goes where. Here blocks keep the order of the depth, and the first ones are the
    fastest, as in the chain of Eq. 97:

        "last_quarter"  the last quarter of the blocks, at least one a level, in groups one after another
        "whole_depth"   all blocks, in groups one after another
        "interleaved"   all blocks in turn: 1, 2, 3, 1, 2, 3, ...

    The levels of a `HopeLM`'s continuum memory system are its MLP blocks.

    Args:
        model: a `HopeLM`, or a causal language model of `transformers`.
        periods: tokens between two updates of each level, ascending.
        strategy: which block goes where.
        rank: directions of each weight's input that learn; None for all.
        notice: told which block is on which level, and what a row's memory takes; None says nothing.

    Raises:
        ValueError: if no MLP blocks are found, there are fewer than levels, or a number is out of range.
    """
    check_periods(periods)
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, get_args(Strategy)))}; got {strategy!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, or None for all directions; got {rank}")
    blocks = find_mlps(model)
    if not blocks:
        raise ValueError(
            f"no MLP blocks found in a {type(model).__name__}: expected modules without attention, two or three linear "
            "layers from the model's width to another and back"
        )
    if len(blocks) < len(periods):
        raise ValueError(f"periods: {len(periods)} levels need as many MLP blocks, the model has {len(blocks)}")
    count, names = len(periods), list(blocks)
    if strategy == "last_quarter":
        names = names[-max(count, math.ceil(len(names) / 4)) :]
    if strategy == "interleaved":
        groups = [names[start::count] for start in range(count)]
    else:
        bounds = [len(names) * i // count for i in range(count + 1)]
        groups = [names[a:b] for a, b in pairwise(bounds)]
    levels = [
        StackedLevel(period=period, blocks=tuple(group), weights=tuple(w for name in group for w in blocks[name]))
        for period, group in zip(periods, groups, strict=True)
    ]
    stacked = StackedModel(model, levels, rank=rank)
    if notice is not None:
        notice(describe(stacked))
    return stacked


def describe(model: StackedModel) -> str:
    """A line for each level: period, blocks, and what it takes for each row."""
    lines = []
    for number, level in enumerate(model.levels):
        floats = sum(math.prod(model.sizes(name)) for name in level.weights)
        lines.append(
            f"level {number}: every {level.period:,} tokens, {len(level.blocks)} of the MLP blocks "
            f"({', '.join(level.blocks)}), {floats:,} weights that learn, {8 * floats / 2**20:,.1f} MiB a row with "
            "their gathered gradients"
        )
    return "\n".join(lines)


def find_mlps(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The MLP blocks of a decoder by name, in the order of its depth, with the names of their linear layers.

    A block is a module outside attention with linear layers of its own, from one width to another and back.
    """
    model = unwrapped(model)
    found: dict[str, tuple[str, ...]] = {}
    inside = "" if isinstance(model, HopeLM) else _decoder_name(model)
    for name, module in model.named_modules():
        if not name.startswith(inside):
            continue
        if isinstance(model, HopeLM):
            if isinstance(module, MLPLevel | GatedLevel):
                found[name] = tuple(f"{name}.{child}" for child, m in module.named_children() if is_linear(m))
            continue
        parts = [part.lower() for part in name.split(".")] + [type(module).__name__.lower()]
        if any(mixer in part for part in parts for mixer in _MIXERS):
            continue
        own = {child: linear_sizes(m) for child, m in module.named_children() if is_linear(m)}
        if 2 <= len(own) <= 3 and _goes_and_returns(list(own.values())):
            found[name] = tuple(f"{name}.{child}" for child in own)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The `HopeLM` inside its class of `transformers`, which names the same weights; any other model itself."""
    inner = getattr(model, "lm", None)
    return inner if isinstance(inner, HopeLM) else model


def _decoder_name(model: nn.Module) -> str:
    """Name of the part that reads text, where a model has others that see or hear; otherwise nothing."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _goes_and_returns(sizes: list[tuple[int, int]]) -> bool:
    """Whether the last layer returns from a hidden width to that of the others' input; gates may be one layer."""
    *ups, (outputs, hidden) = sizes
    return hidden != outputs and all(inputs == outputs and width in (hidden, 2 * hidden) for width, inputs in ups)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, GPT-2's transposed one included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(module, nn.Linear) else (int(columns), int(rows))
