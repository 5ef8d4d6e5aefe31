"""Bits per byte of xz: known extremes, and what priming does."""

import random

import pytest

from nestlearn.evaluation.compression import xz_bits_per_byte

NOISE = random.Random(0).randbytes(100_000)
WORDS = b" ".join(random.Random(1).choices([b"memory", b"level", b"learns", b"at", b"its", b"own", b"period"], k=4000))


def test_noise_costs_eight_bits_and_repetition_none() -> None:
    assert xz_bits_per_byte(b"", NOISE).bits_per_byte == pytest.approx(8, abs=0.02)
    assert xz_bits_per_byte(b"", b"a" * 100_000).bits_per_byte < 0.02


def test_what_is_known_costs_nothing_however_far_back() -> None:
    # A match is at most 273 bytes long and costs about three, so a long repetition is not quite free.
    primed = xz_bits_per_byte(NOISE, NOISE[:50_000])
    assert primed.bits_per_byte < 0.15
    assert (primed.priming_bytes, primed.bytes) == (100_000, 50_000)


def test_priming_with_the_same_kind_of_text_helps() -> None:
    half = len(WORDS) // 2
    alone, primed = xz_bits_per_byte(b"", WORDS[half:]), xz_bits_per_byte(WORDS[:half], WORDS[half:])
    assert 0 < primed.bits_per_byte < alone.bits_per_byte < 8


def test_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="held-out"):
        xz_bits_per_byte(NOISE, b"")


def test_the_dictionary_covers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "nestlearn.evaluation.compression.lzma.compress",
        lambda data, *, format, filters: asked.append(filters[0]["dict_size"]) or b"x" * len(data),
    )
    xz_bits_per_byte(bytes(70_000_000), b"abc")  # more than the 64 MiB of preset 9
    assert min(asked) >= 70_000_000


def test_more_than_the_largest_dictionary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestlearn.evaluation.compression._LARGEST_DICTIONARY", 1000)
    with pytest.raises(ValueError, match="less training text"):
        xz_bits_per_byte(NOISE, b"abc")
