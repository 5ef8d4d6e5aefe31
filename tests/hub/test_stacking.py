"""Levels on a Hope of transformers are those on the `HopeLM` inside it."""

from __future__ import annotations

from pathlib import Path

import torch
from hope_models import small_model, text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nestlearn import ContinualLearner, stack_levels
from nestlearn.cli.adaptation import load_base
from nestlearn.training.checkpoint import load_model


def word_pieces() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(48)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_it_learns_as_the_model_inside_and_a_memory_is_for_both(tmp_path: Path) -> None:
    model = small_model("self_modifying_titans")
    learners = [ContinualLearner(stack_levels(base, (4, 8), notice=None), lr=0.1) for base in (model, model.lm)]
    losses = [learner.observe(text(1, 40)).loss for learner in learners]
    assert losses[0] == losses[1]
    learners[0].save(tmp_path / "memory.safetensors")
    back = ContinualLearner.resume(tmp_path / "memory.safetensors", model)
    assert torch.equal(back.generate(text(5), 6, temperature=0), learners[1].generate(text(5), 6, temperature=0))


def test_a_folder_is_stacked_and_what_it_learnt_is_exported_with_its_tokenizer(tmp_path: Path) -> None:
    small_model("delta_net").save_pretrained(tmp_path / "folder")
    word_pieces().save_pretrained(tmp_path / "folder")
    base, tokenizer = load_base(str(tmp_path / "folder"), "cpu")
    learner = ContinualLearner(stack_levels(base, (4, 8), notice=None), tokenizer, lr=0.1)
    learner.observe("w1 w2 w3 " * 10)
    learner.export(tmp_path / "run")
    plain, theirs = load_model(tmp_path / "run")
    assert theirs.encode("w7 w3").tolist() == [7, 3]
    with torch.no_grad():
        logits = learner.model(text(1, 5), learner.memory.weights)[0]
        torch.testing.assert_close(plain(text(1, 5))[0], logits, rtol=1e-4, atol=1e-5)
