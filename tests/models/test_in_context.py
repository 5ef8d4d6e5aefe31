"""Eq. 71 in context: against plain gradient descent on a copy of the model for each row, and its properties."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)

from cache_name import CACHE
from nestlearn.memory.adaptation import FastWeight, LearningRule, advance_levels, update_level
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.in_context import LevelMemory, Reading, _detached, read
from nestlearn.models.stacking import Context, StackedModel, find_mlps, stack_levels

SIZES = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=41, n_embd=16, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, eos_token_id=0, bos_token_id=0),
    "olmo2": Olmo2Config(**SIZES, eos_token_id=0),
}
NAMES = (*CONFIGS, "hope")
PERIODS = (3, 6)
RULES = (
    (LearningRule(lr=0.3, clip=None), LearningRule(lr=0.1, clip=None)),
    (LearningRule(lr=0.3, rule="momentum", clip=0.7), LearningRule(lr=0.2, retention=0.9, clip=0.5)),
    (LearningRule(lr=0.2, rule="dgd", clip=None), LearningRule(lr=0.3, rule="dgd", clip=0.6, retention=0.8)),
)


def base(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    if name == "hope":
        model: nn.Module = HopeLM(HopeConfig(vocab_size=41, dim=16, depth=2, heads=2, chunk_size=4, **settings))
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():  # nothing at zero, and losses far from flat
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def stacked(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> StackedModel:
    return stack_levels(base(name, dtype), PERIODS, notice=None, **{"strategy": "whole_depth", **settings})


def some_tokens(length: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(41, (rows, length), generator=torch.Generator().manual_seed(seed))


def learn(model: StackedModel, tokens: Tensor, rules: Any, memory: LevelMemory | None = None, **more: Any) -> Reading:
    if memory is None:
        memory = LevelMemory(model.fresh(len(tokens), rules), len(tokens), 0)
    return read(model, tokens, memory, rules, **more)


class Oracle:
    """One row: a copy of the model, whose own parameters descend."""

    def __init__(self, model: StackedModel, rules: Any) -> None:
        self.model = copy.deepcopy(model.base)
        self.rules = rules
        self.levels = model.levels
        self.linears = dict(self.model.named_modules())
        self.initial = {n: self.weight(n).detach().clone() for level in model.levels for n in level.weights}
        self.gathered = {n: torch.zeros_like(w) for n, w in self.initial.items()}
        self.velocity = {n: torch.zeros_like(w) for n, w in self.initial.items()}
        self.inputs: dict[str, list[Tensor]] = {n: [] for n in self.initial}
        self.tokens = 0

    def weight(self, name: str) -> Tensor:
        return self.linears[name].weight  # type: ignore[no-any-return, return-value]

    def change(self, name: str) -> Tensor:
        """(O, K), whatever the layer's own order is."""
        change = self.weight(name).detach() - self.initial[name]
        return change if isinstance(self.linears[name], nn.Linear) else change.T

    def read(self, row: Tensor) -> float:
        state, total, start = None, 0.0, 0
        while start < len(row):
            stop = min(len(row), *(start + p - (self.tokens + start) % p for p in PERIODS))
            fed, targets = row[max(start - 1, 0) : stop - 1], row[max(start, 1) : stop]
            if len(fed):
                hooks = [self.linears[n].register_forward_hook(lambda _, x, y, n=n: self.inputs[n].append(x[0]))
                         for n in self.initial]  # fmt: skip
                self.model.zero_grad()
                if isinstance(self.model, HopeLM):
                    logits, state = self.model(fed[None], state)
                    state = {name: tensor.detach() for name, tensor in state.items()}
                else:
                    out = self.model(input_ids=fed[None], use_cache=True, **{CACHE: state})
                    logits, state = out.logits, getattr(out, CACHE)
                    for layer in state.layers:
                        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
                for hook in hooks:
                    hook.remove()
                loss = F.cross_entropy(logits[0], targets, reduction="sum")
                loss.backward()
                total += loss.item()
                for n in self.initial:
                    self.gathered[n] += self.weight(n).grad  # type: ignore[arg-type]
            for level, rule in zip(self.levels, self.rules, strict=True):
                if (self.tokens + stop) % level.period == 0:
                    self.update(level.weights, rule)
            start = stop
        self.tokens += len(row)
        return total

    def update(self, names: tuple[str, ...], rule: LearningRule) -> None:
        norm = math.sqrt(sum(float(self.gathered[n].square().sum()) for n in names))
        for n in names:
            scale = 1.0 if rule.clip is None else min(1.0, rule.clip / max(norm, 1e-30))
            g = scale * self.gathered[n]
            if rule.rule == "momentum":
                g = self.velocity[n] = rule.momentum * self.velocity[n] + g
            change = rule.retention * (self.weight(n).detach() - self.initial[n]) - rule.lr * g
            if rule.rule == "dgd":
                x = F.normalize(torch.cat(self.inputs[n], 1)[0], dim=-1)
                inverse = torch.linalg.inv(torch.eye(x.shape[1], dtype=x.dtype) + scale * rule.lr * x.T @ x)
                change = change @ inverse if isinstance(self.linears[n], nn.Linear) else inverse @ change
            self.weight(n).data = self.initial[n] + change
            self.gathered[n] = torch.zeros_like(g)
            self.inputs[n] = []


@pytest.mark.parametrize("rules", RULES, ids=["gd", "momentum", "dgd"])
@pytest.mark.parametrize("name", NAMES)
def test_each_row_learns_as_a_copy_of_the_model_would(name: str, rules: Any) -> None:
    model = stacked(name)
    tokens = some_tokens(20)
    memory = None
    oracles = [Oracle(model, rules) for _ in tokens]
    for first, last in ((0, 7), (7, 8), (8, 20)):  # also from the middle of a period, and a single token
        found = learn(model, tokens[:, first:last], rules, memory)
        memory = found.memory
        expected = [oracle.read(row[first:last]) for oracle, row in zip(oracles, tokens, strict=True)]
        torch.testing.assert_close(found.nats, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
        for n, weight in memory.weights.items():
            change = torch.stack([oracle.change(n) for oracle in oracles])
            torch.testing.assert_close(weight.change, change, rtol=0, atol=1e-11)
    assert memory is not None
    assert memory.tokens == 20
    assert all(weight.change.abs().max() > 1e-3 for weight in memory.weights.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_learnt_and_nothing_to_learn_is_the_base_bit_for_bit(name: str) -> None:
    model = stacked(name, torch.float32)
    tokens = some_tokens(13)
    plain = model.base(tokens)
    expected = plain[0] if isinstance(plain, tuple) else plain.logits
    assert torch.equal(model(tokens)[0], expected)
    rules = (LearningRule(lr=0.0), LearningRule(lr=0.0))
    memory = learn(model, tokens, rules).memory
    assert torch.equal(model(tokens, memory.weights)[0], expected)
    rules = (LearningRule(lr=0.5), LearningRule(lr=0.5))
    assert torch.equal(model(tokens, model.fresh(2, rules))[0], expected)
    assert not any(module._forward_hooks for module in model.base.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("name", ["llama", "hope"])
def test_nothing_leaks_from_the_future_or_another_row_and_calls_agree(name: str) -> None:
    model, rules = stacked(name), RULES[1]
    tokens = some_tokens(20)
    other = tokens.clone()
    other[:, 14:] = some_tokens(6, seed=5)
    whole, changed = learn(model, tokens, rules), learn(model, other, rules)
    again = learn(model, tokens, rules)
    assert torch.equal(whole.nats, again.nats)
    for found, twin, repeated in zip(whole.updates, changed.updates, again.updates, strict=True):
        assert torch.equal(found.size, repeated.size)
        assert (found.tokens <= 14) == torch.equal(found.size, twin.size)
    # What is predicted up to a place depends on tokens up to it, across all updates.
    for length in (5, 14):
        short = learn(model, tokens[:, :length], rules).nats
        assert torch.equal(short, learn(model, other[:, :length], rules).nats)
    alone = learn(model, tokens[:1], rules)
    torch.testing.assert_close(alone.nats, whole.nats[:1])
    mixed = learn(model, torch.cat([tokens[:1], other[1:]]), rules)
    for n, weight in mixed.memory.weights.items():
        assert torch.equal(weight.change[0], whole.memory.weights[n].change[0])
        assert not torch.equal(weight.change[1], whole.memory.weights[n].change[1])


def test_the_memory_that_is_read_with_is_not_changed() -> None:
    model, rules = stacked("llama"), RULES[1]
    memory = learn(model, some_tokens(7), rules).memory
    kept = {n: FastWeight(*(None if t is None else t.clone() for t in w)) for n, w in memory.weights.items()}  # type: ignore[arg-type]
    learn(model, some_tokens(9), rules, memory)
    for n, weight in memory.weights.items():
        for tensor, copied in zip(weight, kept[n], strict=True):
            assert (tensor is None) == (copied is None)
            assert tensor is None or torch.equal(tensor, copied)  # type: ignore[arg-type]


def test_an_orthonormal_basis_of_all_directions_learns_as_the_whole_weight() -> None:
    rules, tokens = RULES[1], some_tokens(19)
    whole, rotated = stacked("llama"), stacked("llama", rank=24)
    a, b = learn(whole, tokens, rules), learn(rotated, tokens, rules)
    torch.testing.assert_close(a.nats, b.nats)
    logits = [m(tokens, found.memory.weights)[0] for m, found in ((whole, a), (rotated, b))]
    torch.testing.assert_close(*logits)
    few = stacked("llama", rank=2)
    learnt = learn(few, tokens, rules).memory.weights
    assert {weight.change.shape[-1] for weight in learnt.values()} == {2}
    assert few.floats_per_row(rules) < whole.floats_per_row(rules) / 4
    assert not torch.equal(few(tokens, learnt)[0], few(tokens)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "hope"])
def test_a_long_text_keeps_its_window_and_learns_all_of_it(name: str) -> None:
    model, rules = stacked(name), RULES[0]
    longest = 0
    forward = model.forward

    def watched(*given: Any, **more: Any) -> Any:
        nonlocal longest
        logits, context = forward(*given, **more)
        longest = max(longest, context.tokens)
        return logits, context

    model.forward = watched  # type: ignore[method-assign]
    found = learn(model, some_tokens(200), rules, window=16)
    assert found.predicted == 199
    assert found.memory.tokens == 200
    assert len([update for update in found.updates if update.level == 0]) == 200 // 3
    assert longest == 199 if name == "hope" else longest <= 16


@pytest.mark.parametrize("settings", [{"backend": "torch"}, {"mixer": "attention"}], ids=["hope", "attention"])
def test_gradients_through_all_updates_equal_finite_differences(settings: dict[str, Any]) -> None:
    model = stack_levels(base("hope", **settings), (3, 5), strategy="whole_depth", notice=None)
    rules = (LearningRule(lr=0.3, clip=0.6), LearningRule(lr=0.2, rule="dgd"))
    tokens = some_tokens(13)

    def loss() -> Tensor:
        return learn(model, tokens, rules, order=2, window=8).nats.sum()

    value = loss()
    assert value.requires_grad
    names = {"blocks.0.memory_system.levels.0.up.weight", "blocks.1.memory_system.levels.1.down.weight",
             "embedding.weight"} | ({"blocks.0.mixer.memory.inner"} if "backend" in settings else set())  # fmt: skip
    parameters = {n: p for n, p in model.base.named_parameters() if n in names}
    assert len(parameters) == len(names)
    gradients = torch.autograd.grad(value, list(parameters.values()))
    generator = torch.Generator().manual_seed(3)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):  # larger ones show the curvature
            with torch.no_grad():
                parameter.add_(step * direction)
            values.append(float(loss().detach().double()))
            with torch.no_grad():
                parameter.sub_(step * direction)
        numeric = (values[0] - values[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5), name
    frozen = learn(model, tokens, rules, window=8)
    assert not frozen.nats.requires_grad
    assert float(frozen.nats.sum()) == pytest.approx(float(value.detach()), rel=1e-6)


def test_a_faster_level_returns_when_the_next_one_changes() -> None:
    model, rules = stacked("llama"), RULES[0]
    fast, slow = (level.weights for level in model.levels)
    plain, nested = (learn(model, some_tokens(6), rules, nested=on).memory.weights for on in (False, True))
    for n in slow:
        assert torch.equal(plain[n].change, nested[n].change)
    assert all(plain[n].change.any() and not nested[n].change.any() for n in fast)
    later = learn(model, some_tokens(9), rules, nested=True).memory.weights
    assert all(later[n].change.any() for n in fast)


def test_dgd_is_the_minimiser_of_its_objective() -> None:
    # Eq. 56 for a batch: <D, g> + 1/(2 lr) |D - D_0|^2 + 1/2 sum |D x|^2 is least at the new change.
    torch.manual_seed(0)
    rule = LearningRule(lr=0.7, rule="dgd", clip=None)
    weight = FastWeight.fresh(2, 3, 4, rule, device=torch.device("cpu"), dtype=torch.float64)
    weight = weight._replace(change=torch.randn(2, 3, 4, dtype=torch.float64))
    x, g = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    found = update_level({"w": weight.gathered(g, x)}, rule)["w"].change.requires_grad_()
    seen = F.normalize(x, dim=-1)
    objective = (found * g).sum() + (found - weight.change).square().sum() / 1.4 + (found @ seen.mT).square().sum() / 2
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() < 1e-12


def test_levels_are_due_at_their_own_multiples() -> None:
    rule = LearningRule(lr=0.1)
    assert [advance_levels({}, {2: (rule, ()), 6: (rule, ())}, t)[1] for t in range(7)] == [
        (), (), (2,), (), (2,), (), (2, 6),
    ]  # fmt: skip


def test_mlp_blocks_are_found_and_assigned() -> None:
    for name in CONFIGS:
        blocks = find_mlps(base(name))
        assert len(blocks) == 4
        assert all(len(weights) == (2 if name in ("gpt2", "phi3") else 3) for weights in blocks.values())
    assert len(find_mlps(base("hope"))) == 4
    model = base("llama")
    by_strategy = {
        strategy: [
            [int(block.split(".")[2]) for block in level.blocks]
            for level in stack_levels(model, (2, 4), strategy=strategy, notice=None).levels  # type: ignore[arg-type]
        ]
        for strategy in ("last_quarter", "whole_depth", "interleaved")
    }
    assert by_strategy == {"last_quarter": [[2], [3]], "whole_depth": [[0, 1], [2, 3]], "interleaved": [[0, 2], [1, 3]]}
    said: list[str] = []
    stack_levels(model, (2, 4), notice=said.append)
    assert "level 0: every 2 tokens, 1 of the MLP blocks (model.layers.2.mlp), 1,152 weights" in said[0]


def test_what_does_not_fit_is_refused() -> None:
    model = base("llama")
    for given, message in (
        ({"periods": (4, 2)}, "strictly ascending"),
        ({"periods": (1, 2, 3, 4, 5)}, "5 levels need as many MLP blocks, the model has 4"),
        ({"periods": (1,), "strategy": "random"}, "strategy: expected one of 'last_quarter'"),
        ({"periods": (1,), "rank": 0}, "rank: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stack_levels(model, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no MLP blocks found in a Linear"):
        stack_levels(nn.Linear(2, 2), (1,))
    for settings, message in (
        ({"lr": -1.0}, "lr: expected a number of at least 0"),
        ({"lr": 1.0, "rule": "adam"}, "rule: expected one of 'gd', 'dgd', 'momentum'"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum: expected a number from 0 to below 1"),
        ({"lr": 1.0, "clip": 0.0}, "clip: expected a positive norm"),
        ({"lr": 1.0, "retention": 0.0}, "retention: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LearningRule(**settings)  # type: ignore[arg-type]
    levels, rules = stacked("llama"), RULES[0]
    memory = LevelMemory(levels.fresh(2, rules), 2, 0)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, T\)"):
        read(levels, torch.zeros(3, dtype=torch.long), memory, rules)
    with pytest.raises(ValueError, match="rules: expected one for each of the 2 levels, got 1"):
        read(levels, some_tokens(3), memory, rules[:1])
    with pytest.raises(ValueError, match="window: expected at least 2"):
        read(levels, some_tokens(3), memory, rules, window=1)
    with pytest.raises(ValueError, match="tokens: expected 2 rows, as many as the memory has, got 3"):
        read(levels, some_tokens(3, rows=3), memory, rules)


@pytest.mark.parametrize("name", ["llama", "gpt2", "hope"])
def test_training_mode_and_checkpointing_change_nothing(name: str) -> None:
    model, rules, tokens = stacked(name), RULES[1], some_tokens(20)
    expected = learn(model, tokens, rules)
    model.base.train()
    if name == "hope":
        model.base.set_activation_checkpointing(True)  # type: ignore[operator]
    else:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new and old
        next(getattr(model.base, name) for name in names if hasattr(model.base, name))()
    found = learn(model, tokens, rules)
    torch.testing.assert_close(found.nats, expected.nats)
    for n, weight in found.memory.weights.items():
        torch.testing.assert_close(weight.change, expected.memory.weights[n].change)
    assert all(module.training for module in model.base.modules())


def test_loss_does_not_depend_on_the_periods() -> None:
    tokens = some_tokens(50)
    rules = (LearningRule(lr=0.1),)
    found = []
    for period in (1, 7, 1000):
        model = stack_levels(base("llama"), (period,), notice=None)
        memory = LevelMemory(model.fresh(2, rules), 2, 0)
        found.append(read(model, tokens, memory, rules, window=16, learn=False).nats)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_base_whose_context_cannot_be_carried_on_is_refused() -> None:
    model, rules = stacked("llama"), RULES[0]
    forward = model.base.forward

    def without_cache(*given: Any, **more: Any) -> Any:
        out = forward(*given, **more)
        setattr(out, CACHE, None)
        return out

    model.base.forward = without_cache  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="keeps its context in NoneType; only caches of keys and values"):
        learn(model, some_tokens(9), rules)
    assert all(parameter.requires_grad for parameter in model.base.parameters())


@pytest.mark.parametrize("window", [2, 8, 9])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_full_context_begins_anew_with_its_last_half(name: str, window: int) -> None:
    model, tokens = stacked(name), some_tokens(50, rows=1)
    begin, expected = 0, 0.0
    for start in range(0, 50, window // 2):
        first, last = max(start - 1, 0), min(50, start + window // 2) - 1  # what a segment is fed
        if last == first:
            continue
        if last - begin > window:
            begin = first - min(window // 2, window - (last - first))
        with torch.no_grad():
            logits = model(tokens[:, begin:last])[0][0, first - begin :]
        expected += float(F.cross_entropy(logits, tokens[0, first + 1 : last + 1], reduction="sum"))
    assert begin > 0
    found = read(model, tokens, LevelMemory({}, 1, 0), RULES[0], window=window, learn=False)
    assert float(found.nats) == pytest.approx(expected, abs=1e-5)


def test_a_cache_may_have_layers_that_keep_nothing() -> None:
    keys = torch.ones(1, 1, 2, 3, requires_grad=True) * 2
    layers = [SimpleNamespace(keys=None, values=None), SimpleNamespace(keys=keys, values=keys)]
    found = _detached(Context(2, SimpleNamespace(layers=layers)))
    assert found.state.layers[0].keys is None
    assert not found.state.layers[1].keys.requires_grad
    with pytest.raises(ValueError, match="only caches of keys and values can be carried on"):
        _detached(Context(2, SimpleNamespace(layers=[SimpleNamespace(states=keys)])))
