"""The suite's own safeguards, and that the files around the code agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

import nestlearn
from house import ROOT, find_data

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uninitialised_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    made = [
        torch.empty(3, dtype=dtype),
        torch.empty(3, dtype=dtype, requires_grad=True),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided((3,), (1,), dtype=dtype),
    ]
    assert all(bool(tensor.isnan().all()) for tensor in made)


def test_suite_runs_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_every_test_starts_from_the_same_seed() -> None:
    assert torch.initial_seed() == 0


def test_data_folder_is_the_named_one(tmp_path: Path) -> None:
    assert find_data({"NESTLEARN_DATA": str(tmp_path)}, ROOT) == tmp_path.resolve()


def test_data_folder_defaults_to_the_one_beside_the_checkout(tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "data"
    folder.mkdir(parents=True)
    assert find_data({}, tmp_path / "checkout") == folder.resolve()


def test_missing_data_skips_with_a_reason_and_fails_in_ci(tmp_path: Path) -> None:
    missing = {"NESTLEARN_DATA": str(tmp_path / "none")}
    with pytest.raises(pytest.skip.Exception, match=r"none .*set NESTLEARN_DATA"):
        find_data(missing, ROOT)
    with pytest.raises(pytest.fail.Exception, match=r"none .*set NESTLEARN_DATA"):
        find_data(missing | {"CI": "true"}, ROOT)


def test_the_imported_package_is_this_checkout() -> None:
    assert Path(nestlearn.__file__) == ROOT / "src" / "nestlearn" / "__init__.py"


def test_versions_agree() -> None:
    version = PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f'\nversion: "{version}"\n' in citation
    assert newest is not None
    assert newest[1] == version


def test_licence_is_the_full_text_that_pyproject_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_installation_names_no_package_registry() -> None:
    # Where packages come from is the user's own pip configuration.
    for name in ("Makefile", ".ci/run", "constraints-cpu.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links", text), f"{name} names where to install from"
