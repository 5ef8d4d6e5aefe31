"""Loss against position: what a longer context is worth to a model (Figure 10 of Nested Learning)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.evaluation.report import finite_or_none
from nestlearn.memory.adaptation import LearningRule
from nestlearn.models.in_context import LevelMemory, read
from nestlearn.models.stacking import StackedModel
from nestlearn.training.data import IGNORED, PackedTokens

# Tokens (B, T) and targets (B, T) to the bits of each target (B, T).
Reader = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Loss over the positions [begin, end) of long windows.

    Attributes:
        begin, end: positions in tokens, the first of a window is 0.
        bits: mean bits per token there, with everything before it in the context.
        gain: how much fewer they are than with a context that began anew every so many tokens; paired, token by token.
        error: standard error of the gain over windows.
    """

    begin: int
    end: int
    bits: float
    gain: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None where a number is not finite."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def loss_by_position(
    model: nn.Module,
    data: PackedTokens,
    *,
    fresh_every: int,
    max_tokens: int,
    batch_size: int = 4,
    reader: Reader | None = None,
) -> list[Stretch]:
    """Bits per token at the positions of long windows, in stretches that double in length.

    Every window is read twice: as a whole, and in pieces of `fresh_every` tokens with an empty context each. Text
    differs more between places than contexts differ in worth; on the same tokens the difference is the context alone.

    Args:
        model: with the interface of `HopeLM`; left in its mode.
        data: held-out text; its sequence length, a power of two times fresh_every, is that of the windows. Windows in
            which a document ends are passed over.
        fresh_every: tokens of a piece, such as the length that the model was trained at.
        max_tokens: windows are taken evenly from the text, about so many tokens.
        batch_size: windows at once.
        reader: what reads whole windows; None for the model. `learning_reader` is one whose levels learn meanwhile.

    Returns:
        the stretches [0, n), [n, 2 n), [2 n, 4 n), ... with n = fresh_every.

    Raises:
        ValueError: if the lengths do not fit, or fewer than two windows lie within a document.
    """
    length = data.sequence_length
    doublings = math.log2(length / fresh_every)
    if doublings < 1 or doublings != int(doublings):
        raise ValueError(
            f"expected windows of a power of two times fresh_every, got {length:,} and {fresh_every:,}; for example "
            f"{8 * fresh_every:,}"
        )
    was_training = model.training
    model.eval()
    whole, pieces = [], []
    for tokens, targets in windows(data, max_tokens=max_tokens, batch_size=batch_size):
        starts = torch.arange(length).remainder(fresh_every).eq(0).expand(len(tokens), -1)
        whole.append(_bits(model, tokens, targets, None) if reader is None else reader(tokens, targets))
        pieces.append(_bits(model, tokens, targets, starts))
    model.train(was_training)
    if sum(map(len, whole)) < 2:
        raise ValueError(f"expected two windows of {length:,} tokens within documents at least; give longer documents")
    long, short = torch.cat(whole), torch.cat(pieces)
    edges = [0, *(fresh_every << step for step in range(int(doublings) + 1))]
    found = []
    for begin, end in pairwise(edges):
        gain = (short - long)[:, begin:end].mean(1)
        error = gain.std() / math.sqrt(len(gain))
        found.append(
            Stretch(
                begin=begin, end=end, bits=float(long[:, begin:end].mean()), gain=float(gain.mean()), error=float(error)
            )
        )
    return found


def windows(data: PackedTokens, *, max_tokens: int, batch_size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, each (rows, T), of windows in which no document ends.

    Args:
        data: its sequence length is that of the windows.
        max_tokens: windows are taken evenly from the text, about so many tokens.
        batch_size: windows at once, at most.
    """
    for batch in data.evaluation_batches(batch_size, max_tokens):
        inside = ~(batch.document_starts[:, 1:].any(1) | (batch.targets == IGNORED).any(1))
        if inside.any():
            yield batch.tokens[inside], batch.targets[inside]


def learning_reader(model: StackedModel, rules: Sequence[LearningRule], *, window: int) -> Reader:
    """Reads windows while the levels learn from them (Eq. 71), each from the initial weights on.

    A token is predicted with what was learnt from the segments before its own. Targets are the tokens that follow, so
    the last of each row must be one. Not for use under `torch.inference_mode`.

    Args:
        model: stacked on the model that `loss_by_position` is given.
        rules: of its levels.
        window: longest context of a base with attention, in tokens.
    """

    def bits(tokens: Tensor, targets: Tensor) -> Tensor:
        memory = LevelMemory(model.fresh(len(tokens), rules), len(tokens), 0)
        text = torch.cat([tokens, targets[:, -1:]], dim=1).to(next(model.parameters()).device)
        return read(model, text, memory, rules, window=window).losses.double().cpu() / math.log(2)

    return bits


@torch.no_grad()
def _bits(model: nn.Module, tokens: Tensor, targets: Tensor, document_starts: Tensor | None) -> Tensor:
    """Bits of each token, (B, T) in float64."""
    device = next(model.parameters()).device
    starts = None if document_starts is None else document_starts.to(device)
    logits, _ = model(tokens.to(device), document_starts=starts)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten(), reduction="none")
    return nats.view_as(tokens).double().cpu() / math.log(2)
