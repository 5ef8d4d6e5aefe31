"""The cache of a model of `transformers` under either of its names: "past_key_values", and "cache" since 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_name(takes: Callable[..., Any]) -> str:
    """What a model's forward, or a class of outputs, calls its cache.

    Models from elsewhere keep the old name under a new version, so that each is asked by itself. A wrapper that hands
    on whatever it is given names neither; it is taken to hold a model that comes with the installed version.
    """
    named = _named(takes)
    if named is None:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        named = _named(CausalLMOutputWithPast)
    assert named is not None
    return named


def cache_in(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    # The new name first: under it the new versions complain of the old one.
    return next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given, under whichever name; None if there is none.

    Raises:
        ValueError: for two.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError(
        "cache: expected one, got another one as past_key_values, which is the same argument under its name before "
        "transformers 5.24; leave one of them out"
    )


def _named(takes: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(takes).parameters
    return next((name for name in NAMES if name in parameters), None)
