"""A page of results says what made its numbers."""

from pathlib import Path

import pytest

from nestlearn.evaluation import report


def test_a_page_names_the_commits_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "provenance", lambda: {"commit": "aa", "torch": "2", "device": "cpu"})
    same = report.write_report(tmp_path / "same", "T", "text", {"runs": [{"commit": "aa"}]})
    mixed = report.write_report(tmp_path / "mixed", "T", "text", {"runs": [{"commit": "bb"}, {"commit": "aa"}]})
    assert "Commit aa, torch 2" in same
    assert "Commit aa (runs made at aa, bb), torch 2" in mixed
    assert (tmp_path / "mixed.md").read_text() == mixed


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--variants", "hope, gd;titans"])
    assert report.command().endswith(" --variants 'hope, gd;titans'")
