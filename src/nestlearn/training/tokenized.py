"""A corpus as one flat array of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestlearn.training.tokenizers import ByteTokenizer, Tokenizer

__all__ = ["TokenizedDocuments", "tokenize_documents"]


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """Documents as one flat array of ids.

    tokens: (N,) of the smallest unsigned integer type that holds every id.
    starts: (documents + 1,) int64; document i is tokens[starts[i]:starts[i + 1]] and is not empty.
    token_bytes: (N,) unsigned, the UTF-8 bytes that each token stands for; None where each stands for one.
    """

    tokens: np.ndarray
    starts: np.ndarray
    token_bytes: np.ndarray | None = None

    def __post_init__(self) -> None:
        starts = self.starts
        if self.tokens.ndim != 1 or starts.ndim != 1 or len(starts) < 2 or starts[0] != 0:
            raise ValueError("expected tokens (N,) and starts (documents + 1,) that begin with 0. Is there a document?")
        if starts[-1] != len(self.tokens) or bool((np.diff(starts) <= 0).any()):
            raise ValueError(f"starts: expected to rise to N = {len(self.tokens)}, got a last one of {starts[-1]}.")
        if self.token_bytes is not None and self.token_bytes.shape != self.tokens.shape:
            raise ValueError(f"token_bytes: expected {self.tokens.shape}, got {self.token_bytes.shape}.")

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return self.num_tokens if self.token_bytes is None else int(self.token_bytes.sum(dtype=np.int64))

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that tell this corpus, in this order and with these ids, from another."""
        digest = hashlib.blake2b(self.starts.tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.tokens.astype(self.tokens.dtype.newbyteorder("<"), copy=False)).data)
        return digest.hexdigest()


def tokenize_documents(documents: Sequence[str], tokenizer: Tokenizer) -> TokenizedDocuments:
    """Tokenize documents, each for itself and without special tokens; those without a token are left out.

    Raises: ValueError where no document has a token.
    """
    bytewise = isinstance(tokenizer, ByteTokenizer)
    ids: list[np.ndarray] = []
    widths: list[np.ndarray] = []
    for text in documents:
        if bytewise:
            ids.append(tokenizer.encode(text))
        else:
            tokens, width = tokenizer.encode_with_bytes(text)
            ids.append(tokens)
            widths.append(width.astype(np.min_scalar_type(int(width.max(initial=0)))))
    lengths = np.array([len(tokens) for tokens in ids if len(tokens)], dtype=np.int64)
    if not len(lengths):
        raise ValueError("the corpus is empty: expected at least one token, got none. Check what the source holds.")
    return TokenizedDocuments(
        tokens=np.concatenate(ids),
        starts=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        token_bytes=None if bytewise else np.concatenate(widths),
    )
