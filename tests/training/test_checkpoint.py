"""Checkpoints: what is saved comes back exactly, and what is damaged is refused by name."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nestlearn.io
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import LevelOptimizer
from nestlearn.training.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from nestlearn.training.data import ByteTokenizer

CONFIG = HopeConfig(dim=8, depth=1, heads=1, chunk_size=4, cms_periods=(1, 3))


def make(seed=0):
    torch.manual_seed(seed)
    model = HopeLM(CONFIG)
    return model, LevelOptimizer.for_model(model, lr=0.01)


def step(model, optimizer, number):
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    logits, _ = model(tokens)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


def save(folder, number, model=None, optimizer=None):
    path = checkpoint_path(folder, number)
    model = make()[0] if model is None else model
    save_checkpoint(
        path,
        model=model,
        optimizer=optimizer,
        step=number,
        model_config=CONFIG.to_dict(),
        tokenizer="bytes",
        run={"training": {"lr": 0.1}},
        progress={"losses": 1 / 3},
    )
    return path


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def same(tree, other):
    """Equality of nested states, types of the keys included."""
    if isinstance(tree, torch.Tensor):
        return tree.dtype == other.dtype and torch.equal(tree, other)
    if isinstance(tree, dict):
        return set(tree) == set(other) and all(same(tree[key], other[key]) for key in tree)
    if isinstance(tree, (list, tuple)):
        return type(tree) is type(other) and len(tree) == len(other) and all(map(same, tree, other))
    return type(tree) is type(other) and tree == other


def test_everything_comes_back_exactly(tmp_path):
    model, optimizer = make()
    for number in range(4):
        step(model, optimizer, number)
    found = load_checkpoint(save(tmp_path, 4, model, optimizer))
    assert (found.step, found.tokenizer) == (4, "bytes")
    assert found.model == CONFIG.to_dict()
    assert found.progress == {"losses": 1 / 3}
    assert found.run == {"training": {"lr": 0.1}}
    assert same(found.weights, dict(model.state_dict()))
    assert same(found.optimizer, optimizer.state_dict())
    assert found.optimizer["levels"]["means"]  # step 4 is in the middle of a period of 3


def test_training_goes_on_bitwise_from_the_middle_of_a_period(tmp_path):
    model, optimizer = make()
    for number in range(4):
        step(model, optimizer, number)
    path = save(tmp_path, 4, model, optimizer)
    other, resumed = make(seed=1)
    load_checkpoint(path).restore(other, resumed)
    for number in range(4, 7):
        step(model, optimizer, number)
        step(other, resumed, number)
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_a_cut_or_foreign_file_is_refused_by_name(tmp_path):
    path = save(tmp_path, 3)
    cut(path)
    with pytest.raises(ValueError, match=r"step-00000003\.safetensors .* is cut off or damaged"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is a safetensors file but no checkpoint"):
        load_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="step-00000003"):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000004.safetensors")


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_one_is_named(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for number in (2, 10, 9):
        save(tmp_path, number)
    notices = []
    assert newest_checkpoint(tmp_path, notice=notices.append).step == 10
    assert not notices
    cut(checkpoint_path(tmp_path, 10))
    assert newest_checkpoint(tmp_path, notice=notices.append).step == 9
    assert len(notices) == 1
    assert "DAMAGED" in notices[0]
    assert "step-00000010" in notices[0]
    assert checkpoint_path(tmp_path, 10).exists()  # nothing is removed
    cut(checkpoint_path(tmp_path, 9))
    cut(checkpoint_path(tmp_path, 2))
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        newest_checkpoint(tmp_path, notice=notices.append)


def test_files_that_are_no_checkpoints_are_not_taken_for_one(tmp_path):
    path = save(tmp_path, 5)
    (path.parent / "notes.txt").write_text("mine")
    (path.parent / ".step-00000006.safetensors.abc.tmp.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [path]


def test_prune_keeps_the_newest_and_nothing_else_is_touched(tmp_path):
    for number in (1, 2, 30, 100):
        save(tmp_path, number)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    prune_checkpoints(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 4
    prune_checkpoints(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 30), checkpoint_path(tmp_path, 100)]
    prune_checkpoints(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 2
    assert (tmp_path / "checkpoints" / "notes.txt").exists()


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    before = path.read_bytes()

    def full(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nestlearn.io, "save_file", full)
    with pytest.raises(OSError, match=r"step-00000001\.safetensors"):
        save(tmp_path, 1, make(seed=1)[0])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    path = save(tmp_path, 1)
    before = path.read_bytes()
    model, _ = make()
    with torch.no_grad():
        model.embedding.weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"weight holds values that are not finite.*was not written"):
        save(tmp_path, 1, model)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    found = load_checkpoint(save(tmp_path, 1))
    other = HopeLM(HopeConfig(dim=16, depth=1, heads=1, chunk_size=4, cms_periods=(1, 3)))
    with pytest.raises(ValueError, match=r"step-00000001\.safetensors holds another model"):
        found.restore(other)
    with pytest.raises(ValueError, match="without the optimizer's state"):
        found.restore(*make())


def test_load_model_takes_a_file_or_a_run(tmp_path):
    model, optimizer = make()
    step(model, optimizer, 0)
    path = save(tmp_path, 1, model, optimizer)
    tokens = torch.randint(256, (2, 9))
    for place in (path, tmp_path):
        loaded, tokenizer = load_model(place)
        assert not loaded.training
        assert isinstance(tokenizer, ByteTokenizer)
        assert torch.equal(loaded(tokens)[0], model.eval()(tokens)[0])
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_model(tmp_path / "checkpoints")


def test_load_model_finds_a_tokenizer_saved_beside_the_checkpoint(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, model=make()[0], step=1, model_config=CONFIG.to_dict(), tokenizer="tokenizer.json")
    assert load_model(path)[1].vocab_size == 3


def test_metadata_is_plain_json_for_other_tools(tmp_path):
    metadata = nestlearn.io.load_safetensors_metadata(save(tmp_path, 7))
    assert json.loads(metadata["step"]) == 7
    assert HopeConfig.from_dict(json.loads(metadata["model"])) == CONFIG


def test_a_state_that_is_no_plain_value_is_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {"callback": print}

    with pytest.raises(TypeError, match=r"optimizer\.callback.*builtin"):
        save(tmp_path, 1, None, Odd())
