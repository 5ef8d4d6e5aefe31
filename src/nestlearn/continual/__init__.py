"""A model that goes on learning from what it reads (Sec. 7.3 and 9.1)."""

from nestlearn.continual.learner import ContinualLearner, Observation

__all__ = ["ContinualLearner", "Observation"]
