"""lm-evaluation-harness gives the numbers that a direct computation gives."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nestlearn.cli import main
from nestlearn.evaluation.zero_shot import FILES, ask, read_questions
from nestlearn.hub import load
from nestlearn.training.checkpoint import load_model

pytest.importorskip("lm_eval", reason="lm_eval comes with the extra `eval`")
from nestlearn.hub import harness
from nestlearn.hub.harness import HopeHarness, evaluate_tasks

SAMPLE = 12


@pytest.fixture(scope="module", autouse=True)
def _here(data_dir: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESTLEARN_DATA", str(data_dir))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def measured(run: Path, _here: None) -> dict[str, dict[str, Any]]:
    return evaluate_tasks(*load(run), list(FILES), limit=SAMPLE, batch_size=4)


@pytest.mark.parametrize("name", FILES)
def test_numbers_are_those_of_a_direct_computation(name: str, measured: dict[str, Any], run: Path) -> None:
    model, tokenizer = load_model(run)
    direct = ask(model, tokenizer, read_questions(name, limit=SAMPLE))
    found = measured[name]
    assert found["samples"] == SAMPLE
    assert found["acc"] == direct["accuracy"]
    if "normalised" in direct:
        assert found["acc_norm"] == direct["normalised"]
    else:
        assert direct["bits"] is not None
        assert math.log2(found["perplexity"]) == pytest.approx(direct["bits"], rel=1e-5)


@pytest.mark.parametrize("carry", [True, False])
def test_a_document_is_read_through_one_memory_or_each_window_for_itself(
    carry: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = "In the beginning a cat sat on a mat. " * 8
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "texts.py").write_text(
        "from datasets import Dataset\n\n"
        f"def texts(**_):\n    return {{'test': Dataset.from_list([{{'text': {document!r}}}, {{'text': 'short'}}])}}\n"
    )
    (tasks / "texts.yaml").write_text(
        "task: some_texts\ncustom_dataset: !function texts.texts\noutput_type: loglikelihood_rolling\n"
        'test_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    window = 50
    model, tokenizer = load(run)
    found = evaluate_tasks(model, tokenizer, ["some_texts"], carry=carry, window=window, include_path=tasks)
    nats = 0.0
    for text in (document, "short"):
        ids = torch.tensor([list(f"\n{text}".encode())])
        size = ids.shape[1] if carry else window
        for start in range(0, ids.shape[1] - 1, size):
            piece = ids[:, start : start + size + 1]
            with torch.no_grad():
                logits, _ = model.lm(piece[:, :-1])
            nats += float(F.cross_entropy(logits[0], piece[0, 1:], reduction="sum"))
    bits = nats / math.log(2) / len(f"{document}short")
    assert found["some_texts"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_two_ways_to_read_a_document_differ(run: Path) -> None:
    model, tokenizer = load(run)
    ids = tokenizer("The same thing again. " * 20)["input_ids"]
    carried, reset = [HopeHarness(model, tokenizer, carry=way, window=32)._document(ids) for way in (True, False)]
    assert carried != pytest.approx(reset, rel=1e-3)


def test_command(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    measured: dict[str, Any],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # which is no git repository

    def command(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["nestlearn", "eval", str(exported), *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert command("--tasks", "piqa, lambada", "--limit", str(SAMPLE), "--json") == 0
    written = capfd.readouterr()
    assert "not a git repository" not in written.err
    report = json.loads(written.out)
    assert report["tasks"] == {name: pytest.approx(measured[name], rel=1e-6) for name in ("piqa", "lambada")}
    assert command("--tasks", "arc_easy", "--limit", "2") == 0
    assert "acc_norm" in capfd.readouterr().out
    assert command("--tasks", "piqa", "--limit", "-1") == 2
    assert "--limit: expected 0" in capfd.readouterr().err
    assert command("--tasks", ",") == 2
    assert "expected at least one name" in capfd.readouterr().err


def test_an_unknown_task_is_refused_by_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading all tasks of the harness takes many seconds.
    ours = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", ours)
    with pytest.raises(ValueError, match="no_such_task is known neither here"):
        evaluate_tasks(*load(run), ["piqa", "no_such_task"])
