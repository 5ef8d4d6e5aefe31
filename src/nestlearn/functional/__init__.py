"""The rule itself: tensors in, tensors out, differentiable, nothing in place."""

from nestlearn.functional.associative import AssociativeOutput, associative_recurrence, associative_update
from nestlearn.functional.newton_schulz import newton_schulz
from nestlearn.functional.surprise import linear_surprise, mlp_surprise

__all__ = [
    "AssociativeOutput",
    "associative_recurrence",
    "associative_update",
    "linear_surprise",
    "mlp_surprise",
    "newton_schulz",
]
