"""From text to token ids and back, with the number of bytes that each token stands for.

Bits per byte compare models with different vocabularies only if every token knows how much text it covers; so all
tokenizers here give, beside the ids, the UTF-8 bytes of each id, and those add up to the bytes of the text.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nestlearn.io import atomic_path, missing_file

__all__ = ["ByteTokenizer", "FileTokenizer", "HubTokenizer", "Tokenizer", "check_vocabulary", "load_tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer.

    `spec` is the string that `load_tokenizer` turns back into the same tokenizer, `vocab_size` the number of ids.
    No tokenizer adds special tokens: where documents begin is told by `Batch.document_starts`.
    """

    @property
    def spec(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (T,) of an unsigned integer type that fits the vocabulary."""
        ...

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of `text`, (T,), and the UTF-8 bytes each stands for, (T,) int64; these sum to the text's."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; a character that is cut in half becomes U+FFFD."""
        ...

    def num_bytes(self, text: str) -> int:
        """Return the number of UTF-8 bytes of `text`."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write what it needs into `folder`; return the spec for `load_tokenizer(spec, folder=folder)`."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: 256 ids, nothing to train or download, any text."""

    spec = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.ones(len(ids), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_as_ints(ids, self.vocab_size)).decode("utf-8", errors="replace")

    def num_bytes(self, text: str) -> int:
        return len(_utf8(text))

    def save(self, folder: str | os.PathLike[str]) -> str:
        return self.spec


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    Args:
        path: the file. Raises FileNotFoundError, or ValueError where it is no tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import tokenizers

        if not Path(path).is_file():
            raise missing_file(path, what="tokenizer file")
        self.spec = str(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{path} is not a tokenizer.json of the tokenizers library ({error}). Expected the file that "
                "tokenizer.save(...) writes; for a model's folder give the folder itself."
            ) from error
        # A file may ask for truncation or padding to a model's length; a corpus is neither cut nor filled.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = _vocabulary_size(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> np.ndarray:
        return _as_ids(self._tokenizer.encode(_clean(text), add_special_tokens=False).ids, self.vocab_size)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        text = _clean(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return _as_ids(encoding.ids, self.vocab_size), _bytes_per_token(text, encoding.offsets)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(_as_ints(ids, self.vocab_size), skip_special_tokens=False))

    def num_bytes(self, text: str) -> int:
        return len(_utf8(text))

    def save(self, folder: str | os.PathLike[str]) -> str:
        with atomic_path(Path(folder) / "tokenizer.json") as temporary:
            self._tokenizer.save(str(temporary))
        return "tokenizer.json"


class HubTokenizer:
    """A tokenizer of `transformers`: a folder, or a name on the Hugging Face hub. Code from the hub is never run.

    Where the tokenizer has no offsets (a "slow" one), a document's bytes are spread evenly over its tokens.

    Args:
        name: the folder or name. Raises ValueError where transformers finds no tokenizer there.
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        from transformers import AutoTokenizer

        self.spec = str(name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.spec)
        except Exception as error:  # what it raises depends on what it tried last
            if Path(self.spec).is_dir():
                mend = "The folder needs a tokenizer.json, or the files that tokenizer.save_pretrained(folder) writes."
            else:
                mend = (
                    "Give 'bytes', a tokenizer.json, a folder with a tokenizer, or a name on the Hugging Face hub "
                    "(a first use of a name needs a network)."
                )
            raise ValueError(
                f"no tokenizer could be loaded from {self.spec!r}: {_first_line(error)}. {mend}"
            ) from error
        self.vocab_size = _vocabulary_size(self._tokenizer.get_vocab())

    def encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer(_clean(text), add_special_tokens=False, verbose=False)["input_ids"]
        return _as_ids(ids, self.vocab_size)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        text = _clean(text)
        fast = bool(self._tokenizer.is_fast)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = _as_ids(found["input_ids"], self.vocab_size)
        if fast:
            return ids, _bytes_per_token(text, found["offset_mapping"])
        return ids, np.diff(np.arange(len(ids) + 1) * self.num_bytes(text) // max(len(ids), 1))

    def decode(self, ids: Iterable[int]) -> str:
        numbers = _as_ints(ids, self.vocab_size)
        return str(self._tokenizer.decode(numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def num_bytes(self, text: str) -> int:
        return len(_utf8(text))

    def save(self, folder: str | os.PathLike[str]) -> str:
        self._tokenizer.save_pretrained(str(Path(folder) / "tokenizer"))
        return "tokenizer"


def load_tokenizer(spec: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    Args:
        spec: "bytes" (the default everywhere); a `tokenizer.json` file; a folder or a Hugging Face hub name for
            `transformers.AutoTokenizer`.
        folder: where a relative `spec` is looked up first, such as the checkpoint that `Tokenizer.save` wrote to.

    Raises:
        FileNotFoundError: a path that is not there, with what is near it.
        ValueError: no tokenizer could be loaded from what is there.
    """
    name = os.fspath(spec)
    if name == ByteTokenizer.spec:
        return ByteTokenizer()
    if folder is not None and (Path(folder) / name).exists():
        name = str(Path(folder) / name)
    path = Path(name).expanduser()
    if path.is_file():
        return FileTokenizer(path)
    if path.is_dir():
        return HubTokenizer(path)
    if name.endswith(".json") or name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1:
        raise missing_file(path, what="tokenizer file or folder")
    return HubTokenizer(name)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError where a model of `vocab_size` ids has no room for the tokenizer's."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.spec!r} has {tokenizer.vocab_size:,} ids, the model has {vocab_size:,}. "
            f"Give HopeConfig(vocab_size={tokenizer.vocab_size}), or the tokenizer that the model was trained with."
        )


def _clean(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot."""
    return _utf8(text).decode("utf-8")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _vocabulary_size(vocabulary: dict[str, int]) -> int:
    """One more than the largest id, which with gaps in the numbering is more than the number of entries."""
    return max(vocabulary.values(), default=-1) + 1


def _as_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.min_scalar_type(max(vocab_size - 1, 0)))


def _as_ints(ids: Iterable[int], vocab_size: int) -> list[int]:
    numbers = [int(number) for number in ids]
    for number in numbers:
        if not 0 <= number < vocab_size:
            raise ValueError(f"token id {number}: expected 0 to {vocab_size - 1}. Is it from another tokenizer?")
    return numbers


def _bytes_per_token(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Spread the bytes of `text` over tokens that cover the characters [start, end) of `offsets`.

    A token owns the bytes from where the tokens before it end to its own end: so a character that several tokens share
    counts once, skipped spaces go to the token after them, and the sum is that of the text.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    return np.diff(bytes_before[ends], prepend=0)


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0].rstrip(".")
    return type(error).__name__
