"""Domains of text for streams: languages and manners of writing that novels do not have."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.io import missing_file
from nestlearn.training.corpus import STDLIB, read_documents

# One entry in so many is for the test.
TEST_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Text of one kind.

    Attributes:
        name: of the domain.
        training: texts to be read.
        tests: texts of the same kind; no entry is in both.
    """

    name: str
    training: tuple[str, ...]
    tests: tuple[str, ...]


def read_domain(
    name: str, *, training_bytes: int, test_bytes: int, data_root: str | os.PathLike[str] | None = None
) -> Domain:
    """A domain by name.

    "kalamang" and "nen": sentences of a language with their English, then words with their meaning. "clinc": questions
    of users with their intents. "python": files of Python's standard library. "novels": English novels.

    Entries are told apart by a digest of their text, so that the same one is never on both sides, and cut to whole
    entries.

    Args:
        name: one of `DOMAINS`.
        training_bytes: at most so much to be read, in UTF-8.
        test_bytes: the same for the tests.
        data_root: folder of data sets; see `find_data_root`.

    Raises:
        ValueError: for an unknown name, or if either side has no entry.
        FileNotFoundError: if its files are not there.
    """
    if name not in DOMAINS:
        raise ValueError(f"name: expected one of {', '.join(DOMAINS)}, got {name!r}")
    sides: tuple[list[str], list[str]] = ([], [])
    limits, sizes = (training_bytes, test_bytes), [0, 0]
    seen = set()
    for entry in DOMAINS[name](Path("." if name == "python" else find_data_root(data_root))):
        digest = hashlib.blake2b(entry.encode(), digest_size=8).digest()
        if digest in seen:
            continue
        seen.add(digest)
        side = int(int.from_bytes(digest, "big") % TEST_SHARE == 0)
        size = len(entry.encode())
        if sizes[side] + size <= limits[side]:
            sides[side].append(entry)
            sizes[side] += size
        elif not sides[side]:  # a single entry that is too long: as much of it as may be
            sides[side].append(entry.encode()[: limits[side]].decode(errors="ignore"))
            sizes[side] = limits[side]
    if not all(sides):
        raise ValueError(f"{name}: expected entries for training and test, got {len(sides[0])} and {len(sides[1])}")
    training, tests = ("".join(side) for side in sides)
    return Domain(name=name, training=(training,), tests=(tests,))


def _language(name: str) -> Callable[[Path], Iterator[str]]:
    def entries(root: Path) -> Iterator[str]:
        for pair in _lines(root / "lowres" / name / "parallel.jsonl.gz"):
            yield f"{pair['src']} = {pair['en']}\n"
        for word in _lines(root / "lowres" / name / "lexicon.jsonl.gz"):
            yield f"{word['headword']}: {word['definition']}\n"

    return entries


def _clinc(root: Path) -> Iterator[str]:
    path = root / "cil_splits" / "clinc_train.csv"
    if not path.exists():
        raise missing_file(path, what="questions of CLINC")
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    # In the file one intent follows another; users do not.
    for row in sorted(rows, key=lambda row: hashlib.blake2b(row["text"].encode(), digest_size=8).digest()):
        yield f"{row['text']} -> {row['label']}\n"


def _python(_: Path) -> Iterator[str]:
    yield from read_documents(STDLIB, max_bytes=4_000_000, notice=lambda _: None)


def _novels(root: Path) -> Iterator[str]:
    for novel in read_documents(root / "eltec_eng" / "valid.jsonl.gz"):
        middle = len(novel) // 2
        yield from (f"{paragraph}\n" for paragraph in novel[middle : middle + 400_000].split("\n") if paragraph.strip())


DOMAINS: dict[str, Callable[[Path], Iterator[str]]] = {
    "kalamang": _language("kalamang"),
    "nen": _language("nen"),
    "python": _python,
    "clinc": _clinc,
    "novels": _novels,
}


def _lines(path: Path) -> Iterator[dict[str, str]]:
    if not path.exists():
        raise missing_file(path, what="entries of a language")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON ({error})") from None
