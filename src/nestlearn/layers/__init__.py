"""Sequence layers (mixers): named compositions of one rule, all with the same call, `y, state = layer(x, state)`."""

from nestlearn.layers.attention import Attention, PlainAttention
from nestlearn.layers.delta_net import DeltaNet, GatedDeltaNet
from nestlearn.layers.linear_attention import LinearAttention
from nestlearn.layers.self_modifying_titans import SelfModifyingTitans
from nestlearn.layers.titans import Titans
from nestlearn.layers.tnt import TNT

__all__ = [
    "TNT",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "PlainAttention",
    "SelfModifyingTitans",
    "Titans",
]
