"""Tables of methods that go on learning: at their smallest, what they choose, and the labels that they choose among."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.continual.methods import Frozen, InContext
from nestlearn.evaluation.class_stream import ARROW, Branch, choose_label, read_groups
from nestlearn.evaluation.continual_jobs import make_method, read_pages
from nestlearn.evaluation.jobs import Record
from nestlearn.evaluation.reproduce import Order
from nestlearn.evaluation.reproduce.class_incremental import TABLE as CLASSES
from nestlearn.evaluation.reproduce.continual import ContinualTable, reproduce_continual
from nestlearn.evaluation.reproduce.domain_streams import TABLE as DOMAINS
from nestlearn.evaluation.reproduce.domain_streams import measures
from nestlearn.evaluation.reproduce.second_reading import TABLE as TWICE
from nestlearn.evaluation.reproduce.second_reading import score
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.data import load_tokenizer


@pytest.mark.parametrize(
    ("table", "methods"),
    [
        (DOMAINS, ("frozen", "1 level to 512")),
        (CLASSES, ("in context", "SGD on MLP blocks")),
        (TWICE, ("1 level", "2 levels")),
    ],
    ids=["domains", "classes", "twice"],
)
def test_every_table_is_made_at_the_smallest_scale(
    table: ContinualTable, methods: tuple[str, ...], tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    order = Order(scale="smoke", models=methods, runs=tmp_path / "runs", out=tmp_path / "t")
    page = reproduce_continual(table, order)
    results = json.loads((tmp_path / "t.json").read_text())
    assert [record["job"]["label"] for record in results["runs"]] == list(methods)
    assert all(f"| {name} " in page for name in methods)
    assert len(results["tuning"]) == sum(len(table.methods[name]) for name in methods if len(table.methods[name]) > 1)
    for record in results["runs"]:  # what is best of those that were tried is taken
        rivals = [r for r in results["tuning"] if r["job"]["label"] == record["job"]["label"]]
        if rivals:
            assert record["job"]["method"] == min(rivals, key=table.score)["job"]["method"]
    assert str(data_dir) not in (tmp_path / "t.json").read_text()
    assert (tmp_path / "t.png").stat().st_size > 5000
    records = sorted((tmp_path / "runs" / "records").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in records]
    assert reproduce_continual(table, order) == page
    assert [path.stat().st_mtime_ns for path in records] == times
    for wrong in (Order(scale="smoke", models=("mamba",), runs=tmp_path, out=tmp_path / "x"),
                  Order(scale="smoke", columns=("chess",), runs=tmp_path, out=tmp_path / "x")):  # fmt: skip
        with pytest.raises(ValueError, match="expected some of"):
            reproduce_continual(table, wrong)


@pytest.mark.parametrize("tuning", [False, True])
def test_groups_hold_all_classes_once_and_no_test_is_learnt(
    tuning: bool, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    groups = read_groups("clinc", groups=4, training=3, tests=2, seed=1, tuning=tuning)
    labels = [label for group in groups for label in group.labels]
    assert len(labels) == len(set(labels)) == 150
    assert {len(group.labels) for group in groups} == {37, 38}
    for group in groups:
        counts = Counter(line.rstrip("\n").split(ARROW)[1] for line in group.training)
        assert counts == dict.fromkeys(group.labels, 3)
        learnt = {line.split(ARROW)[0] for line in group.training}
        assert group.tests
        assert all(text not in learnt and label in group.labels for text, label in group.tests)
    other = read_groups("clinc", groups=4, training=3, tests=2, seed=2, tuning=tuning)
    assert other[0].labels != groups[0].labels
    assert len(read_groups("dbpedia", groups=2, training=1, tests=1, classes=6)[0].labels) == 3
    with pytest.raises(ValueError, match="groups: expected 1 to 6"):
        read_groups("clinc", groups=7, training=1, tests=1, classes=6)
    with pytest.raises(ValueError, match="name: expected one of clinc, dbpedia"):
        read_groups("mnist", groups=1, training=1, tests=1)


def base() -> HopeLM:
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(dim=16, depth=1, heads=2, chunk_size=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def test_a_label_is_chosen_branch_by_branch() -> None:
    tokenizer = load_tokenizer("bytes")
    method = InContext(base(), window=64)
    method.observe(torch.tensor(tokenizer.encode("some text before it").tolist()))
    labels = ["ab", "abc", "b", "ba", "zz"]

    def slowly(text: str) -> str:
        """Token by token, the whole text read anew for each."""
        so_far = ""
        while True:
            following = {f"{label}\n"[len(so_far)] for label in labels if f"{label}\n".startswith(so_far)}
            ids = tokenizer.encode("some text before it" + text + ARROW + so_far).tolist()
            logits = method.reader(torch.tensor([ids]))[0][0, -1].detach()
            so_far += max(following, key=lambda c: float(logits[ord(c)]))
            if so_far.endswith("\n"):
                return so_far.strip()

    tree = Branch.of(labels, tokenizer)
    asked = ("one", "two", "a third", "x", "yes", "no!")
    chosen = {text: choose_label(method, text, tree, tokenizer) for text in asked}
    assert chosen == {text: slowly(text) for text in chosen}
    assert len(set(chosen.values())) > 1


def test_methods_are_what_their_settings_say() -> None:
    model = base()

    def made(**settings: Any) -> Any:
        return make_method(settings, model, window=32, segment=8, seed=3)

    levels = made(kind="levels", periods=(4, 8), lr=0.1, rule="momentum", clip=None)
    assert levels.learner.model.periods == (4, 8)
    assert levels.learner.rules[1].rule == "momentum"
    part = made(kind="fine-tuning", lr=0.1, mlps=True)
    trained = {name for name, p in part.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".memory_system.levels." in name and "norm" not in name for name in trained)
    before = {name: p.clone() for name, p in part.model.named_parameters()}
    part.observe(torch.arange(40))
    assert {name for name, p in part.model.named_parameters() if not torch.equal(p, before[name])} == trained
    assert made(kind="replay", lr=0.1, capacity=2).capacity == 2
    assert made(kind="ewc", lr=0.1, strength=5.0).strength == 5.0
    assert isinstance(made(kind="frozen"), Frozen)
    with pytest.raises(ValueError, match="kind: expected frozen"):
        made(kind="magic")


def test_every_method_answers_with_what_its_loss_is_of() -> None:
    text = torch.arange(30)
    for settings in (
        {"kind": "frozen"},
        {"kind": "in context"},
        {"kind": "levels", "periods": (4, 8), "lr": 0.1},
        {"kind": "fine-tuning", "lr": 0.1},
    ):
        method = make_method(settings, base(), window=256, segment=8, seed=0)
        method.observe(torch.arange(100, 140))
        logits = method.logits(text[None, :-1], method.begin())[0][0].detach()
        loss: Tensor = torch.nn.functional.cross_entropy(logits, text[1:])
        assert float(loss) == pytest.approx(method.loss(text), rel=1e-5)


def test_measures_and_the_choice_of_the_second_reading() -> None:
    found = measures({"losses": [[3.0, 3.0, 1.0], [2.0, 2.5, 1.1], [2.2, 2.0, 1.3]]})
    assert found["final"] == pytest.approx(2.1)
    assert found["home"] == pytest.approx(0.3)
    assert found["forgetting"] == pytest.approx(0.2)

    def record(second: float, home: float) -> Record:
        return {"frozen": 3.0, "second": second, "home": [1.0, home]}

    gentle, harmful = record(2.5, 1.03), record(1.5, 1.2)
    assert min((gentle, harmful), key=score) is gentle
    assert min((gentle, record(2.0, 1.07)), key=score) is not gentle
    assert min((harmful, record(2.5, 1.06)), key=score) is not harmful  # both too much: the lesser share
    assert score(record(2.0, 1.5)) < score(record(3.5, 1.0))  # what gains nothing is last


def test_what_is_read_twice_is_not_what_a_choice_was_made_on(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(data_dir))
    tokenizer = load_tokenizer("bytes")
    job = {"domains": ["kalamang", "clinc"], "home": "novels", "training": 2000, "tests": 500}
    sides = []
    for tuning in (False, True):
        pages, home = read_pages({**job, "tuning": tuning}, tokenizer)
        assert len(pages) == pytest.approx(4000, abs=200)
        sides.append([tokenizer.decode(ids.tolist()).split("\n")[:-1] for ids in (pages, *home)])
    for asked, chosen in zip(*sides, strict=True):
        assert asked
        # The line on which one part ends and the other begins may be in both, in part.
        assert len(set(asked) & set(chosen)) <= 1
