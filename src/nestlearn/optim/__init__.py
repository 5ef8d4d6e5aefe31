"""Optimizers as memories: each learns from the gradients it is shown, at its own frequency."""

from nestlearn.optim.leveled import LevelOptimizer
from nestlearn.optim.m3 import M3, m3_step

__all__ = ["M3", "LevelOptimizer", "m3_step"]
