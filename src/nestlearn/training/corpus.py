"""Documents to learn from, out of files, folders, data sets or the standard library.

A document is one string that belongs together: a file, or the `text` of one line of a `.jsonl`. Nothing is cleaned or
re-wrapped (line ends stay as they are), so that bits per byte refer to the bytes on the disk.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from nestlearn.io import missing_file

__all__ = ["STDLIB", "TEXT_SUFFIXES", "Notice", "log_notice", "read_documents"]

STDLIB = "stdlib"

_SUFFIXES = """
.txt .md .rst .tex .org .adoc .html .htm .xml .jsonl .yaml .yml .toml .ini .cfg
.py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .kt .js .jsx .ts .tsx .go .rs .rb .php .pl .lua .r .jl .scala .swift
.hs .ml .clj .ex .erl .sql .sh .bash .zsh .ps1 .css .scss .vue .cmake .tcl .el .lisp .f90 .m
"""

# What a folder is searched for: prose and source text. Tables and notebooks (.csv, .json, .ipynb) are mostly not text
# to learn from. A file that is named by the user is read whatever its suffix.
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())

# Parts of the library's folder that are not its source text: installed packages, tests, IDLE and demos; tables that a
# program wrote; lib2to3, which only some versions have.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"})
_STDLIB_SKIPPED |= {"encodings", "pydoc_data", "lib2to3", "__pycache__"}

# A streamed data set has no end that memory could hold; read this much unless told otherwise.
_STREAM_BYTES = 2**30

Notice = Callable[[str], None]
log_notice: Notice = logging.getLogger(__name__).warning


def read_documents(
    source: str | os.PathLike[str], *, max_bytes: int | None = None, notice: Notice = log_notice
) -> list[str]:
    """Return the documents of `source`, in a fixed order, empty ones left out.

    Args:
        source: one of
            a text file, UTF-8 (also `.gz`): one document;
            a `.jsonl` or `.jsonl.gz`: a document per line, in its field "text";
            a folder: every file in it and below whose suffix is in TEXT_SUFFIXES (also with `.gz`), by path; hidden
            ones are passed over, other suffixes and files that are not UTF-8 text are skipped and counted in a notice;
            "stdlib": the source text of the Python standard library that is running (for a folder of that name give
            "./stdlib");
            anything else: a data set for `datasets.load_dataset`, "name" or "name:config:split" (the default split is
            "train", an empty config is none), streamed, with a column "text".
        max_bytes: stop after the document that reaches this many UTF-8 bytes. Default: everything; of a `datasets`
            name the first GiB.
        notice: is called with a sentence about what was skipped or cut. Default: a logged warning.

    Raises:
        FileNotFoundError: a path that is not there, with names like it.
        ValueError: no text in it, a binary file, a broken line or archive; names the file and line.
        ImportError: a data set is asked for and `datasets` is not installed.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: expected at least 1, got {max_bytes}. Leave it out to read everything.")
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name == STDLIB:
        documents: Generator[str, None, None] = _read_stdlib(notice)
    elif path.is_dir():
        documents = _read_folder(path, notice)
    elif path.exists():
        documents = _read_file(path)
    elif _looks_like_path(name):
        raise missing_file(path, what="text file or folder")
    else:
        documents = _read_dataset(name)
        max_bytes = _STREAM_BYTES if max_bytes is None else max_bytes
    with contextlib.closing(documents):
        found = _collect(documents, name, max_bytes, notice)
    if not found:
        raise ValueError(
            f"{name}: no text found in it. Expected at least one document that is not empty; "
            "give a text file, a folder of them, a .jsonl with a field 'text', a datasets name or 'stdlib'."
        )
    return found


def _collect(documents: Iterable[str], name: str, max_bytes: int | None, notice: Notice) -> list[str]:
    found: list[str] = []
    size = 0
    for text in documents:
        if not text or text.isspace():
            continue
        if max_bytes is not None and size >= max_bytes:
            notice(f"{name}: stopped after {len(found):,} documents, {size / 2**20:,.1f} MiB; max_bytes reads more.")
            break
        found.append(text)
        size += len(text.encode("utf-8", errors="replace"))
    return found


def _looks_like_path(name: str) -> bool:
    """Data set names are `name` or `owner/name`, with a config and a split after colons."""
    if name.startswith((".", "~", "/", "\\")) or name.endswith(("/", "\\")) or name.count("/") > 1 or "\\" in name:
        return True
    return name.endswith((".gz", ".zst")) or Path(name).suffix.lower() in TEXT_SUFFIXES


def _suffix(path: Path) -> str:
    """The suffix that tells the format: that before `.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _read_file(path: Path) -> Generator[str, None, None]:
    if _suffix(path) == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield _read_text(path)


def _read_text(path: Path) -> str:
    with _open(path) as file, _teach(path):
        data = file.read()
    if b"\0" in data:
        raise _binary(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _binary(path, error) from None


def _read_jsonl(path: Path) -> Generator[str, None, None]:
    with _open(path) as file, _teach(path):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of(line, path, number)


def _text_of(line: bytes, path: Path, number: int) -> str:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _binary(path, error) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object per line; {error.msg} at column {error.colno}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with a field 'text', got a {type(record).__name__}.")
    if not isinstance(record.get("text"), str):
        got = f"a {type(record['text']).__name__} in it" if "text" in record else f"the fields {sorted(record)}"
        raise ValueError(f"{where}: expected a field 'text' with a string, got {got}. Rename the field that holds it.")
    return str(record["text"])


@contextlib.contextmanager
def _teach(path: Path) -> Iterator[None]:
    """Turn what a broken archive raises into an error that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip archive ({error}). Copy or download it again.") from None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file or a folder, got a device or pipe. Write its content to a file first."
        )
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


class _NotText(ValueError):
    """A file that is not UTF-8 text."""


def _binary(path: Path, error: UnicodeDecodeError | None = None) -> _NotText:
    found = f"byte {error.start:,} is not UTF-8" if error else "it holds zero bytes"
    return _NotText(
        f"{path} is not text ({found}): a binary file, or text in another encoding. Give a text file in UTF-8 "
        f"(iconv -f latin1 -t utf-8 converts the commonest other one)."
    )


def _read_folder(folder: Path, notice: Notice) -> Generator[str, None, None]:
    skipped: Counter[str] = Counter()
    read = 0
    for path in _files_below(folder):
        suffix = _suffix(path)
        if suffix not in TEXT_SUFFIXES:
            skipped[f"with the suffix {suffix}" if suffix else "without a suffix"] += 1
            continue
        try:
            yield from _read_file(path)
            read += 1
        except _NotText:
            skipped["not UTF-8 text"] += 1
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common(6))
        more = ", ..." if len(skipped) > 6 else ""
        notice(f"{folder}: read {read:,} files, skipped {skipped.total():,} ({reasons}{more}).")


def _files_below(folder: Path, passed_over: frozenset[str] = frozenset()) -> list[Path]:
    """Files that are not hidden, by path, without links to folders (which may lead in a circle) and some folders."""
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in passed_over]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def _read_stdlib(notice: Notice) -> Generator[str, None, None]:
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = 0
    for path in _files_below(folder, _STDLIB_SKIPPED):
        # _sysconfigdata is written by the build and describes the machine.
        if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):
            continue
        try:
            yield _read_text(path)
        except (_NotText, PermissionError):
            skipped += 1
    if skipped:
        notice(f"stdlib: skipped {skipped:,} files that are not readable UTF-8 text.")


def _read_dataset(source: str) -> Generator[str, None, None]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    yield from _stream_dataset(name, config or None, split or "train", source)


def _stream_dataset(name: str, config: str | None, split: str, source: str) -> Generator[str, None, None]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no file or folder here; to read it as a data set: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            if not isinstance(row.get("text"), str):
                raise _NoText(f"{source}: expected a column 'text' of strings, row {number} has {sorted(row)}.")
            yield row["text"]
    except _NoText:
        raise
    except Exception as error:  # what it raises depends on the data set's builder and on the network
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{source!r} is no file or folder here, and the datasets library could not read it: {first}. "
            "Check the path; a data set is written name or name:config:split and its first use needs a network."
        ) from error


class _NoText(ValueError):
    """A data set without a column of text."""
