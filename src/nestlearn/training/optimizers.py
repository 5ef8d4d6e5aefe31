"""The optimizer that a run names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nestlearn.optim import M3, DeltaGradientDescent, LevelOptimizer
from nestlearn.training.config import TrainingConfig

__all__ = ["build_optimizer"]


def build_optimizer(model: nn.Module, config: TrainingConfig, notice: Callable[[str], None]) -> LevelOptimizer:
    """The optimizer of ``training.optimizer`` on the levels of a model.

    Groups whose learning rate is not the run's carry ``lr_ratio``, theirs over the run's.

    Args:
        model: what is trained.
        config: of the run.
        notice: called with a table of what M3 moves, and what AdamW.

    Raises:
        ValueError: if the model has nothing for the optimizer to train.
    """
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return LevelOptimizer.for_model(model, lr=lr, weight_decay=decay, betas=config.betas)
    inner: M3 | DeltaGradientDescent
    if config.optimizer == "m3":
        inner = M3.for_model(model, lr=lr, weight_decay=decay, adamw_betas=config.betas, notice=notice)
    else:
        inner = DeltaGradientDescent(model, lr=lr, weight_decay=decay, others="adamw", adamw_betas=config.betas)
    if config.others_lr:
        for group in inner.param_groups:
            if group["rule"] == "adamw":
                group["lr_ratio"] = config.others_lr / lr
    return LevelOptimizer(inner)
