"""MAD, small token tasks that each need one skill (Poli et al., 2403.17844); five are Table 4 of Nested Learning."""

from nestlearn.evaluation.tasks.compression import Compression
from nestlearn.evaluation.tasks.mad.fuzzy_recall import FuzzyRecall
from nestlearn.evaluation.tasks.mad.memorization import Memorization
from nestlearn.evaluation.tasks.mad.protocol import BASELINES, CHANGES, Setting, settings
from nestlearn.evaluation.tasks.mad.recall import InContextRecall, NoisyRecall
from nestlearn.evaluation.tasks.mad.selective_copying import SelectiveCopying

__all__ = [
    "BASELINES",
    "CHANGES",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "Memorization",
    "NoisyRecall",
    "SelectiveCopying",
    "Setting",
    "settings",
]
