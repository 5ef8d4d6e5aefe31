"""Checks of what the tasks are made of."""

from __future__ import annotations


def check_whole(name: str, value: object, at_least: int) -> None:
    """Raises ValueError unless the value is a whole number of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}: expected a whole number of at least {at_least}, got {value!r}")
