"""benchmarks/: its page shows the commands that its script runs, and the command line knows their options."""

import re
import shlex
import subprocess
import sys

import pytest

from house import ROOT

README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("nestlearn bench")]


def test_the_page_shows_what_the_script_runs() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--list"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert [line.removeprefix("$ ") for line in done.stdout.splitlines()] == [c for c in COMMANDS if "--out" in c]
    wrong = subprocess.run([*script, "trian"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert "expected names among train" in wrong.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nestlearn.cli import benchmarking, main

    asked: list[object] = []
    monkeypatch.setattr(benchmarking, "_bench", lambda run, out, as_json: asked.append(out))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, capsys.readouterr().err
    assert len(asked) == 1
    assert (asked[0] is not None) == bool(re.search("--out", command))
