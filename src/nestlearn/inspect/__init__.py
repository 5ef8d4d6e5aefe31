"""What a model is made of and what its memories hold: tables and pictures."""

from nestlearn.inspect.levels import describe_levels, levels_table, plot_levels
from nestlearn.inspect.memories import describe_memories, memories_table, plot_memories

__all__ = [
    "describe_levels",
    "describe_memories",
    "levels_table",
    "memories_table",
    "plot_levels",
    "plot_memories",
]
