"""The configuration of `transformers` for Hope: the keyword arguments of `nestlearn.HopeConfig`, and its own."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from nestlearn.models.cache_names import NAMES
from nestlearn.models.config import HopeConfig as Architecture

SETTINGS = tuple(field.name for field in fields(Architecture))


class HopeConfig(PreTrainedConfig):
    """What a `HopeForCausalLM` is made of.

    Args:
        **settings: those of `nestlearn.HopeConfig`, with the same names, defaults and errors; the names of
            `transformers` for some of them (`hidden_size` is `dim`, `num_hidden_layers` `depth`, `num_attention_heads`
            `heads`, `tie_word_embeddings` `tie_embeddings`); `use_cache`, True by default; and what `PreTrainedConfig`
            takes.

    Raises:
        ValueError: for a setting that does not fit, or whose name is nearly one of ours.
    """

    model_type = "hope"
    keys_to_ignore_at_inference = list(NAMES)  # noqa: RUF012  (transformers adds lists to it)
    attribute_map = {  # noqa: RUF012  (transformers asks for a plain class attribute)
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **settings: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in settings:
                settings.setdefault(name, settings.pop(alias))
        own = {name: settings.pop(name) for name in SETTINGS if name in settings}
        for name in settings:
            close = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8)
            if close and not hasattr(PreTrainedConfig, name):
                raise ValueError(f"HopeConfig has no setting {name!r}; did you mean {close[0]!r}?")
        for name, value in Architecture(**own).to_dict().items():
            setattr(self, name, value)
        self.use_cache = settings.pop("use_cache", True)
        super().__init__(**settings)

    @classmethod
    def from_architecture(cls, architecture: Architecture, **settings: Any) -> HopeConfig:
        """From a `nestlearn.HopeConfig`, such as one of its presets."""
        return cls(**architecture.to_dict(), **settings)

    def architecture(self) -> Architecture:
        """The `nestlearn.HopeConfig` with these settings, checked again: attributes may have been set since.

        Raises:
            ValueError: as that class.
        """
        return Architecture(**{name: getattr(self, name) for name in SETTINGS})
