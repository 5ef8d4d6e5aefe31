"""What is written beside numbers: the commit of the code that made them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nestlearn.evaluation.jobs import provenance
from nestlearn.training import record


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_results_do_not_change_a_commit_and_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, results = tmp_path / "src" / "package", tmp_path / "results"
    (package / "training").mkdir(parents=True)
    results.mkdir()
    running, other, page = package / "training" / "record.py", package / "other.py", results / "page.md"
    for path in (running, other, page):
        path.write_text("first")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all of it")
    monkeypatch.setattr(record, "__file__", str(running))
    head = git(tmp_path, "rev-parse", "HEAD")
    page.write_text("second")
    assert record.running_commit() == {"hash": head, "changed": False}
    assert provenance()["commit"] == head[:12]
    other.write_text("second")
    assert record.running_commit() == {"hash": head, "changed": True}
    assert provenance()["commit"] == f"{head[:12]}-dirty"
    (tmp_path / "elsewhere.py").write_text("no part of a repository")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "elsewhere.py"))
    assert record.running_commit() is None
    assert provenance()["commit"] is None
