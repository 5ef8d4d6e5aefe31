"""The house has floors, and imports only go up: a module may import from its own floor and from the floors below it.

The modules are read, not run, so imports inside functions count as well.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from house import ROOT

PACKAGE = "nestlearn"
# From the ground up. Rooms on one floor do not import each other.
FLOORS = (
    ("functional",),
    ("levels",),
    ("io",),
    ("memory",),
    ("optim", "layers"),
    ("models",),
    ("training",),
    ("continual",),
    ("evaluation",),
    ("inspect",),
    ("hub",),
    ("cli",),
    ("__main__",),
    ("__init__",),  # nestlearn itself: the names that users import
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module: its full dotted name, its line, and whether it happens when the importing module loads."""

    name: str
    line: int
    on_load: bool


def room_of(module: str) -> str:
    """The room a module of the package lies in: `nestlearn.models.hope` -> `models`, `nestlearn` -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, on_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_load
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, False)
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.body:
                yield from walk(ast.Module([statement], []), False)
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), on_load)
        else:
            yield from walk(child, on_load)


def find_imports(source: str, module: str, *, is_package: bool) -> list[Import]:
    """Every import in the source of `module`, relative ones resolved."""
    found = []
    for node, on_load in walk(ast.parse(source), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            # `from nestlearn import models` imports the room, `from nestlearn import HopeLM` the roof.
            names = [
                f"{base}.{alias.name}" if base == PACKAGE and alias.name in HEIGHT else base for alias in node.names
            ]
        found += [Import(name=name, line=node.lineno, on_load=on_load) for name in names]
    return found


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module; an empty list if nothing is."""
    room = room_of(module)
    if room not in HEIGHT:
        return [f"{module} is in no known room; expected one of {', '.join(HEIGHT)}"]
    found = []
    for item in find_imports(source, module, is_package=is_package):
        where = f"{module}, line {item.line}: imports {item.name}"
        if item.name.split(".")[0] == "transformers" and item.on_load and room != "hub":
            found.append(f"{where} on loading, which only hub/ may; import it inside the function that needs it")
        if item.name.split(".")[0] != PACKAGE:
            continue
        target = room_of(item.name)
        if target not in HEIGHT:
            found.append(f"{where}, which is no known room")
        elif HEIGHT[target] > HEIGHT[room]:
            found.append(f"{where} from a higher floor ({target} stands above {room})")
        elif HEIGHT[target] == HEIGHT[room] and target != room:
            found.append(f"{where}, but {room} and {target} share a floor and stay apart")
    return found


def modules() -> list[tuple[str, Path]]:
    source = ROOT / "src"
    paths = sorted((source / PACKAGE).rglob("*.py"))
    names = [".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return list(zip(names, paths, strict=True))


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_only_go_up(module: str, path: Path) -> None:
    found = complaints(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_folder_or_file_lies_outside_the_floors() -> None:
    found = {path.stem for path in (ROOT / "src" / PACKAGE).iterdir() if path.is_dir() or path.suffix == ".py"}
    assert found - {"__pycache__"} <= set(HEIGHT)


# The checker itself: what it must let pass, and what it must catch.
GOOD = [
    ("nestlearn.functional.associative", "import torch\nfrom nestlearn.functional.surprise import mlp_surprise"),
    ("nestlearn.functional.associative", "from . import surprise\nfrom .surprise import mlp_surprise"),
    ("nestlearn.optim.m3", "from nestlearn.levels import Clock\nfrom ..functional import newton_schulz"),
    ("nestlearn.models.hope", "from nestlearn import layers, memory\nimport nestlearn.optim.leveled"),
    ("nestlearn.training.data", "def load():\n    import transformers"),
    ("nestlearn.training.data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    ("nestlearn.hub.modeling", "from transformers import PreTrainedModel"),
    ("nestlearn.cli", "import nestlearn.hub, nestlearn.training.loop"),
    ("nestlearn", "from nestlearn.cli import main\nfrom nestlearn.models import HopeLM"),
]
BAD = [
    ("nestlearn.functional.associative", "from nestlearn.memory import MatrixMemory", "memory stands above functional"),
    ("nestlearn.functional.associative", "from ..levels import Clock", "levels stands above functional"),
    ("nestlearn.memory.mlp", "def f():\n    import nestlearn.models.hope", "models stands above memory"),
    ("nestlearn.levels", "from . import io", "io stands above levels"),
    ("nestlearn.layers.titans", "from nestlearn.optim import M3", "layers and optim share a floor"),
    ("nestlearn.optim.m3", "from ..layers.block import Block", "optim and layers share a floor"),
    ("nestlearn.models.hope", "from nestlearn import HopeConfig", "__init__ stands above models"),
    ("nestlearn.cli", "import nestlearn", "__init__ stands above cli"),
    ("nestlearn.training.loop", "import nestlearn.helpers", "no known room"),
    ("nestlearn.helpers", "import torch", "no known room"),
    ("nestlearn.training.data", "import transformers", "only hub/ may"),
    (
        "nestlearn.training.data",
        "try:\n    from transformers.utils import logging\nexcept ImportError:\n    pass",
        "only hub/",
    ),
    ("nestlearn.training.data", "class A:\n    import transformers", "only hub/ may"),
    ("nestlearn", "import transformers", "only hub/ may"),
    (
        "nestlearn.io",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import transformers",
        "only hub/ may",
    ),
]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_checker_lets_pass(module: str, source: str) -> None:
    assert complaints(source, module, is_package=module == PACKAGE) == []


@pytest.mark.parametrize(("module", "source", "message"), BAD)
def test_checker_catches(module: str, source: str, message: str) -> None:
    found = complaints(source, module, is_package=module == PACKAGE)
    assert len(found) == 1
    assert message in found[0]


def test_checker_resolves_relative_imports_of_packages() -> None:
    assert complaints("from .hope import HopeLM\nfrom ..optim import M3", "nestlearn.models", is_package=True) == []
    found = complaints("from ..training import train", "nestlearn.models", is_package=True)
    assert [message.split(":")[1] for message in found] == [
        " imports nestlearn.training from a higher floor (training stands above models)"
    ]
