"""Hope in the Hugging Face ecosystem: a thin wrapper for `transformers`, and what makes its folders.

Names are imported when they are first asked for, so that `import nestlearn` does not wait for `transformers`; its Auto
classes learn about Hope as soon as they are imported themselves (`nestlearn.hub.registration`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.hub.cache import HopeCache, cache_to_state, state_to_cache
    from nestlearn.hub.configuration import HopeConfig
    from nestlearn.hub.conversion import from_llama
    from nestlearn.hub.exporting import export
    from nestlearn.hub.loading import load
    from nestlearn.hub.modeling import HopeForCausalLM
    from nestlearn.hub.serving import serve
    from nestlearn.hub.tokenization import to_transformers

_HOME = {
    "HopeCache": "cache",
    "HopeConfig": "configuration",
    "HopeForCausalLM": "modeling",
    "cache_to_state": "cache",
    "export": "exporting",
    "from_llama": "conversion",
    "load": "loading",
    "serve": "serving",
    "state_to_cache": "cache",
    "to_transformers": "tokenization",
}

__all__ = [
    "HopeCache",
    "HopeConfig",
    "HopeForCausalLM",
    "cache_to_state",
    "export",
    "from_llama",
    "load",
    "serve",
    "state_to_cache",
    "to_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
