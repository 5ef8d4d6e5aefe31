"""C++ for the CPU, built with the machine's own compiler when it is first needed: the walk of two-layer memories and
decoding here, and what stands between matrix products in `elementwise`.

The libraries are kept in `$XDG_CACHE_HOME/nestlearn` (by default `~/.cache/nestlearn`), named by a digest of the
sources, the compiler and the processor. Where there is no compiler, `unavailable()` says so, and all is computed in
PyTorch operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("walk.cpp", "token.cpp", "level.cpp", "gates.h", "vector.h", "linear.h", "threads.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-pthread")
# Set to anything, this keeps the compiler from being called.
SWITCH = "NESTLEARN_NO_COMPILER"

_SIZES = (
    "rows", "heads", "memories", "projections", "narrow_first", "narrow_stop", "key", "hidden", "value", "chunk",
    "segments", "places", "rule", "read", "negative_eigenvalues", "own_targets", "main_residual", "adaptive_query",
    "to_initial", "has_retain", "has_momentum", "detach_every", "keep", "threads", "wide",
    "reads_only",
)  # fmt: skip

_TOKEN_SIZES = (
    "rows", "heads", "memories", "projections", "narrow_first", "narrow_stop", "key", "hidden", "narrow", "dim",
    "streams", "logits", "taps", "rule", "read", "negative_eigenvalues", "own_targets", "main_residual",
    "adaptive_query", "to_initial", "has_retain", "has_momentum", "threads", "wide", "chunk", "projection_chunk",
)  # fmt: skip


class Walk(ctypes.Structure):
    """The arguments of a walk; walk.cpp says what each is."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _SIZES),
        ("bound", ctypes.c_double),
        ("largest_gate", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("scales", "widths", "starts", "stops", "active", "reset", "completes")),
        ("streams", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("readouts", ctypes.c_void_p * 6),
        ("base", ctypes.c_void_p * 2),
        ("base_narrow", ctypes.c_void_p * 2),
        ("state", ctypes.c_void_p * 6),
        ("out", ctypes.c_void_p),
        ("after", ctypes.c_void_p * 6),
        ("saved", ctypes.c_void_p * 4),
        ("d_out", ctypes.c_void_p),
        ("d_after", ctypes.c_void_p * 6),
        ("d_streams", ctypes.c_void_p),
        ("d_logits", ctypes.c_void_p),
        ("d_readouts", ctypes.c_void_p * 6),
        ("d_base", ctypes.c_void_p * 2),
        ("d_base_narrow", ctypes.c_void_p * 2),
        ("d_state", ctypes.c_void_p * 6),
        ("made", ctypes.c_void_p),
        ("d_made", ctypes.c_void_p),
    ]


class Token(ctypes.Structure):
    """The arguments of one token; token.cpp says what each is."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _TOKEN_SIZES),
        *((name, ctypes.c_double) for name in ("bound", "largest_gate", "eps")),
        ("scales", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("readouts", ctypes.c_void_p * 6),
        ("base", ctypes.c_void_p * 2),
        ("base_narrow", ctypes.c_void_p * 2),
        ("state", ctypes.c_void_p * 6),
        *((name, ctypes.c_void_p) for name in ("inputs", "out", "projection", "convolution", "gates", "tail")),
        *((name, ctypes.c_void_p) for name in ("norm", "gate", "output")),
    ]


class Unavailable(RuntimeError):
    """The compiled walk cannot be used here; the message says why."""


def unavailable() -> str | None:
    """Why the compiled walk cannot be used here, or None if it can. Builds it at the first call."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


def run_walk(walk: Walk, *, backward: bool) -> None:
    """Runs the walk, or its backward pass, on the memory that the arguments point to.

    Raises:
        Unavailable: if there is no compiled library.
        MemoryError: if there was not enough memory to work in.
    """
    check_memory(_library().nestlearn_walk(ctypes.byref(walk), int(backward)))


def run_token(token: Token) -> None:
    """Runs one token on the memory that the arguments point to.

    Raises:
        Unavailable: if there is no compiled library.
        MemoryError: if there was not enough memory to work in.
    """
    check_memory(_library().nestlearn_token(ctypes.byref(token)))


def run_level(x: int, norm: int, up: int, down: int, out: int, *, sizes: tuple[int, ...], eps: float) -> None:
    """Runs the MLP of level.cpp; pointers, and sizes: rows, dim, hidden, threads, and 1 for fp64 or 0 for fp32.

    Raises:
        Unavailable: if there is no compiled library.
        MemoryError: if there was not enough memory to work in.
    """
    check_memory(_library().nestlearn_level(*sizes, eps, x, norm, up, down, out))


def check_memory(status: int) -> None:
    """Refuses what a compiled function could not finish.

    Raises:
        MemoryError: if its status is not 0.
    """
    if status:
        raise MemoryError("compiled code got no memory to work in; make the batch or the chunks smaller")


def _library() -> ctypes.CDLL:
    found = _found()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _found() -> ctypes.CDLL | str:
    """The library, or why there is none: a compiler that failed once is not asked again."""
    try:
        return _loaded()
    except Unavailable as error:
        return str(error)


def _loaded() -> ctypes.CDLL:
    library = load(*SOURCES)
    library.nestlearn_walk.argtypes = [ctypes.POINTER(Walk), ctypes.c_int32]
    library.nestlearn_walk.restype = ctypes.c_int32
    library.nestlearn_token.argtypes = [ctypes.POINTER(Token)]
    library.nestlearn_token.restype = ctypes.c_int32
    library.nestlearn_level.argtypes = [ctypes.c_int32] * 5 + [ctypes.c_double] + [ctypes.c_void_p] * 5
    library.nestlearn_level.restype = ctypes.c_int32
    if (library.nestlearn_walk_size(), library.nestlearn_token_size()) != (ctypes.sizeof(Walk), ctypes.sizeof(Token)):
        raise Unavailable("the compiled library and this module disagree about the arguments' layout")
    return library


def load(*sources: str) -> ctypes.CDLL:
    """The library of source files of this folder, and of what they include; built at the first call.

    Raises:
        Unavailable: if it cannot be built or loaded here.
    """
    if os.environ.get(SWITCH):
        raise Unavailable(f"the environment variable {SWITCH} is set")
    named = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if named is None:
        raise Unavailable("no C++ compiler was found; install g++ or clang++, or name one in CXX")
    compiler = shlex.split(named)  # CXX may hold options, or a cache in front
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=12)
    for name in sources:
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:  # a copy of the modules alone, as in a folder that is exported with its code
            raise Unavailable(f"the source {name} is not in {folder}") from error
    digest.update(" ".join([*compiler, *FLAGS, _describe_machine(compiler)]).encode())
    target = _cache() / f"{Path(sources[0]).stem}-{digest.hexdigest()}.so"
    if not target.exists():
        _build(compiler, [folder / name for name in sources if name.endswith(".cpp")], target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"{target} does not load ({error}); delete it to build it again") from error


def _build(compiler: list[str], sources: list[Path], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # Built aside and moved, so that processes that build at once never load half a file.
            built = Path(folder) / target.name
            command = [*compiler, *FLAGS, "-o", str(built), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                raise Unavailable(f"{shlex.join(compiler)} failed: {lines[0] if lines else f'exit {done.returncode}'}")
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(
            f"{sources[0].name} could not be built with {shlex.join(compiler)} in {target.parent}: {error}"
        ) from error


def _describe_machine(compiler: list[str]) -> str:
    """What -march=native depends on."""
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not start: {error}") from error
    version = done.stdout.splitlines()
    cpu = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return " ".join([*version[:1], platform.machine(), platform.processor(), cpu])


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nestlearn"
