"""A held-out side that no training document ever leaks into."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from nestlearn.training.corpus import Notice, log_notice

__all__ = ["DocumentSplit", "split_documents"]


class DocumentSplit(NamedTuple):
    """The two sides of a corpus, each in the corpus's order and never empty."""

    train: list[str]
    held_out: list[str]


def split_documents(
    documents: Sequence[str], *, held_out_fraction: float = 0.05, seed: int = 0, notice: Notice = log_notice
) -> DocumentSplit:
    """Split by document into a side to train on and a side that is held out.

    A document's side depends on its own text and the seed alone: it stays there whatever is added, removed or reordered
    around it, and equal documents are on one side. So the fraction is that of the documents on average and neither
    their exact number nor their bytes. Where all fell on one side, the document nearest to the border changes sides; a
    corpus of one document is cut in two near the end, with a notice.

    Args:
        documents: from `read_documents`; at least one.
        held_out_fraction: in (0, 1). Default 0.05.
        seed: of the choice. Default 0.
        notice: is called with a sentence where a document has to be cut.

    Raises: ValueError for a fraction outside (0, 1), no documents, or a single one too short to cut.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction: expected more than 0 and less than 1, got {held_out_fraction}.")
    positions = [_position(text, seed) for text in documents if text]
    different = sorted(set(positions))
    if not different:
        raise ValueError("expected at least one document that is not empty, got none. Check what the source holds.")
    if len(different) == 1:
        return _cut(next(text for text in documents if text), held_out_fraction, notice)
    border = held_out_fraction
    if different[0] >= border:
        border = different[1]
    elif different[-1] < border:
        border = different[-1]
    train: list[str] = []
    held_out: list[str] = []
    for text, position in zip((text for text in documents if text), positions, strict=True):
        (held_out if position < border else train).append(text)
    return DocumentSplit(train, held_out)


def _position(text: str, seed: int) -> float:
    """A place in [0, 1) that depends on the text and the seed."""
    salt = str(seed).encode()
    digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=16, key=salt[:64])
    # Twelve hexadecimal digits are exact in a float.
    return int(digest.hexdigest()[:12], 16) / 16.0**12


def _cut(text: str, held_out_fraction: float, notice: Notice) -> DocumentSplit:
    """Cut one document near the end, at a line's end where one is close."""
    if len(text) < 2:
        raise ValueError("the corpus is one document of one character and cannot be split. Give more text.")
    cut = min(max(round(len(text) * (1.0 - held_out_fraction)), 1), len(text) - 1)
    line_end = text.find("\n", cut - 1, cut + 1000) + 1
    # Not at the price of a tenth of the held-out side.
    if 0 < line_end < len(text) - 0.9 * (len(text) - cut):
        cut = line_end
    notice(
        f"the corpus is one document; its last {len(text) - cut:,} of {len(text):,} characters are held out. "
        "For a split by document give a folder, or a .jsonl with one document per line."
    )
    return DocumentSplit([text[:cut]], [text[cut:]])
