"""The gate: a speed is worth nothing if what is timed is wrong.

Before a model is timed, a small one with its settings must read a sequence whole as it does token by token in float64,
gradients included; before its prefill or decoding is timed, these must agree with that reading too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.evaluation.benchmarks.settings import Kind
from nestlearn.models import HopeConfig, HopeLM

State = dict[str, Tensor]
Read = Callable[[Tensor], tuple[Tensor, State]]

TOLERANCE = 1e-9


class NotEqual(ValueError):
    """What was to be timed does not compute what it should."""


def check_equality(
    config: HopeConfig,
    kind: Kind = "train",
    *,
    tokens: int = 37,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Compares what is to be timed with reading token by token, in float64.

    Always: a whole sequence, in logits, state and all gradients. For "prefill" also without gradients, whole and in
    uneven pieces. For "decode" also `decode_step` after a prompt, in logits and state, over more than a chunk.

    Args:
        config: its settings are kept; width, depth, vocabulary and chunks are made small.
        kind: what is to be timed.
        tokens: T.
        tolerance: largest difference allowed, over the largest value of each tensor.
        seed: of weights and tokens.
        device: where to compute.

    Returns:
        The largest difference found, relative to the largest value of its tensor.

    Raises:
        NotEqual: naming the tensor that differs.
    """
    model, inputs, targets = _small_model(config, tokens, seed, device)
    what = "a whole sequence and its tokens one by one"
    whole = _with_gradients(model, lambda x: model(x), inputs, targets)
    single = _with_gradients(model, lambda x: _in_pieces(model, x, [1] * tokens), inputs, targets)
    worst = _compare(config, what, whole, single, tolerance)
    with torch.no_grad():
        if kind == "prefill":
            for sizes in ([tokens], [tokens - 20, 13, 7]):
                logits, state = _in_pieces(model, inputs, sizes)
                worst = max(worst, _compare(config, what, {"logits": logits, **state}, single, tolerance, part=True))
        if kind == "decode":
            prompt = tokens // 2
            state = model(inputs[:, :prompt])[1]
            for i in range(prompt, tokens):
                expected, _ = model(inputs[:, i : i + 1], state)
                logits, state = model.decode_step(inputs[:, i], state)
                what = f"decode_step and forward on token {i}"
                worst = max(worst, _compare(config, what, {"logits": logits}, {"logits": expected[:, 0]}, tolerance))
            found = {"logits": logits, **_like(state, single)}
            last = {**single, "logits": single["logits"][:, -1]}
            what = "decode_step and reading token by token"
            worst = max(worst, _compare(config, what, found, last, tolerance, part=True))
    return worst


def small_config(config: HopeConfig) -> HopeConfig:
    """The same settings in a small size."""
    chunk, projection = 8, config.projection_chunk_size
    if projection is not None:  # in the same proportion, so that one still divides the other
        main = config.chunk_size
        projection = chunk * (projection // main) if projection >= main else max(1, chunk // (main // projection))
    return replace(
        config,
        vocab_size=23,
        dim=16,
        depth=2,
        heads=2,
        chunk_size=chunk,
        projection_chunk_size=projection,
        global_chunk_size=16,
        local_chunk_sizes=(2, 4),
        shard_length=12,
        global_stride=min(config.global_stride, 4),
        memory_hidden=None,
        cms_expansion=2.0,
    )


def _small_model(
    config: HopeConfig, tokens: int, seed: int, device: torch.device | str
) -> tuple[HopeLM, Tensor, Tensor]:
    small = small_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HopeLM(small).double()
        # Memories start at zero in part, which would hide what is wrong with them.
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        inputs, targets = torch.randint(small.vocab_size, (2, 2, tokens)).to(device)
    return model.to(device), inputs, targets


def _in_pieces(model: HopeLM, x: Tensor, sizes: list[int]) -> tuple[Tensor, State]:
    state, logits = model.init_state(len(x)), []
    for piece in x.split(sizes, dim=1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, dim=1), state


def _with_gradients(model: HopeLM, read: Read, inputs: Tensor, targets: Tensor) -> State:
    model.zero_grad()
    logits, state = read(inputs)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{name: x.detach() for name, x in state.items()}, **gradients}


def _like(state: State, expected: Mapping[str, Tensor]) -> State:
    """The state without spare room: a cache that grows may hold more places than tokens."""
    return {
        name: x[tuple(slice(n) for n in expected[name].shape)] if name in expected else x for name, x in state.items()
    }


def _compare(
    config: HopeConfig, what: str, found: State, expected: State, tolerance: float, *, part: bool = False
) -> float:
    """The largest relative difference. With `part`, gradients may be missing."""
    missing = {name for name in found.keys() ^ expected.keys() if not (part and name.startswith("gradient of "))}
    if missing:
        raise NotEqual(f"{config.mixer}: {what} give different tensors: {', '.join(sorted(missing))}")
    worst = 0.0
    for name, tensor in found.items():
        other = expected[name]
        difference = float("inf")
        if tensor.shape == other.shape:
            largest = max(float(other.abs().max()), 1e-12) if other.numel() else 1.0
            difference = float((tensor - other).abs().max()) / largest if other.numel() else 0.0
        if not difference <= tolerance:
            raise NotEqual(
                f"{config.mixer}: {what} give different results: {name} differs by {difference:.1e} of its largest "
                f"value, at most {tolerance:.0e} is allowed. No speed is given for a model that is wrong; the tests "
                f"in tests/models say where"
            )
        worst = max(worst, difference)
    return worst
