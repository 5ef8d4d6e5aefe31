"""Measures of a stream, by hand."""

import math

import pytest

from nestlearn.continual.metrics import measure_stream

# Three domains; before, and after each.
LOSSES = [
    [5.0, 6.0, 7.0],
    [2.0, 5.5, 7.2],
    [3.0, 3.0, 6.0],
    [2.5, 3.5, 4.0],
]


def test_the_measures_of_a_stream() -> None:
    found = measure_stream(LOSSES)
    assert found.final == pytest.approx((2.5 + 3.5 + 4.0) / 3)
    assert found.learning == pytest.approx(((5 - 2) + (5.5 - 3) + (6 - 4)) / 3)
    assert found.backward == pytest.approx(((2 - 2.5) + (3 - 3.5)) / 2)
    assert found.forward == pytest.approx(((6 - 5.5) + (7 - 6)) / 2)
    assert found.forgetting == pytest.approx(((2.5 - 2.0) + (3.5 - 3.0)) / 2)


def test_a_single_domain_transfers_nothing() -> None:
    found = measure_stream([[3.0], [1.0]])
    assert (found.final, found.learning) == (1.0, 2.0)
    assert found.backward is found.forward is found.forgetting is None


def test_what_is_no_stream_is_refused() -> None:
    for bad in ([], [[1.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match="one row more than domains"):
            measure_stream(bad)
    with pytest.raises(ValueError, match="finite"):
        measure_stream([[1.0], [math.nan]])
