"""The counted operations against those that really run."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nestlearn import HopeConfig, HopeLM
from nestlearn.models.config import Mixer

SIZE: dict[str, Any] = {"dim": 64, "heads": 2, "depth": 1, "chunk_size": 32}
MODELS: dict[str, dict[str, Any]] = {mixer: {"mixer": mixer} for mixer in get_args(Mixer)} | {
    "tnt as printed": {"mixer": "tnt", "global_stride": 1, "project_queries": True, "global_chunk_size": 64},
    "momentum": {"momentum": True},
    "delta rule": {"inner_rule": "delta"},
    "delta rule with momentum": {"inner_rule": "delta", "momentum": True},
    "gradient descent": {"inner_rule": "gd"},
    "gradient descent with momentum": {"inner_rule": "gd", "momentum": True},
    "small chunks of projections": {"projection_chunk_size": 16, "momentum": True},
    "large chunks of projections": {"projection_chunk_size": 64},
    "adaptive query": {"adaptive_query": True, "momentum": True},
    "narrow memories": {"memory_hidden": 24, "momentum": True},
    "reads of the snapshot": {"read": "chunk"},
    "retention to zero": {"read": "previous", "retain_to": "zero"},
    "paper": HopeConfig.paper(**SIZE).to_dict(),
    "transformer": HopeConfig.transformer(**SIZE).to_dict(),
    "titans of another shape": {"mixer": "titans", "memory_hidden": 48, "read": "chunk", "retain_to": "zero"},
}


def build(name: str) -> HopeLM:
    """In operations that can be counted, in which the padding of narrow memories would count too: so none is narrow."""
    settings = {**SIZE, **MODELS[name]}
    return HopeLM(HopeConfig(**{**settings, "gate_hidden_ratio": 1.0, "backend": "torch"}))


def solve_flops(factor: tuple[int, ...], right: tuple[int, ...], *_: object, **__: object) -> int:
    """A unit-triangular solve: C (C - 1) operations a column."""
    columns = 1
    for size in (*right[:-2], right[-1]):
        columns *= size
    return columns * factor[-1] * (factor[-1] - 1)


def count(model: HopeLM, tokens: Tensor, *, backward: bool = False) -> float:
    """Operations a token in a run of the model, less those of the convolutions, and of what causal masks hide."""
    solve = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=solve) as counter:
        logits, _ = model(tokens)
        if backward:
            logits.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" not in str(op))
    hidden = 0.0
    if model.config.mixer in ("attention", "plain_attention"):
        hidden = 2.0 * model.config.dim * (tokens.shape[1] - 1) * (3 if backward else 1)
    return counted / tokens.numel() - hidden


@pytest.mark.parametrize("tokens", [256, 100, 1])
@pytest.mark.parametrize("name", MODELS)
def test_flops_agree_with_a_count(name: str, tokens: int) -> None:
    model = build(name)
    counted = count(model, torch.randint(256, (2, tokens)))
    assert model.flops_per_token(tokens) == pytest.approx(counted, rel=0.001)


# TNT's global memories are read a chunk late, so what a short sequence writes into them gets no gradient.
@pytest.mark.parametrize("name", [name for name in MODELS if "tnt" not in name])
def test_a_training_step_costs_three_forward_passes(name: str) -> None:
    model = build(name)
    counted = count(model, torch.randint(256, (1, 256)), backward=True)
    # What a chunk that only reads the snapshot writes last gets no gradient: all of it at 8 chunks is 6%.
    tolerance = 0.07 if model.config.read == "chunk" else 0.02
    assert 3 * model.flops_per_token(256) == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_decoded_token_agree_with_a_count(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        _, state = model(torch.randint(256, (1, 40)))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randint(256, (1, 1)), state)
    ops = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in ops.items() if "convolution" not in str(op))
    assert model.decode_flops(40) == pytest.approx(counted, rel=0.001)
