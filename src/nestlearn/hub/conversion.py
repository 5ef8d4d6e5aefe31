"""Weights of a pretrained Llama-like Transformer as a `HopeForCausalLM`, to which slower levels can be added."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestlearn.hub.configuration import HopeConfig
from nestlearn.hub.modeling import HopeForCausalLM

KINDS = ("llama", "mistral")
EPSILON = 1e-5  # of our norms


@torch.no_grad()
def from_llama(model: PreTrainedModel, *, periods: Sequence[int] = (1,)) -> HopeForCausalLM:
    """The same Transformer in our classes: mixer "plain_attention", gated levels. Its logits are equal to rounding.

    The pretrained MLP is the first level of each block. Further ones begin as the identity, as nothing comes out of
    them yet, so that Hope-Attention starts as the pretrained model and `LevelOptimizer` trains it from there. Grouped
    keys and values are repeated for each head. Where its norms add another epsilon than ours, the residual stream is
    scaled, which comes to the same.

    Args:
        model: a causal language model of `transformers`, Llama or Mistral; it is not changed.
        periods: of the levels, from the fastest, in optimizer steps.

    Raises:
        ValueError: for another kind of model, or one with parts that ours does not have.
    """
    theirs = model.config
    _check(theirs)
    tied = bool(theirs.tie_word_embeddings)
    config = HopeConfig(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        mixer="plain_attention",
        cms_periods=tuple(periods),
        cms_expansion=theirs.intermediate_size / theirs.hidden_size,
        cms_level="gated",
        tie_embeddings=tied,
        rotary_base=float(theirs.rope_parameters["rope_theta"]),
    )
    given = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    converted = HopeForCausalLM(config).to(model.dtype)
    state = converted.state_dict()
    scale = math.sqrt(EPSILON / theirs.rms_norm_eps)  # norm(scale x) with our epsilon is norm(x) with theirs
    state["embedding.weight"] = given.pop("model.embed_tokens.weight") * scale
    head = given.pop("lm_head.weight", None)
    state["head.weight"] = state["embedding.weight"] if tied or head is None else head
    state["norm.weight"] = given.pop("model.norm.weight") / (scale if tied else 1.0)
    repeats = theirs.num_attention_heads // theirs.num_key_value_heads
    for number in range(config.depth):
        block, layer = f"blocks.{number}.", f"model.layers.{number}."
        take = {name.removeprefix(layer): given.pop(name) for name in list(given) if name.startswith(layer)}
        for name, tensor in _block(take, repeats, config.heads // repeats, scale).items():
            state[block + name] = tensor
        given |= {layer + name: tensor for name, tensor in take.items()}  # what nobody took
        for level in range(1, len(config.cms_periods)):
            state[f"{block}memory_system.levels.{level}.down.weight"].zero_()
    if given:
        raise ValueError(f"the model has weights that ours has no place for: {', '.join(list(given)[:3])}")
    converted.load_state_dict(state)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def _block(take: dict[str, Tensor], repeats: int, groups: int, scale: float) -> dict[str, Tensor]:
    """One block's weights under our names; what is used is taken out of `take`."""

    def repeated(name: str) -> Tensor:
        weight = take.pop(f"self_attn.{name}_proj.weight")
        return weight.unflatten(0, (groups, -1)).repeat_interleave(repeats, dim=0).flatten(0, 1)

    level = "memory_system.levels.0."
    return {
        "norm.weight": take.pop("input_layernorm.weight"),
        "mixer.projection.weight": torch.cat([take.pop("self_attn.q_proj.weight"), repeated("k"), repeated("v")]),
        "mixer.output.weight": take.pop("self_attn.o_proj.weight") * scale,
        f"{level}norm.weight": take.pop("post_attention_layernorm.weight"),
        f"{level}gate.weight": take.pop("mlp.gate_proj.weight"),
        f"{level}up.weight": take.pop("mlp.up_proj.weight"),
        f"{level}down.weight": take.pop("mlp.down_proj.weight") * scale,
    }


def _check(config: Any) -> None:
    """Refuses what our Transformer does not do."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    for right, says in (
        (config.model_type in KINDS, f"a model of type {' or '.join(KINDS)}, got {config.model_type!r}"),
        (config.hidden_act == "silu", f"MLPs with silu, got {config.hidden_act!r}"),
        (rope.get("rope_type") == "default", f"plain rotary positions, got {rope.get('rope_type')!r}"),
        (getattr(config, "sliding_window", None) is None, "attention to the whole context, got a sliding window"),
        (
            width * config.num_attention_heads == config.hidden_size,
            f"heads that divide the width, got {config.num_attention_heads} of width {width} at {config.hidden_size}",
        ),
    ):
        if not right:
            raise ValueError(f"from_llama: expected {says}; convert it by hand, or stack levels on it as it is")
