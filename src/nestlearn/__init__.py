"""nestlearn: Nested Learning in PyTorch. Models and optimizers whose parts learn at several speeds."""

from nestlearn.continual import ContinualLearner
from nestlearn.hub.registration import register_when_imported
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.stacking import stack_levels

__version__ = "0.1.0"

__all__ = ["ContinualLearner", "HopeConfig", "HopeLM", "__version__", "stack_levels"]

register_when_imported()
