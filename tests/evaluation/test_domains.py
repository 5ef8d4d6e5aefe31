"""Domains of a stream: both sides have text, none of it twice, and the same each time."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from nestlearn.evaluation.domains import DOMAINS, read_domain


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_has_two_sides_that_share_nothing(name: str, data_dir: Path) -> None:
    found = read_domain(name, training_bytes=30_000, test_bytes=6_000, data_root=data_dir)
    assert found == read_domain(name, training_bytes=30_000, test_bytes=6_000, data_root=data_dir)
    (training,), (tests,) = found.training, found.tests
    assert 20_000 < len(training.encode()) <= 30_000
    assert 3_000 < len(tests.encode()) <= 6_000
    if name in ("kalamang", "nen", "clinc"):
        assert not set(training.splitlines()) & set(tests.splitlines())
    more = read_domain(name, training_bytes=60_000, test_bytes=6_000, data_root=data_dir)
    assert more.tests == found.tests


def test_what_is_not_there_is_refused(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ValueError, match="name: expected one of kalamang, nen, python, clinc, novels"):
        read_domain("poems", training_bytes=9, test_bytes=9)
    for name in ("kalamang", "clinc", "novels"):
        with pytest.raises(FileNotFoundError):
            read_domain(name, training_bytes=9, test_bytes=9, data_root=tmp_path)
    (tmp_path / "lowres" / "nen").mkdir(parents=True)
    (tmp_path / "lowres" / "nen" / "parallel.jsonl.gz").write_bytes(gzip.compress(b'{"src": "a", "en": "b"}\nbroken\n'))
    with pytest.raises(ValueError, match=r"parallel.jsonl.gz, line 2: expected JSON"):
        read_domain("nen", training_bytes=9, test_bytes=9, data_root=tmp_path)
