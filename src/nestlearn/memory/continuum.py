"""The continuum memory system: a chain of MLP levels, each with its own update period (Eq. 70-74)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.functional.kernels.native import run_level, unavailable
from nestlearn.functional.plain import is_plain, is_small, plain_weight
from nestlearn.functional.recomputed import mlp_behind_norm, recomputable
from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.memory.adaptation import FastWeight, LearningRule, advance_levels, read_change

Variant = Literal["sequential", "independent", "nested"]
LevelKind = Literal["mlp", "gated"]


Changes = Mapping[str, Tensor]


class AdaptedLevels(NamedTuple):
    """What the levels of a `ContinuumMemory` have learnt in context, for each row on its own.

    Attributes:
        weights: by name, "levels.0.up" and so on.
        tokens: read by each row, from which every level knows when it is due.
    """

    weights: Mapping[str, FastWeight]
    tokens: int


class MLPLevel(nn.Module):
    """One level: an MLP behind a norm, without its residual connection: W_out gelu(W_in norm(x)).

    Args:
        dim: D.
        hidden: width of the hidden layer.
    """

    learning = ("up", "down")

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weights = self._plain_weights(x)
        if weights is not None and recomputable(x, *weights):
            return mlp_behind_norm(x, *weights, self.norm.eps)
        down: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return down

    def adapted(self, x: Tensor, changes: Changes) -> tuple[Tensor, Changes]:
        """With each row's own changes (B, outputs, inputs) of the weights in `learning`: the output (B, T, D), and what
        each of these weights was given, (B, T, inputs)."""
        normed = self.norm(x)
        hidden = F.gelu(self.up(normed) + read_change(normed, changes["up"]))
        return self.down(hidden) + read_change(hidden, changes["down"]), {"up": normed, "down": hidden}

    @torch.no_grad()
    def decode_step(self, x: Tensor) -> Tensor:
        """x + level(x) of one token, x (B, D), without gradients."""
        weights = self._plain_weights(x) if is_small(x) and is_plain(self, MLPLevel) else None
        if weights is None or unavailable() is not None:
            return x + self(x)
        norm, up, down = weights
        x = x.contiguous()
        out = torch.empty_like(x)
        sizes = (*x.shape, up.shape[0], torch.get_num_threads(), x.dtype == torch.float64)
        run_level(*(t.data_ptr() for t in (x, norm, up, down, out)), sizes=sizes, eps=self.norm.eps)
        return out

    def _plain_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Those of norm, up and down, if they say all that these modules do to x, and fit it."""
        inside = self._modules
        norm = plain_weight(inside["norm"], RMSNorm, x)
        up, down = (plain_weight(inside[name], nn.Linear, x) for name in ("up", "down"))
        if norm is None or up is None or down is None:
            return None
        if up.shape[1:] != x.shape[-1:] or down.shape != up.shape[::-1] or norm.shape != x.shape[-1:]:
            return None  # the modules say what is wrong
        return norm, up, down


class GatedLevel(nn.Module):
    """One level as Llama and its relatives have it (SwiGLU): W_out (silu(W_gate norm(x)) * W_in norm(x)).

    Args:
        dim: D.
        hidden: width of the hidden layer.
    """

    learning = ("gate", "up", "down")

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-5)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed = self.norm(x)
        down: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return down

    def adapted(self, x: Tensor, changes: Changes) -> tuple[Tensor, Changes]:
        """As `MLPLevel.adapted`."""
        normed = self.norm(x)
        gate, up = (layer(normed) + read_change(normed, changes[name]) for name, layer in
                    (("gate", self.gate), ("up", self.up)))  # fmt: skip
        hidden = F.silu(gate) * up
        return self.down(hidden) + read_change(hidden, changes["down"]), {"gate": normed, "up": normed, "down": hidden}

    @torch.no_grad()
    def decode_step(self, x: Tensor) -> Tensor:
        """x + level(x) of one token, x (B, D), without gradients."""
        return x + self(x)


LEVELS: dict[LevelKind, type[MLPLevel] | type[GatedLevel]] = {"mlp": MLPLevel, "gated": GatedLevel}


class ContinuumMemory(nn.Module):
    """Levels of MLP memory from the fastest to the slowest. The parameters are the initial states.

    A level is pre-norm and residual, so that one which is never updated does no harm:

    - "sequential" (Eq. 70, 73): x <- x + level(x), one after another.
    - "nested" (Eq. 72): the same read; the levels differ in how their states are re-initialised when they are updated
      in context, so without in-context updates nested equals sequential.
    - "independent" (Eq. 74): x + sum_i w_i level_i(x) with learnt weights w that start at 1 / levels.

    Periods count either optimizer steps (training: `nestlearn.optim.LevelOptimizer`) or tokens (in context: `adapt`).

    Args:
        dim: D.
        periods: update period of each level, ascending: the first level is the fastest.
        expansion: hidden width of each level over D.
        variant: see above.
        kind: what a level is: "mlp" (`MLPLevel`) or "gated" (`GatedLevel`).

    Raises:
        ValueError: if periods are empty, below 1 or not ascending, or the variant or the kind is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        periods: Sequence[int],
        expansion: float = 4.0,
        variant: Variant = "sequential",
        kind: LevelKind = "mlp",
    ) -> None:
        super().__init__()
        check_periods(periods)
        if variant not in ("sequential", "independent", "nested"):
            raise ValueError(f'variant: expected "sequential", "independent" or "nested", got {variant!r}')
        if kind not in LEVELS:
            raise ValueError(f"kind: expected one of {', '.join(LEVELS)}, got {kind!r}")
        self.periods = tuple(periods)
        self.variant = variant
        self.levels = nn.ModuleList(LEVELS[kind](dim, round(dim * expansion)) for _ in periods)
        if variant == "independent":
            self.weights = nn.Parameter(torch.full((len(periods),), 1.0 / len(periods)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), residual included."""
        if self.variant == "independent":
            return x + sum(w * level(x) for w, level in zip(self.weights, self.levels, strict=True))
        for level in self.levels:
            x = x + level(x)
        return x

    def unadapted(self, batch_size: int, rules: Sequence[LearningRule]) -> AdaptedLevels:
        """Nothing learnt in context yet.

        Args:
            batch_size: rows, each with changes of its own.
            rules: of the levels, from the fastest; a level with lr 0 does not learn.
        """
        weights = {}
        for i, (level, rule) in enumerate(zip(self.levels, rules, strict=True)):
            for name in _learning(level) if rule.lr else ():
                weight: Tensor = getattr(level, name).weight
                outputs, inputs = weight.shape
                weights[f"levels.{i}.{name}"] = FastWeight.fresh(
                    batch_size, outputs, inputs, rule, device=weight.device, dtype=weight.dtype
                )
        return AdaptedLevels(weights, 0)

    def adapt(
        self,
        x: Tensor,
        loss: Callable[..., Tensor],
        memory: AdaptedLevels,
        rules: Sequence[LearningRule],
    ) -> tuple[Tensor, AdaptedLevels]:
        """Reads x and lets every level learn in context when its period, in tokens, is over (Eq. 71).

        Each token is read with what was learnt before it: the segments between updates are read one after another. A
        level gets the summed gradient of the loss since its own last update, for each row on its own. "nested" returns
        a level to its initial weights when the next slower one changes (Eq. 72). For whole models, whose loss goes
        through all their blocks, see `nestlearn.stack_levels`.

        Args:
            x: (B, T, D). It gets no gradient.
            loss: loss(y, start=...) is the summed loss of each row, (B,), of the segment of x that begins at `start`
                and whose output is y (B, S, D).
            memory: from `unadapted`, or of an earlier call; it is not changed.
            rules: of the levels, from the fastest.

        Returns:
            the output (B, T, D), without gradients, and the memory after it.

        Raises:
            ValueError: for another number of rules than levels.
        """
        if len(rules) != len(self.periods):
            raise ValueError(f"rules: expected one for each of the {len(self.periods)} levels, got {len(rules)}")
        levels = {
            period: (rule, tuple(f"levels.{i}.{name}" for name in _learning(level)))
            for i, (period, rule, level) in enumerate(zip(self.periods, rules, self.levels, strict=True))
        }
        outputs, start = [], 0
        while start < x.shape[1]:
            now = memory.tokens
            stop = min(x.shape[1], start + min(period - now % period for period in self.periods))
            y, weights = self._gather(x[:, start:stop].detach(), partial(loss, start=start), memory.weights)
            weights, _ = advance_levels(weights, levels, now + stop - start, nested=self.variant == "nested")
            memory = AdaptedLevels(weights, now + stop - start)
            outputs.append(y)
            start = stop
        return torch.cat(outputs, 1) if outputs else x, memory

    def _gather(
        self, x: Tensor, loss: Callable[[Tensor], Tensor], weights: Mapping[str, FastWeight]
    ) -> tuple[Tensor, dict[str, FastWeight]]:
        """A segment's output, and the weights with the gradients of its loss."""
        leaves = {name: weight.change.detach().requires_grad_() for name, weight in weights.items()}
        inputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            y = base = x
            for i, level in enumerate(self.levels):
                given = base if self.variant == "independent" else y
                names = _learning(level)
                changes = {name: leaves[f"levels.{i}.{name}"] for name in names if f"levels.{i}.{name}" in leaves}
                if changes:
                    out, read = level.adapted(given, changes)  # type: ignore[operator]
                    inputs |= {f"levels.{i}.{name}": read[name] for name in names}
                else:
                    out = level(given)
                y = y + (self.weights[i] * out if self.variant == "independent" else out)
            gradients = torch.autograd.grad(loss(y).sum(), list(leaves.values())) if leaves else ()
        gathered = {
            name: weights[name].gathered(gradient, inputs[name].detach())
            for name, gradient in zip(leaves, gradients, strict=True)
        }
        return y.detach(), gathered

    def decode_step(self, x: Tensor) -> Tensor:
        """One token, x (B, D) -> (B, D), without gradients. Otherwise equal to `forward`."""
        if self.variant == "independent" or not is_plain(self, ContinuumMemory):
            mixed: Tensor = self(x)
            return mixed
        for level in self.levels:
            x = level.decode_step(x)  # type: ignore[operator]
        return x


def _learning(level: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a level that learn in context."""
    names: tuple[str, ...] = level.learning  # type: ignore[assignment]
    return names


def check_periods(periods: Sequence[int]) -> None:
    """Refuses periods that name no order of levels.

    Raises:
        ValueError: if they are empty, below 1, or not strictly ascending.
    """
    if (
        not periods
        or any(not isinstance(p, int) or p < 1 for p in periods)
        or any(b <= a for a, b in pairwise(periods))
    ):
        raise ValueError(
            f"CMS periods: expected one or more whole numbers of at least 1, strictly ascending from the fastest to "
            f"the slowest level, for example (1, 4, 16); got {tuple(periods)}"
        )
