"""A Llama in our classes is the same function, and further levels change nothing until they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hope_models import VOCABULARY, padded, text
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from nestlearn.hub import from_llama
from nestlearn.optim import LevelOptimizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(kind: Any = LlamaConfig, **settings: Any) -> PreTrainedModel:
    config = kind(**{**SIZES, "initializer_range": 0.15, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
        (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
        (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    ],
)
def test_logits_are_equal(kind: Any, settings: dict[str, Any]) -> None:
    theirs = llama(kind, **settings)
    for periods in ((1,), (1, 4, 16)):
        ours = from_llama(theirs, periods=periods)
        assert len(ours.blocks[0].memory_system.levels) == len(periods)
        with torch.no_grad():
            expected, found = theirs(text(2, 40)).logits, ours(text(2, 40)).logits
        assert expected.std() > 0.5, "logits that are all alike show nothing"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_generation_is_equal_and_survives_its_files(tmp_path: Path) -> None:
    theirs = llama(num_key_value_heads=2)
    ours = from_llama(theirs, periods=(1, 4))
    ids, mask = padded([text(5, seed=1), text(11, seed=2)], "left")
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, **settings)
    assert torch.equal(ours.generate(ids, **settings), expected)
    ours.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, **settings), expected)


def test_added_levels_learn_from_where_the_model_was() -> None:
    ours = from_llama(llama(), periods=(1, 2)).train()
    optimizer = LevelOptimizer.for_model(ours, lr=1e-2)
    slow = ours.blocks[0].memory_system.levels[1].down.weight
    before = slow.detach().clone()
    assert not before.any()
    losses = []
    for _ in range(4):
        loss = ours(text(2, 20), labels=text(2, 20)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert bool(slow.any()) == (len(losses) >= 2), "it moves at every second step"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (Qwen3Config, {"head_dim": 8}, "got 'qwen3'"),
        (LlamaConfig, {"attention_bias": True}, "no place for: model.layers.0.self_attn.q_proj.bias"),
        (LlamaConfig, {"hidden_act": "gelu"}, "MLPs with silu, got 'gelu'"),
        (LlamaConfig, {"head_dim": 16}, "4 of width 16 at 32"),
        (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 8}, "sliding window"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "plain rotary positions, got 'linear'",
        ),
    ],
)
def test_what_ours_does_not_do_is_refused(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_llama(llama(kind, **settings))
