"""AutoConfig and AutoModelForCausalLM know Hope once `nestlearn` is imported, whichever is imported first.

`transformers` takes seconds to import, most of it for the model classes. So nothing of it is imported here: a finder
waits for the modules that hold the Auto classes, and registers when Python has loaded them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "hope"


def register_when_imported() -> None:
    """Registers now with what is imported already, and with the rest when it is. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, register in _WAITING.items():
        if _is_loaded(name):
            register()


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from nestlearn.hub.configuration import HopeConfig

    AutoConfig.register(MODEL_TYPE, HopeConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from nestlearn.hub.configuration import HopeConfig
    from nestlearn.hub.modeling import HopeForCausalLM

    AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)


_WAITING: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    # While a module loads it is listed too, without its classes; the finder comes back when it is done.
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds nothing of its own: it lets Python find the modules that are waited for, and follows their loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WAITING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, _WAITING[fullname])
        return spec


class _ThenRegister(Loader):
    """A module's own loader, and then a registration."""

    def __init__(self, loader: Any, register: Callable[[], None]) -> None:
        self.loader, self.register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader  # from here on it is a module like any other
        self.loader.exec_module(module)
        self.register()
