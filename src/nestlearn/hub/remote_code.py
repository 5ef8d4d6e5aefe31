"""The model's own code for a folder that loads where nestlearn is not installed.

`transformers` takes along the modules that a folder's modeling file imports, but only those that lie beside it. So the
modules of this package that the model needs are copied there, one file each, with the imports among them rewritten.
Nothing is written twice: the copy is made from what runs here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from nestlearn.io import atomic_write_text

ENTRY = "nestlearn.hub.modeling"
ENTRY_NAME = "modeling_hope"
AUTO_MAP = {"AutoConfig": f"{ENTRY_NAME}.HopeConfig", "AutoModelForCausalLM": f"{ENTRY_NAME}.HopeForCausalLM"}
PACKAGE = "nestlearn"

# What a machine may lack. Modules that need one of them on loading are left out: without them the model is slower.
OPTIONAL = ("triton",)


def write_remote_code(folder: Path) -> list[Path]:
    """Writes the modules beside a saved model.

    Args:
        folder: of the model; its config.json has to name `AUTO_MAP`.

    Returns:
        the files.
    """
    sources = collect()
    paths = []
    for module, source in sources.items():
        path = folder / f"{_flat(module)}.py"
        atomic_write_text(path, rewrite(source, module, set(sources)))
        paths.append(path)
    return paths


def remove_remote_code(folder: Path) -> None:
    """Removes what an earlier export wrote into a folder: code that no longer belongs to its weights."""
    for path in [*folder.glob(f"{PACKAGE}_*.py"), folder / f"{ENTRY_NAME}.py"]:
        path.unlink(missing_ok=True)


def collect(entry: str = ENTRY) -> dict[str, str]:
    """Source of a module, and of all modules of this package that it imports, directly or not, by name."""
    found: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        source = _path(module).read_text(encoding="utf-8")
        tree = ast.parse(source)
        if module != entry and _needs_optional(tree):
            continue
        found[module] = source
        waiting += [name for node in _own_imports(tree) for name in _modules(node)]
    return dict(sorted(found.items()))


def rewrite(source: str, module: str, known: set[str]) -> str:
    """A module's source with its imports of this package rewritten to those of files beside it.

    Args:
        source: of the module.
        module: its name.
        known: the modules that are copied; what is imported from others says so when it is asked for.
    """
    lines = source.splitlines()
    for node in sorted(_own_imports(ast.parse(source)), key=lambda node: -node.lineno):
        indent = " " * node.col_offset
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in _statements(node, known)]
    version = importlib.metadata.version(PACKAGE)
    origin = f"# {module} of nestlearn {version}, Apache-2.0, copied by `nestlearn export --remote-code`."
    return "\n".join([origin, *lines]) + "\n"


def _statements(node: ast.ImportFrom, known: set[str]) -> list[str]:
    """What stands in place of an import."""
    assert node.module is not None
    made, plain = [], []
    for alias in node.names:
        written = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
        inner = f"{node.module}.{alias.name}"
        if inner in known:
            # transformers looks for the form `from .name import`; this line is for it to find the file.
            made.append(f"from .{_flat(inner)} import __name__ as _{_flat(inner)}")
            made.append(f"from . import {_flat(inner)} as {alias.asname or alias.name}")
        else:
            plain.append(written)
    if plain and node.module not in known:
        made.append(f'raise ImportError("{node.module} is not part of this copy; install nestlearn for it")')
    elif plain:
        made.append(f"from .{_flat(node.module)} import {', '.join(plain)}")
    return made


def _own_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """All imports from this package, wherever they stand."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"line {node.lineno}: write 'from {PACKAGE}... import ...', which can be rewritten")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == PACKAGE:
            found.append(node)
    return found


def _modules(node: ast.ImportFrom) -> list[str]:
    """The modules that an import loads, apart from packages on the way."""
    assert node.module is not None
    inner = [f"{node.module}.{alias.name}" for alias in node.names]
    modules = [name for name in inner if _is_module(name)]
    return modules if len(modules) == len(inner) else [node.module, *modules]


def _needs_optional(tree: ast.Module) -> bool:
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] in OPTIONAL for name in names)


def _is_module(name: str) -> bool:
    package = importlib.util.find_spec(name.rpartition(".")[0])
    return package is not None and package.submodule_search_locations is not None and (_found(name) is not None)


def _found(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _path(name: str) -> Path:
    path = _found(name)
    if path is None:
        raise ModuleNotFoundError(f"{name} has no source to copy")
    return path


def _flat(module: str) -> str:
    return ENTRY_NAME if module == ENTRY else module.replace(".", "_")
