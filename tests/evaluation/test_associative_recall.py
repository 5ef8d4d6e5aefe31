"""MQAR: the batches are what they say, and a short run fills its record."""

import pytest
import torch

from nestlearn.evaluation.associative_recall import VARIANTS, table, train_recall
from nestlearn.evaluation.tasks import IGNORED
from nestlearn.evaluation.tasks.associative_recall import AssociativeRecall


def test_every_answer_is_the_value_read_before() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, targets, _ = AssociativeRecall(pairs=4, length=15, symbols=9).sample(20, generator)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4
        assert all(1 <= key <= 9 < value <= 18 for key, value in pairs.items())
        asked = [place for place, answer in enumerate(answers) if answer != IGNORED]
        assert sorted(row[place] for place in asked) == sorted(pairs)
        assert all(place >= 8 and answers[place] == pairs[row[place]] for place in asked)
        assert all(row[place] == 0 for place in range(8, 15) if place not in asked)
    assert len({tuple(row) for row in tokens[:, 8:].bool().tolist()}) > 5, "the questions stand at the same places"


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pairs need a length of at least 12"):
        AssociativeRecall(pairs=4, length=11, symbols=9)


@pytest.mark.parametrize("variant", ["hope", "delta_net"])
def test_a_run_learns_the_easy_part(variant: str) -> None:
    job = {"name": "x", "variant": variant, "settings": VARIANTS[variant], "seed": 0, "lr": 3e-3, "pairs": 2,
           "length": 8, "symbols": 4, "steps": 60, "every": 20, "batch_size": 16}  # fmt: skip
    record = {"job": job, **train_recall(job)}
    assert record["curve"][-1]["loss"] < 1.8  # chance among the values is log 4 = 1.39, at the start log 9 = 2.2
    assert f"| {variant} |" in table([record])
