"""Files that are whole or absent: atomic writes, checked reads, safetensors.

A write goes to a temporary file in the target's own folder, is flushed to the disk and only then takes the target's
name (`os.replace`). So a reader, a full disk, Ctrl-C or a killed process meet the old file or the new one, never a
half. A read that fails says which file, what is wrong with it and how to mend it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "atomic_path",
    "atomic_save_safetensors",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
    "load_json",
    "load_safetensors",
    "load_safetensors_metadata",
    "missing_file",
]

# A killed process cannot remove its temporary file; the next write of the same target does, once nobody has written
# to that file for this many seconds (a slow writer on a shared folder still owns it).
STALE_AFTER_SECONDS = 3600.0

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file that replaces `path` when the block ends well.

    For writers that want a path (`save_file`, `savefig`). The temporary file has the target's suffix. Missing folders
    are created; a symbolic link is followed, so that the file it points to is replaced and not the link; the mode of
    an existing file is kept.

    Raises: OSError (the subclass that belongs to its errno) that names `path`, where the folder or the disk refuses;
    the earlier file, if there was one, is untouched. Whatever the block raises, the temporary file is removed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or pipe"
        raise OSError(errno.EINVAL, f"cannot write a file here: this is {kind}. Give the name of a file", str(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        # O_EXCL and the default mode: nobody else's file is touched and the umask decides who may read.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if target.exists():
            shutil.copymode(target, temporary)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
        _flush_to_disk(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        code = _error_number(error)
        if code is None or (isinstance(error, OSError) and not _concerns(error, temporary, target)):
            raise
        raise OSError(code, _refusal(code, target), str(path)) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Give a binary file whose content replaces `path` when the block ends well; otherwise as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 with its line ends as they are; atomic, errors as `atomic_path`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, keys in the order given; atomic, errors as `atomic_path`.

    Raises: ValueError or TypeError for what JSON cannot hold (NaN, infinities, tensors), before any file is touched.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises FileNotFoundError, or ValueError that names the file and the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file(path) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}. "
            "Correct that line, or restore the file from a copy."
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a JSON file: it is not UTF-8 text. Is it the right file?") from None


def atomic_save_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named tensors, any shapes and dtypes, to a safetensors file; atomic, errors as `atomic_path`.

    Tensors are saved from where they are (a GPU's are copied to the host), whole and contiguous; two names of one
    storage become two copies, so that every name can be read back. `metadata` maps strings to strings.

    Raises: TypeError for a value that is no tensor or metadata that is no string; OSError that names `path`.
    """
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata[{key!r}]: expected a string, got {type(text).__name__}. Use json.dumps first.")
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}]: expected a torch.Tensor, got {type(tensor).__name__}.")
        host = tensor.detach().to("cpu").contiguous()
        storage = host.untyped_storage()
        # safetensors refuses storages that are shared, even by views that do not overlap.
        if storage.data_ptr() in seen:
            host = host.clone()
        seen.add(storage.data_ptr())
        flat[name] = host
    with atomic_path(path) as temporary:
        # Not {}: safetensors 0.8 writes a broken header for empty metadata without tensors.
        save_file(flat, temporary, metadata=dict(metadata) if metadata else None)


def load_safetensors(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto `device`, by name.

    Raises: FileNotFoundError with the nearest names in that folder; ValueError for a file that was cut off or is no
    safetensors file, with its size and what to do.
    """
    with _open_safetensors(path, str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def load_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file ({} where it has none) without its tensors; errors as above."""
    with _open_safetensors(path, "cpu") as file:
        return dict(file.metadata() or {})


def missing_file(path: str | os.PathLike[str], *, what: str = "file") -> FileNotFoundError:
    """Return the error to raise for a path that is not there; it names what is near by.

    The nearest existing folder is searched for names like the one that is missing.
    """
    path = Path(path).expanduser()
    folder, name = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, name = folder.parent, folder.name
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            hint = "did you mean " + " or ".join(str(folder / candidate) for candidate in near) + "?"
        elif names:
            hint = f"{folder} holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
        else:
            hint = f"{folder} is empty."
        return FileNotFoundError(errno.ENOENT, f"no such {what}; {hint} Looked for", str(path))
    return FileNotFoundError(errno.ENOENT, f"no such {what}", str(path))


@contextlib.contextmanager
def _open_safetensors(path: str | os.PathLike[str], device: str) -> Iterator[Any]:
    target = Path(path)
    if not target.exists():
        raise missing_file(path)
    if target.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "expected a .safetensors file, got a folder; give a file in it", str(path)
        )
    try:
        with safe_open(target, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, ValueError) as error:
        size = target.stat().st_size
        mend = "Copy the file again, or use an earlier one."
        if size == 0:
            found = "is empty"
        elif _is_foreign(target):
            found = f"({size:,} bytes) is not a safetensors file"
            mend = "Is it the right file? A .pt, .bin or .npz file has to be converted with safetensors first."
        else:
            found = f"({size:,} bytes) is cut off or damaged"
        raise ValueError(f"{path} {found} ({error}). {mend}") from error


def _is_foreign(path: Path) -> bool:
    """Tell a foreign file from a cut one: safetensors begins with the header's length (8 bytes) and a brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and (start[8:] != b"{" or int.from_bytes(start[:8], "little") > 100_000_000)


def _remove_stale(target: Path) -> None:
    for leftover in glob.glob(f"{glob.escape(str(target.with_name('.' + target.name)))}.*.tmp{target.suffix}"):
        with contextlib.suppress(OSError):
            if time.time() - os.stat(leftover).st_mtime > STALE_AFTER_SECONDS:
                os.unlink(leftover)


def _flush_to_disk(path: Path) -> None:
    """fsync a file or, where the system allows it, a folder (that makes the new name durable)."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _error_number(error: BaseException) -> int | None:
    """The errno of a failed write; safetensors hides it in its message."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found.group(1)) if found else None
    return None


def _concerns(error: OSError, temporary: Path, target: Path) -> bool:
    """Whether an OSError is about our file (a failed write names none) and not about one that the block read."""
    if error.filename is None:
        return True
    named = os.fspath(error.filename)
    return Path(os.fsdecode(named)) in {temporary, target, *target.parents}


def _refusal(code: int, target: Path) -> str:
    kept = "the earlier file is untouched" if target.exists() else "no file was left behind"
    if code in _DISK_FULL:
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB free)"
        mend = f"Free some space{free} or choose another folder"
    elif code in {errno.EACCES, errno.EPERM, errno.EROFS}:
        mend = "Choose a folder you may write to"
    else:
        mend = "Check the folder and the disk"
    return f"{os.strerror(code)}: could not write, {kept}. {mend}"
