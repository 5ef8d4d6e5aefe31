"""Language models: Hope, Hope-Attention, the Transformer and the baselines are one class with different mixers."""

from nestlearn.models.config import HopeConfig
from nestlearn.models.hope import HopeLM

__all__ = ["HopeConfig", "HopeLM"]
