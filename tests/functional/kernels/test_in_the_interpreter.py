"""Runs the tests of `interpreted`, each file in a process whose Triton interprets its kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from house import ROOT

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.mark.triton_interpret
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the tests themselves are collected")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    if importlib.util.find_spec("triton") is None:
        message = 'needs Triton, which is not installed: pip install "nestlearn[kernels]" (Linux)'
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3", str(FOLDER / file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=550,
    )
    print(finished.stdout[-6000:], finished.stderr[-2000:])
    assert finished.returncode == 0, f"{file} fails under TRITON_INTERPRET=1, see the captured output"
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout
