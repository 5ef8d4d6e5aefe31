"""nestlearn: Nested Learning in PyTorch. Models and optimizers whose parts learn at several speeds."""

from nestlearn.models import HopeConfig, HopeLM

__version__ = "0.1.0"

__all__ = ["HopeConfig", "HopeLM", "__version__"]
