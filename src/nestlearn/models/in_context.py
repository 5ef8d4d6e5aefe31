"""Reading that learns: the loop of Eq. 71 around a stacked model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestlearn.memory.adaptation import FastWeight, LearningRule, advance_levels
from nestlearn.models.hope import HopeLM
from nestlearn.models.stacking import Context, StackedModel

Order = Literal[0, 1, 2]


class LevelMemory(NamedTuple):
    """What the levels of a model have learnt, for each row on its own.

    Attributes:
        weights: by name; those of levels that learn.
        rows: of a batch, each with changes of its own.
        tokens: how many each row has read, from which every level knows when it is due.
    """

    weights: Mapping[str, FastWeight]
    rows: int
    tokens: int


class Update(NamedTuple):
    """A level changed.

    Attributes:
        level: its number, 0 the fastest.
        tokens: read until then.
        size: norm of each row's step over the level's weights, (B,).
    """

    level: int
    tokens: int
    size: Tensor


class Reading(NamedTuple):
    """What came of reading.

    Attributes:
        memory: afterwards.
        losses: in nats, of each predicted token with what was learnt before its segment, (B, predicted); the first
            token of a call is not predicted.
        tokens: of a row.
        updates: in their order.
    """

    memory: LevelMemory
    losses: Tensor
    tokens: int
    updates: tuple[Update, ...]

    @property
    def nats(self) -> Tensor:
        """Loss of each row, summed over its predicted tokens, (B,)."""
        return self.losses.sum(1)

    @property
    def predicted(self) -> int:
        """Tokens of a row that were predicted."""
        return self.losses.shape[1]


def read(
    model: StackedModel, tokens: Tensor, memory: LevelMemory, rules: Sequence[LearningRule], **settings: Any
) -> Reading:
    """Reads tokens and lets every level that is due change (Eq. 71): all `segments` at once, with their settings."""
    parts = list(segments(model, tokens, memory, rules, **settings))
    return Reading(
        parts[-1].memory,
        torch.cat([part.losses for part in parts], dim=1),
        tokens.shape[1],
        tuple(update for part in parts for update in part.updates),
    )


def segments(
    model: StackedModel,
    tokens: Tensor,
    memory: LevelMemory,
    rules: Sequence[LearningRule],
    *,
    window: int = 1024,
    nested: bool = False,
    order: Order = 0,
    learn: bool = True,
) -> Iterator[Reading]:
    """Reads tokens segment by segment, and lets every level that is due change (Eq. 71).

    A segment ends where a level is due, and after half a window at the latest; gradients stop there too. The next-token
    loss of its own tokens, the first of which the segment before predicts, gives every level the gradient for each row
    on its own; the loss at token t so depends on tokens up to t alone. The call begins with an empty context and ends a
    segment, whose gradients wait in the memory.

    A base with attention has a context of at most `window` tokens. When it is full, a new one begins with the last
    half of it, read again with what is known by then; so tokens never stand further back than the window, and time
    and memory for a token stay the same, however long the text.

    Args:
        model: stacked.
        tokens: (B, T) int64.
        memory: before. It is not changed.
        rules: of the levels, from the fastest.
        window: longest context of a base with attention, in tokens, at least 2; twice the longest segment.
        nested: the "nested" variant of Eq. 72: a level returns to its initial weights when the next slower one changes.
        order: of the derivatives of what comes out: 0 none; 1 the losses have those with respect to the base, what was
            learnt being constant; 2 losses and memory have all, through the updates (meta-learning of the initial
            weights).
        learn: whether anything is learnt; otherwise the memory comes out as it went in, and time stands still.

    Yields:
        what came of each segment.

    Raises:
        ValueError: for tokens of another shape than (B, T) or another number of rows than the memory's, a window below
            2, another number of rules than levels, or a base whose cache is none that can be carried on.
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"tokens: expected (B, T) with at least one token, got shape {tuple(tokens.shape)}")
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    if len(rules) != len(model.levels):
        raise ValueError(f"rules: expected one for each of the {len(model.levels)} levels, got {len(rules)}")
    levels = {level.period: (rule, level.weights) for level, rule in zip(model.levels, rules, strict=True)}
    if len(tokens) != memory.rows:
        raise ValueError(f"tokens: expected {memory.rows} rows, as many as the memory has, got {len(tokens)}")
    periods = [period for period, (rule, _) in levels.items() if rule.lr or nested] if learn else []
    longest, context = window // 2, None
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    start, length = 0, tokens.shape[1]
    while start < length:
        now = memory.tokens
        stop = min(length, start + longest, start + min((period - now % period for period in periods), default=length))
        fed, targets = tokens[:, max(start - 1, 0) : stop - 1], tokens[:, max(start, 1) : stop]
        weights = dict(memory.weights)
        losses = torch.zeros(len(tokens), 0, dtype=dtype, device=tokens.device)
        updates: list[Update] = []
        with _reading(model.base, order):
            if fed.shape[1]:
                context = _make_room(model, tokens, start, fed.shape[1], context, weights, window, order)
                if learn:
                    losses, weights, context = _learn(model, fed, targets, weights, context, order)
                else:
                    logits, context = model(fed, weights, context)
                    losses = _losses(logits, targets)
            if learn:
                before, time = weights, memory.tokens + stop - start
                weights, due = advance_levels(weights, levels, time, nested=nested)
                changed = [i for i, level in enumerate(model.levels) if level.period in due and rules[i].lr]
                updates = [_update(model, i, time, before, weights) for i in changed]
                memory = LevelMemory(weights, memory.rows, time)
        yield Reading(memory, losses, stop - start, tuple(updates))
        start = stop


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token (B, T), in fp32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _learn(
    model: StackedModel,
    fed: Tensor,
    targets: Tensor,
    weights: dict[str, FastWeight],
    context: Context | None,
    order: Order,
) -> tuple[Tensor, dict[str, FastWeight], Context]:
    """Losses (B, T) of a segment, the weights with its gradients, and the context after it."""
    inputs: dict[str, Tensor] = {}
    # Tensors of this segment alone: its gradient does not go on through what the context kept of earlier ones.
    leaves = {
        name: weight.change.clone() if weight.change.requires_grad else weight.change.detach().requires_grad_()
        for name, weight in weights.items()
    }
    with torch.enable_grad() if leaves else contextlib.nullcontext():
        read_as = {name: weight._replace(change=leaves[name]) for name, weight in weights.items()}
        gram = any(weight.gram is not None for weight in weights.values())
        # The weights stay in place while gradients are taken: checkpointing reads again then.
        with model.reading(read_as, inputs.__setitem__ if gram else None):
            logits, context = model(fed, None, context)
            losses = _losses(logits, targets)
            gradients = (
                torch.autograd.grad(
                    losses.sum(), list(leaves.values()), create_graph=order == 2, retain_graph=order > 0
                )
                if leaves
                else ()
            )
    if order < 2:
        inputs = {name: x.detach() for name, x in inputs.items()}
    found = {
        name: weights[name].gathered(gradient, inputs.get(name))
        for name, gradient in zip(leaves, gradients, strict=True)
    }
    return (losses if order else losses.detach()), found, context if order else _detached(context)


def _make_room(
    model: StackedModel,
    tokens: Tensor,
    start: int,
    count: int,
    context: Context | None,
    weights: Mapping[str, FastWeight],
    window: int,
    order: Order,
) -> Context | None:
    """A context that has room for so many tokens: the same one, or a new one that read the last ones again."""
    if context is None or _is_recurrent(model.base) or context.tokens + count <= window:
        return context
    kept, first = min(window // 2, window - count), start - 1  # the segment's own first input comes next
    with contextlib.nullcontext() if order else torch.no_grad():
        _, context = model(tokens[:, first - kept : first], weights)
    return context


def _is_recurrent(base: nn.Module) -> bool:
    """Whether the state does not grow with the tokens."""
    return isinstance(base, HopeLM) and base.config.mixer not in ("attention", "plain_attention")


def _detached(context: Context) -> Context:
    if isinstance(context.state, dict):
        return context._replace(state={name: tensor.detach() for name, tensor in context.state.items()})
    layers = getattr(context.state, "layers", None)  # a cache of Hugging Face, which is this context's own
    # A layer that keeps nothing of its own has the names, and None behind them.
    if layers is None or not all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers or [context.state]}))
        raise ValueError(f"the base keeps its context in {kinds}; only caches of keys and values can be carried on")
    for layer in layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return context


def _update(
    model: StackedModel,
    number: int,
    tokens: int,
    before: Mapping[str, FastWeight],
    after: Mapping[str, FastWeight],
) -> Update:
    names = model.levels[number].weights
    with torch.no_grad():
        square = sum((after[name].change - before[name].change).square().sum((1, 2)) for name in names)
    assert isinstance(square, Tensor)
    return Update(number, tokens, square.sqrt())


@contextlib.contextmanager
def _reading(base: nn.Module, order: Order) -> Iterator[Any]:
    """While it lasts, the base is in evaluation mode and keeps its cache (gradient checkpointing drops it in training).
    At order 0 no parameter takes part in a graph, only what learns in context does; at order 2 attention runs in a form
    that can be differentiated twice."""
    training = [module for module in base.modules() if module.training]
    parameters = [parameter for parameter in base.parameters() if parameter.requires_grad] if order == 0 else []
    try:
        base.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        with sdpa_kernel(SDPBackend.MATH) if order == 2 else contextlib.nullcontext():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
