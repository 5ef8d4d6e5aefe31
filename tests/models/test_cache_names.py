"""The two names of a cache: each model is called by its own, whatever the installed version has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cache_name import CACHE
from nestlearn.models.cache_names import cache_in, cache_name
from nestlearn.models.stacking import stack_levels


class Around(nn.Module):
    """A model of transformers under an interface of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LlamaForCausalLM(
            LlamaConfig(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        )

    def _read(self, input_ids: Any, before: Any, name: str) -> Any:
        out = self.inner(input_ids=input_ids, use_cache=True, **{CACHE: before})
        return SimpleNamespace(logits=out.logits, **{name: getattr(out, CACHE)})


class New(Around):
    def forward(self, input_ids: Any, use_cache: bool, cache: Any = None) -> Any:
        return self._read(input_ids, cache, "cache")


class Old(Around):
    def forward(self, input_ids: Any, use_cache: bool, past_key_values: Any = None) -> Any:
        return self._read(input_ids, past_key_values, "past_key_values")


class HandsOn(Around):
    def forward(self, **given: Any) -> Any:
        return self.inner(**given)


@pytest.mark.parametrize(("kind", "name"), [(New, "cache"), (Old, "past_key_values"), (HandsOn, CACHE)])
def test_a_base_is_given_its_cache_under_its_own_name(kind: type[Around], name: str) -> None:
    base = kind().eval()
    assert cache_name(base.forward) == name
    model = stack_levels(base, (4,), notice=None)
    tokens = torch.randint(41, (2, 9))
    with torch.no_grad():
        whole, _ = model(tokens)
        first, context = model(tokens[:, :5])
        second, context = model(tokens[:, 5:], None, context)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert context.state.get_seq_length() == 9


def test_an_output_without_a_cache_holds_none() -> None:
    assert cache_in(SimpleNamespace(logits=None)) is None
