"""Where the checkout and the real data lie, for tests and for conftest.py."""

from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def find_data(environ: Mapping[str, str], root: Path) -> Path:
    """The folder of real data sets: $NESTLEARN_DATA, otherwise `../shared/data` beside the checkout `root`.

    Where it is absent the test is skipped with the reason, but under CI=true it fails: there nothing may go unchecked.
    """
    named = environ.get("NESTLEARN_DATA")
    folder = Path(named).expanduser() if named else root.parent / "shared" / "data"
    if folder.is_dir():
        return folder.resolve()
    source = "which NESTLEARN_DATA names" if named else "the default, as NESTLEARN_DATA is not set"
    message = f"needs the folder of real data sets, got no folder at {folder} ({source}); set NESTLEARN_DATA to it"
    if environ.get("CI", "").lower() == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
