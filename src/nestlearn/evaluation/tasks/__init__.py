"""Synthetic tasks: what a sequence model can remember, track and recall."""

from nestlearn.evaluation.tasks.task import IGNORED, Answers, Examples, Task, mark

__all__ = ["IGNORED", "Answers", "Examples", "Task", "mark"]
