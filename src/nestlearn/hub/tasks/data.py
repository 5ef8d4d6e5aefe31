"""What the YAML files beside this one read, from the folder of data sets that NESTLEARN_DATA names."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.evaluation.zero_shot import read_questions
from nestlearn.training.data import read_documents


def lambada(**_: Any) -> dict[str, Dataset]:
    """Passages without their last word, and that word."""
    return _questions("lambada")


def piqa(**_: Any) -> dict[str, Dataset]:
    """Goals, each with two ways to reach it."""
    return _questions("piqa")


def arc_easy(**_: Any) -> dict[str, Dataset]:
    """Questions of school science with four answers or so."""
    return _questions("arc_easy")


def novels(**_: Any) -> dict[str, Dataset]:
    """Whole novels that the training side does not have."""
    texts = read_documents(find_data_root(None) / "eltec_eng" / "valid.jsonl.gz")
    return {"test": Dataset.from_list([{"text": text} for text in texts])}


def _questions(name: str) -> dict[str, Dataset]:
    rows = [
        {
            "prompt": question.prompt,
            "answers": [answer.removeprefix(" ") for answer in question.answers],
            "right": question.right,
        }
        for question in read_questions(name)
    ]
    return {"test": Dataset.from_list(rows)}
