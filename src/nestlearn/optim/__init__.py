"""Optimizers as memories: each learns from the gradients it is shown, at its own frequency."""

from nestlearn.optim.deep_momentum import DeepMomentum
from nestlearn.optim.delta_gradient_descent import DeltaGradientDescent, delta_step
from nestlearn.optim.leveled import LevelOptimizer
from nestlearn.optim.m3 import M3, m3_step
from nestlearn.optim.momentum import DeltaMomentum, HigherOrderMomentum, Muon, PreconditionedMomentum, ReadoutMomentum

__all__ = [
    "M3",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "HigherOrderMomentum",
    "LevelOptimizer",
    "Muon",
    "PreconditionedMomentum",
    "ReadoutMomentum",
    "delta_step",
    "m3_step",
]
