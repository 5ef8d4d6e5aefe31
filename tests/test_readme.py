"""What the README shows works: its Python runs, its make targets exist, its commands know the options it gives them."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from house import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(program: str) -> list[list[str]]:
    """Every command line of the README's sh blocks that starts with `program`, as words and without comments."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words for words in lines if words and words[0] == program]


def test_blocks_are_found() -> None:
    assert blocks("python", "text\n```python\na = 1\n```\n```sh\nb\n```\n```python\nc\n```\n") == ["a = 1\n", "c\n"]
    assert blocks("python")
    assert shell_commands("make")
    assert shell_commands("nestlearn")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One namespace for all, as a reader would type them one after another.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks("python"), start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)
    logits, state = namespace["logits"], namespace["state"]
    assert isinstance(logits, torch.Tensor)
    assert isinstance(state, dict)
    assert logits.shape == (1, 256)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("words", shell_commands("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


@pytest.mark.parametrize("words", shell_commands("nestlearn"), ids=" ".join)
def test_commands_know_their_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nestlearn.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.argv", [*words[:2], "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_every_file_that_a_page_links_to_is_there() -> None:
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks/README.md",
    ):
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name} links to what is not there: {missing}"
