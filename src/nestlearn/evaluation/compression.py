"""What a good general compressor makes of a text, in the unit of language models: bits per byte."""

from __future__ import annotations

import lzma
from dataclasses import dataclass

# 1.5 GiB, the largest dictionary of the format; the encoder needs about eleven times its dictionary in memory.
_LARGEST_DICTIONARY = 3 * 2**29
_SMALLEST_DICTIONARY = 2**12


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Size of a held-out text under xz after a training text.

    Attributes:
        bits_per_byte: of the held-out text.
        priming_bytes: of the training text that came before it.
        bytes: of the held-out text.
    """

    bits_per_byte: float
    priming_bytes: int
    bytes: int


def xz_bits_per_byte(training: bytes, held_out: bytes) -> Compression:
    """Bits that xz (LZMA2, preset 9 extreme) needs for `held_out` once it knows `training`.

    That is the compressed size of both, one after the other, less that of the training text alone. The dictionary
    covers everything that came before, so any stretch of the training text can be referred to, and of the held-out text
    too: unlike a model that starts each window afresh, xz goes on learning through all of it.

    Raises:
        ValueError: if there is no held-out text, or more text than the largest dictionary (1.5 GiB).
    """
    if not held_out:
        raise ValueError("xz: expected held-out text, got none")
    total = len(training) + len(held_out)
    if total > _LARGEST_DICTIONARY:
        raise ValueError(
            f"xz: expected at most {_LARGEST_DICTIONARY:,} bytes in all (its largest dictionary), got {total:,}; "
            "prime it with less training text"
        )
    extra = _size(training + held_out, total) - _size(training, total)
    return Compression(bits_per_byte=8 * extra / len(held_out), priming_bytes=len(training), bytes=len(held_out))


def _size(data: bytes, dictionary: int) -> int:
    """Compressed size without headers and checksums, which belong to files."""
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": max(dictionary, _SMALLEST_DICTIONARY)}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
