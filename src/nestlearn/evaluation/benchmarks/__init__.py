"""Speed and memory as ratios to a plain Transformer, or to AdamW, in the same process."""

from nestlearn.evaluation.benchmarks.equality import NotEqual, check_equality
from nestlearn.evaluation.benchmarks.run import benchmark_models
from nestlearn.evaluation.benchmarks.settings import MIXERS, REFERENCE, ModelBenchmark

__all__ = ["MIXERS", "REFERENCE", "ModelBenchmark", "NotEqual", "benchmark_models", "check_equality"]
