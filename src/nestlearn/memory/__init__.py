"""Memories: weights plus a read. Their parameters are their initial state."""

from nestlearn.memory.continuum import ContinuumMemory
from nestlearn.memory.matrix import MatrixMemory
from nestlearn.memory.mlp import MLPMemory

__all__ = ["ContinuumMemory", "MLPMemory", "MatrixMemory"]
