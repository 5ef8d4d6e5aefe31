"""The comparison of TNT's two stages with plain training: the models, the turns, the tables."""

import json
import sys
from pathlib import Path

import pytest

from nestlearn.evaluation import sequence_parallel
from nestlearn.evaluation.matching import count_parameters
from nestlearn.evaluation.sequence_parallel import loss_table, make_configs, speed_table, time_models

SIZE = {"dim": 16, "depth": 1, "heads": 2}
SHARDS = {"global_chunk_size": 16, "global_stride": 4, "shard_length": 16}


def test_models_are_of_one_size_and_the_stages_share_their_parameters() -> None:
    configs = make_configs(SIZE, (2, 4), (1, 2), (2, 4), SHARDS)
    assert list(configs) == ["TNT (2, 4)", "TNT (1, 2)", "chunk 2", "chunk 4"]
    first, second, *plain = (count_parameters(config) for config in configs.values())
    assert first == second
    assert first == pytest.approx(plain[0], rel=0.01)
    assert (configs["chunk 4"].mixer, configs["chunk 4"].chunk_size) == ("self_modifying_titans", 4)


def test_all_models_are_checked_and_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(sequence_parallel, "check_equality", checked.append)
    seconds = time_models(make_configs(SIZE, (4,), (2,), (4,), SHARDS), tokens=32, batch=1, alternations=2)
    assert len(checked) == 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"TNT (4,)": 2, "TNT (2,)": 2, "chunk 4": 2}
    table = speed_table({"TNT": [1.0, 2.0, 4.0], "chunk 8": [3.0, 4.0, 16.0]}, 100)
    assert "| chunk 8 | 4.00           | 25       | 3.00 (2.00-4.00)" in table


def test_losses_are_paired_by_seed() -> None:
    def record(model: str, seed: int, *bits: float) -> dict:
        stages = [
            {
                "parameters": 10,
                "held_out": [{"bits_per_byte": value}],
                "train": [{"tokens": 50, "seconds": 30.0}],
                "diverged": None,
            }
            for value in bits
        ]
        return {"job": {"model": model, "seed": seed, "lr": 0.004}, "stages": stages}

    records = [record("TNT", 0, 2.5, 2.4), record("TNT", 1, 2.7, 2.6), record("chunk 8", 0, 2.5)]
    table = loss_table([*records, record("chunk 8", 1, 2.5)], "chunk 8")
    tnt, plain = table.splitlines()[2:]
    assert [cell.strip() for cell in tnt.split("|")[3:10]] == ["0.004", "2", "100", *tnt_cells()]
    assert plain.split("|")[8].strip() == "–"


def tnt_cells() -> list[str]:
    return ["2.6000 ± 0.1000", "2.5000 ± 0.1000", "+0.0000 ± 0.1000", "1.0 ± 0.0"]


@pytest.mark.slow
def test_the_command_writes_a_page_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i}: what is read is written. " * 3}) + "\n" for i in range(40)))
    words = [f"--text={text}", "--sequence-length=32", "--dim=16", "--depth=1", "--heads=2", "--local-chunks=4"]
    words += [
        "--fine-tune-chunks=2",
        "--plain-chunks=4",
        "--tune=1e-3,2e-3",
        "--tune-steps=1",
        "--set=shard_length=16",
        "--alternations=0",
        "--steps=2",
        "--fine-tune-steps=1",
    ]
    words += ["--eval-tokens=64", f"--out={tmp_path / 'page'}", f"--runs={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["sequence_parallel", *words])
    sequence_parallel.main()
    page = (tmp_path / "page.md").read_text()
    assert "| TNT (4,) |" in page
    assert "| chunk 4  |" in page
    assert "tokens/s" not in page
    results = json.loads((tmp_path / "page.json").read_text())
    assert [record["job"]["lr"] for record in results["tuning"]] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert [len(record["stages"]) for record in results["runs"]] == [2, 1]
    tokens = [sum(stage["train"][-1]["tokens"] for stage in record["stages"]) for record in results["runs"]]
    assert tokens == [3 * 32, 3 * 32]
    monkeypatch.setattr(sys, "argv", ["sequence_parallel", *words, "--fine-tune-steps=0", f"--runs={tmp_path / 'one'}"])
    sequence_parallel.main()
    results = json.loads((tmp_path / "page.json").read_text())
    assert [len(record["stages"]) for record in results["runs"]] == [1, 1]
