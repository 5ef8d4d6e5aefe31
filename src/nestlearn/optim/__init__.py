"""Optimizers as memories: each learns from the gradients it is shown, at its own frequency."""

from nestlearn.optim.leveled import LevelOptimizer

__all__ = ["LevelOptimizer"]
