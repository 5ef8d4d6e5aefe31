"""Loss on text that was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.training.data import IGNORED, PackedTokens
from nestlearn.training.distributed import Processes

__all__ = ["Evaluation", "SummedLoss", "choose_precision", "evaluate", "evaluate_loss"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss on held-out text.

    Args:
        loss: Nats per token.
        bits_per_byte: Bits per UTF-8 byte of the text; comparable between tokenizers.
        targets: Tokens predicted.
        bytes: UTF-8 bytes they stand for.
    """

    loss: float
    bits_per_byte: float
    targets: int
    bytes: int


class SummedLoss(nn.Module):
    """Cross-entropy summed over the valid targets: the one thing that is differentiated, and so all DDP sees."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, tokens: Tensor, targets: Tensor, document_starts: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits, _ = self.model(tokens, document_starts=document_starts)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def evaluate(
    model: nn.Module,
    data: PackedTokens,
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    precision: str = "auto",
    processes: Processes | None = None,
) -> Evaluation:
    """Loss of a model on documents, in windows of the data's sequence length, each from an empty state.

    Args:
        model: With the interface of `HopeLM`; evaluated where its parameters are, and left in its mode.
        data: The held-out side.
        batch_size: Windows at a time.
        max_tokens: At most this many, evenly spaced; None: all.
        precision: ``"auto"``, ``"fp32"`` or ``"bf16"``, as in `TrainingConfig`.
        processes: Those that share the work; this one alone by default.
    """
    device = next(model.parameters()).device
    autocast = choose_precision(precision, device) is torch.bfloat16
    return evaluate_loss(
        SummedLoss(model, torch.bfloat16 if autocast else None).train(model.training),
        data,
        batch_size=batch_size,
        max_tokens=max_tokens,
        processes=processes if processes is not None else Processes(device=device),
    )


@torch.no_grad()
def evaluate_loss(
    loss: nn.Module, data: PackedTokens, *, batch_size: int, max_tokens: int | None, processes: Processes
) -> Evaluation:
    was_training = loss.training
    loss.eval()
    nats, targets, count = 0.0, 0, 0
    for batch in data.evaluation_batches(batch_size, max_tokens, processes.rank, processes.world_size):
        rows = batch.to(processes.device)
        nats += float(loss(rows.tokens, rows.targets, rows.document_starts))
        targets += batch.num_targets
        count += batch.num_bytes
    loss.train(was_training)
    nats, all_targets, all_bytes = processes.sum(nats, targets, count)
    return Evaluation(
        loss=nats / all_targets,
        bits_per_byte=nats / math.log(2) / all_bytes,
        targets=int(all_targets),
        bytes=int(all_bytes),
    )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[name]
